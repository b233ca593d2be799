"""A run reads slides and very large TIFFs by region: same labels, tables and report, resumed after a kill."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import THREE, DarknessBackend, draw_discs
from PIL import Image

from cellseg_deploy.cells.scale import SAMPLE_IMAGES
from cellseg_deploy.cli import console, progress
from cellseg_deploy.cli.infer import command
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX, TEMPORARY_SUFFIX
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.outputs import geojson
from cellseg_deploy.run import commit, session, streamed, upload
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.streamed import UNFINISHED, is_streamed
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import files

LIMIT = 50_000
CENTRES: list[tuple[float, float]] = [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(9) for y in range(10)]
LARGE = draw_discs((420, 380), CENTRES)
"""90 cells in 159,600 px."""
SAVE = ("labels", "overlays", "geojson")


@pytest.fixture(autouse=True)
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """TIFFs above ``LIMIT`` are read by region."""
    monkeypatch.setattr(streamed, "STREAMED_PIXELS", LIMIT)


def write_tiff(path: Path, image: npt.NDArray[np.uint8]) -> None:
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(64, 64), metadata=None, resolution=(1e5, 1e5), resolutionunit=3
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A photograph, and a TIFF above the limit."""
    place = tmp_path / "in"
    place.mkdir()
    Image.fromarray(draw_discs((100, 130), THREE)).save(place / "a.png")
    write_tiff(place / "large.tif", LARGE)
    return place


def run(folder: Path, out: Path, backend: DarknessBackend | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {"save": SAVE, "reading": ReadOptions(LIMIT), "memory": 10**9} | changes
    segmenter = Segmenter(DarknessBackend() if backend is None else backend, scale=1.0)
    more = {"on_stream": settings.pop("on_stream")} if "on_stream" in settings else {}
    return run_folder(segmenter, find_images([folder]), out, options=RunOptions(**settings), **more)


def test_a_large_tiff_is_counted_with_the_photographs(folder: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[tuple[str, str]]()

    def on_stream(name: str, words: str) -> Any:
        from cellseg_deploy.slides.counting import SILENT

        said.append((name, words))
        return SILENT

    summary = run(folder, out, on_stream=on_stream)
    assert (summary.done, summary.cells) == (2, 93)
    assert said == [("large.tif", "380 x 420 px, read by region in blocks of up to 1.0 GB")]
    whole = Segmenter(DarknessBackend(), scale=1.0)(folder / "large.tif", field="full")
    with tifffile.TiffFile(out / "labels/large.tif.tif") as tiff:
        assert np.array_equal(tiff.asarray(), whole.labels)
        assert tiff.is_bigtiff
        assert tiff.pages[0].is_tiled
    features = json.loads((out / "geojson/large.tif.geojson").read_bytes())["features"]
    assert features == json.loads(geojson.encode(whole.segmented))["features"]
    with Image.open(out / "overlays/large.tif.jpg") as overlay:
        assert overlay.size == (380, 420)
    rows = list(csv.DictReader((out / "cells.csv").read_text(encoding="utf-8").splitlines()))
    assert [row for row in rows if row["image"] == "large.tif"] == [
        dict(row) for row in csv.DictReader(whole.table.csv().decode().splitlines())
    ]
    (row,) = [
        row for row in csv.DictReader((out / "images.csv").read_text().splitlines()) if row["image"] == "large.tif"
    ]
    assert (row["cells"], row["counted"], row["status"]) == ("90", "90", "done")
    assert row["pixel_size_um"] == "0.1"
    assert "large.tif" in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / UNFINISHED).exists()

    backend = DarknessBackend()
    assert run(folder, out, backend).skipped == 2
    assert not backend.batches


def test_the_scale_is_measured_in_its_middle(folder: Path, tmp_path: Path) -> None:
    backend = DarknessBackend()
    summary = run_folder(
        Segmenter(backend, cell_diameter_px="auto"),
        find_images([folder / "large.tif"]),
        tmp_path / "out",
        options=RunOptions(reading=ReadOptions(LIMIT)),
    )
    whole = Segmenter(DarknessBackend(), cell_diameter_px="auto")(LARGE, field="full")
    assert summary.images["large.tif"].scale == whole.scale
    assert np.array_equal(tifffile.imread(tmp_path / "out/labels/large.tif.tif"), whole.labels)


def test_headers_are_not_read_to_measure_the_scale_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for number in range(SAMPLE_IMAGES + 4):
        Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / f"in/{number}.png")
    asked = list[Path]()

    def noting(path: Path) -> bool:
        asked.append(path)
        return is_streamed(path)

    monkeypatch.setattr(session, "is_streamed", noting)
    for _ in range(2):
        segmenter = Segmenter(DarknessBackend(), cell_diameter_px="auto")
        run_folder(segmenter, find_images([tmp_path / "in"]), tmp_path / "out", options=RunOptions())
        assert len(asked) == SAMPLE_IMAGES


