"""A run on two worker processes over photographs and large TIFFs, which are read by region: as without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tifffile
from conftest import draw_discs, make_onnx, make_spec
from run_records import journal_without_times
from running import infer, results, rows, save

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from worker_faults import POISON, Poison

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cluster import worker
from cellseg_deploy.cluster.connection import TlsFiles, connected
from cellseg_deploy.cluster.engine import ClusterEngine
from cellseg_deploy.cluster.outcomes import ClusterOutcomes
from cellseg_deploy.errors import BackendUnavailableError, OutputError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run import streamed
from cellseg_deploy.run.folder import RunOptions, RunSummary, run_folder
from cellseg_deploy.run.streamed import UNFINISHED
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import counting
from cellseg_deploy.slides.counting import Progress

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk", "low_limit")
LIMIT = 50_000
N_PHOTOGRAPHS = 6
SAVE = ("labels", "overlays", "geojson")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with connected("local", workers=2, threads_per_worker=2, tls=TlsFiles()) as client:
        yield client


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """TIFFs above ``LIMIT`` are read by region; workers need not know it."""
    monkeypatch.setattr(streamed, "STREAMED_PIXELS", LIMIT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, a large TIFF between them and a damaged one in ``in``; what one process makes of them in ``whole``.

    Photographs before ``m-large.tif`` and after it are in flight when its turn comes.
    """
    folder = tmp_path_factory.mktemp("streamed")
    centres = [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(7) for y in range(15)]
    for number in range(N_PHOTOGRAPHS):
        discs = draw_discs((150, 200 + 7 * number), [at for at in centres if max(at) < 160 + 7 * number], radius=7)
        save(folder / "in" / f"{'am'[number % 2]}-{number}.png", discs)
    large = folder / "in/m-large.tif"
    image = draw_discs((900, 300), centres, radius=7)
    tifffile.imwrite(large, image, photometric="rgb", tile=(128, 128), compression="zlib", metadata=None)
    damaged = bytearray(large.read_bytes())
    with tifffile.TiffFile(large) as tiff:
        page: Any = tiff.pages[0]
        damaged[page.dataoffsets[-4] : page.dataoffsets[-4] + 20] = bytes(20)
    (folder / "in/m-damaged.tif").write_bytes(damaged)
    (folder / "stub.onnx").write_bytes(make_onnx(make_spec(cell_diameter_px=14.0)).SerializeToString())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "STREAMED_PIXELS", LIMIT)
        assert run(folder / "in", folder / "whole").failed == 1
    return folder


def run(
    images: Path,
    out: Path,
    client: Any = None,
    *,
    progress: Progress | None = None,
    only: tuple[str, ...] = (),
    save: tuple[str, ...] = SAVE,
    memory: int = 10**9,
    scale: Any = "auto",
    **callbacks: Any,
) -> RunSummary:
    """Count ``images``, on workers with ``client``. ``progress``: of ``m-large.tif``."""
    engine = EngineOptions(backend="onnxruntime", threads=1)
    elsewhere = None if client is None else ClusterEngine(client, "local", threads=2)
    found = [image for image in find_images([images]) if not only or image.name in only]

    def on_stream(name: str, _: str) -> Progress:
        return (progress if name == "m-large.tif" else None) or Progress()

    options = RunOptions(save=save, memory=memory)
    with Segmenter.load(images.parent / "stub.onnx", engine=engine, scale=scale, batch_size=4) as segmenter:
        return run_folder(segmenter, found, out, options=options, elsewhere=elsewhere, on_stream=on_stream, **callbacks)


def expect_same(out: Path, made: Path, *, is_resumed: bool = False) -> None:
    """Same files, same journal, and nothing that is not a result."""
    assert results(out) == results(made / "whole")
    found, expected = journal_without_times(out), journal_without_times(made / "whole")
    if is_resumed:  # it also has the hashes of the tables that were written when the run was stopped
        found, expected = found[:3], expected[:3]
    assert found == expected
    totals = [json.loads((folder / "run.json").read_text())["totals"] for folder in (out, made / "whole")]
    assert totals[0] == totals[1]


def tiles_of_large(made: Path, out: Path) -> int:
    """Number of tiles that one process computes of it."""
    found = list[int]()
    run(made / "in", out, progress=Progress(started=lambda _, n: found.append(n)), only=("m-large.tif",))
    return found[0]


