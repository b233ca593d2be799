"""One large image on two worker processes: the files of one process, byte for byte, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import draw_discs, make_onnx, make_spec

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from czi_files import tiles, write_czi
from stopping import StopAfter
from worker_faults import POISON, Poison

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cli import console
from cellseg_deploy.cli.slide import command
from cellseg_deploy.cluster.connection import TlsFiles, connected
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.errors import DataError
from cellseg_deploy.files.atomic import temporary_in
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import counting
from cellseg_deploy.slides.counting import Progress
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.slides.run import RECORD, run_slide

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected("local", workers=2, threads_per_worker=2, tls=TlsFiles()) as client:
        yield client


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 300 x 900 px with bare glass in its lower part, and in ``whole`` what one process makes of it."""
    folder = tmp_path_factory.mktemp("slide")
    centres = [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(7) for y in range(15)]
    image = draw_discs((900, 300), centres, radius=7)
    tifffile.imwrite(folder / "slide.tif", image, photometric="rgb", tile=(128, 128), metadata=None)
    (folder / "stub.onnx").write_bytes(make_onnx(make_spec(cell_diameter_px=14.0)).SerializeToString())
    count(folder, folder / "whole")
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``made``: noisy glass with two groups of cells, and a pyramid of two levels, counted with ``skip_blank``."""
    folder = tmp_path_factory.mktemp("sparse")
    centres = [
        (left + 40.0 * x, top + 40.0 * y) for left, top in [(30, 80), (150, 600)] for x in range(3) for y in (0, 1)
    ]
    image = draw_discs((900, 300), centres, radius=10)
    image = (image + np.random.default_rng(3).integers(-5, 6, image.shape)).astype(np.uint8)
    how: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(folder / "slide.tif") as tiff:
        tiff.write(image, subifds=1, **how)
        tiff.write(np.ascontiguousarray(image[::2, ::2]), subfiletype=1, **how)
    (folder / "stub.onnx").write_bytes(make_onnx(make_spec()).SerializeToString())
    count(folder, folder / "whole", skip_blank=True)
    return folder


def count(
    made: Path,
    out: Path,
    client: Any = None,
    progress: Progress | None = None,
    *,
    here: Path | None = None,
    there: Path | None = None,
    skip_blank: bool = False,
) -> None:
    """Count the slide, on workers with ``client``. ``here``, ``there``: what this process and workers open instead."""
    engine = EngineOptions(backend="onnxruntime", threads=1)
    elsewhere = None
    if client is not None:
        elsewhere = ClusterEngine(client, "local", threads=2).slide(there or made / "slide.tif", ReadOptions())
    reader = open_image(here or made / "slide.tif")
    try:
        with Segmenter.load(made / "stub.onnx", engine=engine, scale=1.0, batch_size=4) as segmenter:
            region = region_of(reader, 0, (3, 5, 290, 880))
            run_slide(
                *(segmenter, region, out),
                skip_blank=skip_blank,
                elsewhere=elsewhere,
                progress=progress or Progress(),
            )
    finally:
        reader.close()


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != RECORD}


def test_bands_of_workers_give_the_bytes_of_one_process(
    client: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process
    count(made, tmp_path / "out", client)
    assert contents(tmp_path / "out") == contents(made / "whole")
    assert len((made / "whole/cells.csv").read_text().splitlines()) > 50


def test_workers_open_a_czi(client: Any, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("pylibCZIrw")
    image = tifffile.imread(made / "slide.tif")
    path = write_czi(tmp_path / "slide.czi", tiles(image, 200, -50, 7))
    count(made, tmp_path / "out", client, here=path, there=path)
    assert (tmp_path / "out/labels.tif").read_bytes() == (made / "whole/labels.tif").read_bytes()


def test_python(client: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process, as is
    monkeypatch.setattr(Segmenter, "overlapped", None)
    cluster, engine = ClusterEngine(client, "local", threads=2), EngineOptions(backend="onnxruntime", threads=1)
    monkeypatch.chdir(made)  # workers work elsewhere
    with Segmenter.load(made / "stub.onnx", engine=engine, scale=1.0, batch_size=4) as model:
        model.run_slide("slide.tif", tmp_path / "out", region=(3, 5, 290, 880), cluster=cluster)
        result = model.run("slide.tif", tmp_path / "run", cluster=cluster)
    assert contents(tmp_path / "out") == contents(made / "whole")
    assert not result.failed
    assert result.cells > 50


def test_workers_find_the_same_glass(
    client: Any, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a run that one process starts and workers resume."""
    with pytest.raises(KeyboardInterrupt):
        count(sparse, tmp_path / "resumed", None, StopAfter(7).progress, skip_blank=True)
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process
    for name in ("out", "resumed"):
        count(sparse, tmp_path / name, client, skip_blank=True)
        assert contents(tmp_path / name) == contents(sparse / "whole"), name
    said = (sparse / "whole/images.csv").read_text()
    assert "taken for blank on level 1 of the pyramid" in said
    assert len((sparse / "whole/cells.csv").read_text().splitlines()) == 13