def test_no_file_stays_of_an_edited_result(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    Image.new("RGB", (3, 3)).save(out / "overlays/large.tif.jpg")
    (out / "geojson/large.tif.geojson").unlink()
    run(folder, out)
    with Image.open(out / "overlays/large.tif.jpg") as overlay:
        assert overlay.size == (3, 3)
    assert (out / "geojson/large.tif.geojson").exists()
    assert not list(out.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"))


def test_no_file_stays_of_an_image_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(commit, "move", broken)
    with pytest.raises(OutputError, match="the disk is full"):
        run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"))


def test_kinds_of_files_depend_on_the_size_alone(folder: Path, tmp_path: Path) -> None:
    for name, memory in (("little", 30_000_000), ("much", 10**9)):
        assert run(folder, tmp_path / name, memory=memory).cells == 93
    for kind in ("labels/large.tif.tif", "geojson/large.tif.geojson", "overlays/large.tif.jpg", "cells.csv"):
        assert (tmp_path / "little" / kind).read_bytes() == (tmp_path / "much" / kind).read_bytes()
    assert is_streamed(folder / "large.tif")
    assert not is_streamed(folder / "a.png")
    assert not is_streamed(folder / "none.tif")
    assert is_streamed(folder / "slide.svs")


def dying() -> DarknessBackend:
    """A network that ends the process, so to speak, after some batches."""
    backend = DarknessBackend()
    predict = backend._predict

    def predict_or_die(tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if len(backend.batches) == 14:
            raise KeyboardInterrupt
        return predict(tiles_nhwc)

    backend._predict = predict_or_die  # type: ignore[method-assign]
    return backend


def test_an_interrupted_image_is_resumed(folder: Path, tmp_path: Path) -> None:
    whole = DarknessBackend()
    run(folder, tmp_path / "whole", whole)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, dying())
    assert list((out / UNFINISHED).glob("*/probabilities.f32"))
    again = DarknessBackend()
    assert run(folder, out, again).cells == 93
    assert 0 < sum(again.batches) < sum(whole.batches) - 20
    for name in ("labels/large.tif.tif", "cells.csv", "images.csv", "overlays/large.tif.jpg"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / UNFINISHED).exists()


def test_no_answers_stay_of_images_that_are_recorded_or_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, dying())
    (out / UNFINISHED / "mine").mkdir()
    (out / UNFINISHED / "mine/notes.txt").touch()
    (folder / "large.tif").rename(tmp_path / "gone.tif")
    run(folder, out)
    assert [path.name for path in (out / UNFINISHED).iterdir()] == ["mine"]
    assert not [name for name in upload._files(out) if name.startswith(UNFINISHED)]

    (tmp_path / "gone.tif").rename(folder / "large.tif")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a damaged image")

    monkeypatch.setattr(files, "write_labels", broken)
    assert run(folder, tmp_path / "failed").failed == 1
    assert not (tmp_path / "failed" / UNFINISHED).exists()


def test_what_cannot_be_done_by_region_fails_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("roifile")
    Image.fromarray(LARGE).save(folder / "large.png")
    summary = run(folder, tmp_path / "out", save=("labels", "rois"))
    assert (summary.done, summary.failed) == (1, 2)
    said = {name: summary.images[name].error for name in ("large.png", "large.tif")}
    assert (
        "is read by region, so rois cannot be written; expected `save` of labels, overlays, geojson"
        in said["large.tif"]
    )
    assert "more than the limit of 50000 pixels" in said["large.png"]


def test_too_little_memory_fails_one_image(folder: Path, tmp_path: Path) -> None:
    summary = run(folder, tmp_path / "out", memory=1_000_000)
    assert (summary.done, summary.failed) == (1, 1)
    assert "memory of 0.00 GB does not hold one block" in summary.images["large.tif"].error
    assert run(folder, tmp_path / "out").cells == 93


def test_kinds_cannot_be_added_later(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", save=("labels",))
    with pytest.raises(OutputError, match=r"large\.tif is read by region, and kinds of files cannot be added"):
        run(folder, tmp_path / "out", save=("labels", "geojson"))


def test_a_slide_that_is_passed_by_name(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    about = "Aperio Image Library v11.2.1\n380x420 [0,0 380x420] (64x64) RAW|AppMag = 40|MPP = 0.2500"
    path = tmp_path / "slide.svs"
    tifffile.imwrite(path, LARGE, tile=(64, 64), compression="lzw", description=about, photometric="rgb", metadata=None)
    summary = run_folder(Segmenter(DarknessBackend(), scale=1.0), find_images([path]), tmp_path / "out")
    assert summary.cells == 90
    whole = Segmenter(DarknessBackend(), scale=1.0)(LARGE, field="full")
    assert np.array_equal(tifffile.imread(tmp_path / "out/labels/slide.svs.tif"), whole.labels)


def test_the_command_streams_and_says_so(
    folder: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    arguments = [str(folder), "-o", str(tmp_path / "out"), "--model", str(model), "--scale", "1"]
    more = ["--backend", "onnxruntime", "--max-pixels", str(LIMIT), "--memory", "1GB"]
    assert console.run(command, arguments + more) == 0
    said = capsys.readouterr()
    assert "large.tif: 380 x 420 px, read by region in blocks of up to 1.0 GB" in said.err
    assert re.search(r"^large.tif: 10/110 tiles, \d+ s left$", said.err, re.MULTILINE)
    assert re.search(r"^large.tif: 110/110 tiles$", said.err, re.MULTILINE)
    assert "93" in said.out
    assert console.run(command, [*arguments, "--memory", "little"]) == 2