def test_files_tables_and_journal_are_those_of_one_process(
    client: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "BandNetwork", None)  # of this process
    summary = run(made / "in", tmp_path / "out", client)
    expect_same(tmp_path / "out", made)
    assert (summary.done, summary.failed) == (N_PHOTOGRAPHS + 1, 1)
    (large,) = (row for row in rows(tmp_path / "out/images.csv") if row["image"] == "m-large.tif")
    assert int(large["cells"]) > 90
    (damaged,) = (row for row in rows(tmp_path / "out/images.csv") if row["status"] == "failed")
    assert "tile or strip" in damaged["error"]
    said = json.loads((tmp_path / "out/run.json").read_text())
    assert said["engine_busy"] > 0
    again = run(made / "in", tmp_path / "out", client)
    assert (again.skipped, again.failed) == (N_PHOTOGRAPHS + 1, 1)


def test_time_of_the_workers_is_in_the_sums(client: Any, made: Path, tmp_path: Path) -> None:
    summary = run(made / "in", tmp_path / "out", client, only=("m-large.tif",), scale=1.0)
    assert {"read", "resize", "tile", "network", "label", "write"} <= summary.stage_seconds.keys()
    assert 0 < summary.engine_seconds <= summary.stage_seconds["network"]


def test_killed_worker_changes_nothing(client: Any, made: Path, tmp_path: Path) -> None:
    killed = list[int]()

    def advanced(_: int) -> None:
        if not killed:
            killed.append(min(client.run(os.getpid).values()))
            os.kill(killed[0], signal.SIGKILL)

    run(made / "in", tmp_path / "out", client, progress=Progress(advanced=advanced))
    assert killed
    expect_same(tmp_path / "out", made)