def test_killed_worker_changes_nothing(
    client: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process
    killed = list[int]()

    def advanced(_: int) -> None:
        if not killed:
            killed.append(min(client.run(os.getpid).values()))
            os.kill(killed[0], signal.SIGKILL)

    count(made, tmp_path / "out", client, Progress(advanced=advanced))
    assert killed
    assert contents(tmp_path / "out") == contents(made / "whole")


def test_options_that_do_not_fit(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(made / "slide.tif"), "-o", str(tmp_path / "out")]
    for more, said in [
        (["--workers", "2"], "needs --scheduler"),
        (["--scheduler", "tcp://10.0.0.1:8786"], "not encrypted"),
        (["--scheduler", "tcp://127.0.0.1:8786", "--workers", "2"], "needs --scheduler local"),
        (["--scheduler", "local", "--tls-key", "k.pem"], "needs --scheduler tls://"),
    ]:
        assert console.run(command, [*common, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stopped_run_is_resumed(client: Any, made: Path, tmp_path: Path) -> None:
    """By workers, from the bands that are in the file; a band that nobody took is removed."""
    out = tmp_path / "out"
    stop = StopAfter(3)
    with pytest.raises(KeyboardInterrupt):
        count(made, out, client, stop.progress)
    stale = temporary_in(out)
    stale.write_bytes(b"a band")
    totals, there = list[int](), list[bool]()
    count(
        *(made, out, client),
        Progress(started=lambda _, n: totals.append(n), advanced=lambda _: there.append(stale.exists())),
    )
    whole = list[int]()
    count(made, tmp_path / "again", None, Progress(started=lambda _, n: whole.append(n)))
    assert totals[0] == whole[0] - sum(stop.seen)
    assert not any(there)
    assert contents(out) == contents(made / "whole")


def test_command_starts_workers(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process
    model = ["--model", str(made / "stub.onnx"), "--scale", "1", "--backend", "onnxruntime", "--batch-size", "4"]
    common = [str(made / "slide.tif"), *model, "--region", "3,5,290,880", "--threads", "2"]
    out = tmp_path / "out"
    asked = [*common, "-o", str(out), "--scheduler", "local", "--workers", "2"]
    assert console.run(command, asked) == 0, capsys.readouterr().err
    assert contents(out) == contents(made / "whole")


def test_image_that_kills_workers(client: Any, made: Path, tmp_path: Path) -> None:
    poison = tmp_path / f"{POISON}.tif"
    os.link(made / "slide.tif", poison)
    client.register_plugin(Poison())
    try:
        with pytest.raises(DataError, match="end, also when it is the only one"):
            count(made, tmp_path / "out", client, here=poison, there=poison)
    finally:
        client.unregister_worker_plugin(POISON)


def test_worker_that_sees_another_file(client: Any, made: Path, tmp_path: Path) -> None:
    older = tmp_path / "slide.tif"
    older.write_bytes((made / "slide.tif").read_bytes())
    os.utime(older, (1, 1))
    with pytest.raises(DataError, match="another file than on the machine that starts the run"):
        count(made, tmp_path / "out", client, here=older)