@pytest.mark.parametrize("on_workers", [True, False])
def test_killed_run_is_resumed(client: Any, made: Path, tmp_path: Path, *, on_workers: bool) -> None:
    """From the bands in the file, by workers or by one process; what a kill leaves is a copy of OUT at that time."""
    seen, totals = list[int](), list[int]()

    def advanced(n: int) -> None:
        seen.append(n)
        if len(seen) == 3:
            shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(made / "in", tmp_path / "stopped", client, progress=Progress(advanced=advanced))
    assert not list((tmp_path / "stopped").glob(".cellseg-*"))  # bands that nobody took
    assert json.loads((tmp_path / "stopped/run.json").read_text())["status"] == "stopped"
    assert list((tmp_path / "killed").glob(".cellseg-*"))
    for name in ("stopped", "killed"):
        progress = Progress(started=lambda _, n: totals.append(n))
        run(made / "in", tmp_path / name, client if on_workers else None, progress=progress)
        expect_same(tmp_path / name, made, is_resumed=True)
    whole = tiles_of_large(made, tmp_path / "again")
    assert totals[0] == totals[len(totals) // 2] == whole - sum(seen)


def test_images_that_kill_workers_fail_alone(client: Any, made: Path, tmp_path: Path) -> None:
    """One that is read by region, and a photograph that is in flight next to the bands of another."""
    images = tmp_path / "in"
    images.mkdir()
    for name in ("a-0.png", "m-large.tif", "m-1.png"):
        os.link(made / "in" / name, images / name)
    os.link(made / "in/m-3.png", images / f"m-large.tif-{POISON}.png")
    os.link(made / "in/m-large.tif", images / f"n-{POISON}.tif")
    os.link(made / "in/m-5.png", images / "z.png")
    shutil.copy(made / "stub.onnx", tmp_path)
    run(images, tmp_path / "whole")
    client.register_plugin(Poison())
    try:
        summary = run(images, tmp_path / "out", client)
    finally:
        client.unregister_worker_plugin(POISON)
    assert (summary.done, summary.failed) == (4, 2)
    found = {row["image"]: row for row in rows(tmp_path / "out/images.csv")}
    for name in (f"m-large.tif-{POISON}.png", f"n-{POISON}.tif"):
        assert "end, also when it is the only one" in found.pop(name)["error"]
    of_one_process = {row["image"]: row for row in rows(tmp_path / "whole/images.csv")}
    assert found == {name: of_one_process[name] for name in found}
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_lost_scheduler_leaves_what_is_done(client: Any, made: Path, tmp_path: Path) -> None:
    from distributed import Client

    out, seen = tmp_path / "out", list[int]()
    own = Client(client.cluster, set_as_default=False)

    def advanced(n: int) -> None:
        seen.append(n)
        if len(seen) == 2:
            own.close()

    with pytest.raises(BackendUnavailableError, match="the connection to the scheduler was lost"):
        run(made / "in", out, own, progress=Progress(advanced=advanced))
    assert list((out / UNFINISHED).glob("*/probabilities.f32"))
    totals = list[int]()
    run(made / "in", out, client, progress=Progress(started=lambda _, n: totals.append(n)))
    assert totals[0] <= tiles_of_large(made, tmp_path / "again") - sum(seen[:2])
    expect_same(out, made, is_resumed=True)


@pytest.fixture
def within() -> Iterator[Any]:
    """A client of a cluster within this process."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
        for name in list(worker._engines):
            worker._engines.pop(name).close()


def test_worker_that_cannot_write_ends_the_run(
    within: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "temporary_in", lambda out: out / "no-such-folder" / ".cellseg-0.tmp")
    with pytest.raises(OutputError, match=r"worker \S+: .*cannot be written .*check free space"):
        run(made / "in", tmp_path / "out", within, only=("m-large.tif",))


def test_kinds_that_a_streamed_image_cannot_have(within: Any, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("roifile")
    for name, client in (("one", None), ("two", within)):
        assert run(made / "in", tmp_path / name, client, only=("a-0.png", "m-large.tif"), save=("rois",)).failed == 1
    assert results(tmp_path / "two") == results(tmp_path / "one")


def test_photographs_are_in_progress_next_to_bands(
    within: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those behind the large image, whose windows take no memory of the workers; with one model for all."""
    submit, submitted = ClusterOutcomes._submit, list[tuple[str, int]]()
    read, orders = worker.read_order, list[str]()

    def recorded(self: Any, index: int, attempt: str = "") -> None:
        submitted.append((type(self).__name__, index))
        submit(self, index, attempt)

    monkeypatch.setattr(ClusterOutcomes, "_submit", recorded)
    monkeypatch.setattr(worker, "read_order", lambda out, name: orders.append(name) or read(out, name))
    only = ("a-0.png", "m-1.png", "m-large.tif", "z.png")
    os.link(made / "in/a-2.png", made / "in/z.png")
    try:
        run(made / "in", tmp_path / "out", within, only=only, memory=10**12)
    finally:
        (made / "in/z.png").unlink()
    assert submitted.index(("ImageOutcomes", 3)) < submitted.index(("_BandOutcomes", 0))
    assert len(orders) == 1


def test_no_band_is_in_flight_once_its_image_has_failed(
    within: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, events = ClusterOutcomes.stop, list[str]()

    def stopped(self: Any) -> None:
        events.append(type(self).__name__)
        stop(self)

    def broken(_: int) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(ClusterOutcomes, "stop", stopped)
    summary = run(
        *(made / "in", tmp_path / "out", within),
        progress=Progress(advanced=broken),
        on_result=lambda result: events.append(result.image),
    )
    assert "a fault of ours" in summary.images["m-large.tif"].error
    assert (summary.done, summary.failed) == (N_PHOTOGRAPHS, 2)
    assert events.index("_BandOutcomes", events.index("m-damaged.tif")) < events.index("m-large.tif")


def test_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "in"
    images.mkdir()
    for name in ("a-0.png", "m-large.tif", "m-1.png"):
        os.link(made / "in" / name, images / name)
    model = ("--model", made / "stub.onnx", "--threads", 2, "--memory", "1GB", "--backend", "onnxruntime")
    assert infer(images, "-o", tmp_path / "one", *model, "-q") == 0
    capsys.readouterr()
    assert infer(images, "-o", tmp_path / "two", *model, "--scheduler", "local", "--workers", 2) == 0
    assert "m-large.tif: 300 x 900 px, read by region in blocks of up to 1.0 GB" in capsys.readouterr().err
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert journal_without_times(tmp_path / "two") == journal_without_times(tmp_path / "one")
