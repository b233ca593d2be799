"""The folder run as a library: equal results however it is run, failures of one image and of all, what is kept."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_spec
from PIL import Image
from running import results, rows, save

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.batching import Overlapped
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, NothingToDoError, OutputError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import FoundImage, find_images, read_image
from cellseg_deploy.outputs import encoders, formats
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.run import commit, session
from cellseg_deploy.run.folder import ImageResult, RunOptions, RunSummary, run_folder
from cellseg_deploy.run.image_work import ImageWork
from cellseg_deploy.run.output_folder import ALWAYS
from cellseg_deploy.samples.params import SmearParams
from cellseg_deploy.samples.smear import make_smear
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Images of many sizes, from a pixel to a strip, and one that is damaged: 1 to 24 tiles."""
    folder = tmp_path / "discs"
    sizes = [(1, 1), (13, 500), (30, 40), (56, 56), (57, 57), (100, 130), (140, 171), (200, 240), (90, 60)]
    for index, (height, width) in enumerate(sizes):
        chance = random.Random(index)
        centres = [(chance.uniform(0, width), chance.uniform(0, height)) for _ in range(height * width // 1500)]
        save(folder / f"{index}.png", draw_discs((height, width), centres))
    damaged = (folder / "6.png").read_bytes()
    (folder / "55.png").write_bytes(damaged[: len(damaged) // 2])
    return folder


# --- the same results however it is run


def expect_same_results(
    open_segmenter: Callable[[int], Segmenter], folder: Path, out: Path, settings: list[tuple[int, int]]
) -> dict[str, bytes]:
    """Run ``folder`` with each (batch size, helpers) of ``settings``: in order the first time, then shuffled."""
    images, expected = find_images([folder]), None
    for batch_size, helpers in settings:
        name = f"{batch_size}-{helpers}"
        with open_segmenter(batch_size) as segmenter:
            summary = run_folder(segmenter, images, out / name, threads=ThreadPlan(None, helpers))
        assert (summary.failed, summary.remaining) == (1, 0)
        assert [row["image"] for row in rows(out / name / "images.csv")] == sorted(image.name for image in images)
        found = results(out / name)
        expected = found if expected is None else expected
        assert found == expected, (batch_size, helpers)
        random.Random(name).shuffle(images)
    assert expected is not None
    return expected


@pytest.mark.reliability
@pytest.mark.parametrize("auto", [False, True])
def test_results_do_not_depend_on_batches_helpers_or_order(discs: Path, tmp_path: Path, auto: bool) -> None:
    settings = [(batch_size, helpers) for batch_size in (1, 4, 16) for helpers in (1, 2, 4)]
    spec = make_spec(cell_diameter_px=14.0)

    def open_segmenter(batch_size: int) -> Segmenter:
        return Segmenter(DarknessBackend(spec), batch_size=batch_size, cell_diameter_px="auto" if auto else None)

    found = expect_same_results(open_segmenter, discs, tmp_path, settings)
    assert sum(name.startswith("labels/") for name in found) == 9


def test_a_folder_gives_what_each_image_gives_alone(discs: Path, tmp_path: Path) -> None:
    """Each has a size of its own here, and so is measured alone."""
    segmenter = Segmenter(DarknessBackend(make_spec(cell_diameter_px=14.0)), cell_diameter_px="auto", batch_size=5)
    run_folder(segmenter, find_images([discs]), tmp_path / "out")
    for row in rows(tmp_path / "out/images.csv"):
        if row["status"] == "done":
            alone = segmenter(np.asarray(Image.open(discs / row["image"])))
            assert np.array_equal(np.asarray(Image.open(tmp_path / f"out/labels/{row['image']}.tif")), alone.labels)
            assert (row["cells"], row["scale"]) == (str(alone.count), f"{alone.scale:.4f}")


@pytest.mark.reliability
def test_the_shipped_model_gives_the_same_whatever_shares_its_batches(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for index, size_hw in enumerate([(1, 1), (13, 500), (260, 300), (500, 640), (300, 900)]):
        params = SmearParams(size_hw=size_hw, n_cells=size_hw[0] * size_hw[1] // 20_000)
        save(tmp_path / "in" / f"{index}.png", make_smear(params, seed=index).image_hwc)
    (tmp_path / "in" / "damaged.png").write_bytes((tmp_path / "in" / "3.png").read_bytes()[:-30])

    def open_segmenter(batch_size: int) -> Segmenter:
        return Segmenter.load(
            engine=EngineOptions(backend="onnxruntime", threads=1 + batch_size % 2), scale=None, batch_size=batch_size
        )

    settings = [(1, 1), (4, 2), (16, 4)]
    expect_same_results(open_segmenter, tmp_path / "in", tmp_path, settings)
    assert sum(int(row["cells"] or 0) for row in rows(tmp_path / "1-1" / "images.csv")) > 15


def test_small_images_fill_batches_together(tmp_path: Path) -> None:
    for index in range(24):
        save(tmp_path / "in" / f"{index:02}.png", draw_discs((40, 50), [(20, 20 + index % 3)]))

    class Slow(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            time.sleep(0.1)
            return super()._predict(tiles_nhwc)

    backend = Slow()
    summary = run_folder(Segmenter(backend, batch_size=8), find_images([tmp_path / "in"]), tmp_path / "out")
    assert summary.cells == 24
    assert sum(backend.batches) == 24
    assert len(backend.batches) <= 12, backend.batches
    assert 0.1 * len(backend.batches) <= summary.engine_seconds <= summary.wall_seconds
    assert 0 < summary.engine_busy < 1


# --- failures


class FailingOnEmpty(DarknessBackend):
    """Raises ``error`` for a batch with a field without a cell: the third image of ``four``."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(make_spec(tile_size=224, halo=0))
        self.error = error

    def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
        if (tiles_nhwc == 230).all(axis=(1, 2, 3)).any():
            raise self.error
        return super()._predict(tiles_nhwc)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory.*`batch_size=1`"),
        (DataError("NaN or infinity"), "^NaN or infinity"),
        (ZeroDivisionError("oh"), "internal error.*ZeroDivisionError: oh"),
    ],
)
def test_an_error_of_one_image_is_recorded(
    four: Path, tmp_path: Path, error: Exception, words: str, batch_size: int
) -> None:
    summary = run_folder(Segmenter(FailingOnEmpty(error), batch_size=batch_size), find_images([four]), tmp_path / "out")
    assert (summary.done, summary.failed) == (3, 1)
    assert re.search(words, rows(tmp_path / "out/images.csv")[2]["error"])


def test_nan_in_one_image_of_a_batch_is_that_images(four: Path, tmp_path: Path) -> None:
    class NotANumber(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            answers = super()._predict(tiles_nhwc)
            answers[(tiles_nhwc == 230).all(axis=(1, 2, 3))] = np.nan
            return answers

    segmenter = Segmenter(NotANumber(make_spec(tile_size=224, halo=0)))
    run_folder(segmenter, find_images([four]), tmp_path / "out")
    table = rows(tmp_path / "out/images.csv")
    assert [(row["status"], row["cells"]) for row in table] == [
        *(("done", "3"), ("done", "3"), ("failed", ""), ("done", "1")),
    ]
    assert "NaN" in table[2]["error"]


@pytest.mark.parametrize(
    "error", [OutputError("disk full"), ModelError("no sigmoid"), BackendUnavailableError("gone"), KeyboardInterrupt()]
)
def test_an_error_of_the_run_stops_it_but_keeps_what_is_done(four: Path, tmp_path: Path, error: BaseException) -> None:
    """One helper and one tile a call, so that the two images before are through the network when it breaks."""
    segmenter = Segmenter(FailingOnEmpty(error), batch_size=1)
    with pytest.raises(type(error)) as caught:
        run_folder(segmenter, find_images([four]), tmp_path / "out", threads=ThreadPlan(None, helpers=1))
    assert caught.value is error
    check_stopped_after_two(tmp_path / "out")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("of the caller"), SystemExit(9)])
def test_an_error_of_the_caller_keeps_what_is_done(four: Path, tmp_path: Path, error: BaseException) -> None:
    told: list[str] = []

    def on_result(result: ImageResult) -> None:
        told.append(result.image)
        if len(told) == 2:
            raise error

    with pytest.raises(type(error)) as caught:
        run_folder(Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out", on_result=on_result)
    assert caught.value is error
    check_stopped_after_two(tmp_path / "out")


def check_stopped_after_two(out: Path) -> None:
    assert [row["image"] for row in rows(out / "images.csv")] == ["a.png", "b.png"]
    assert len(rows(out / "cells.csv")) == 6
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "stopped"
    assert record["totals"]["remaining"] == 2
    assert sorted(path.name for path in (out / "labels").iterdir()) == ["a.png.tif", "b.png.tif"]
    assert not list(out.rglob("*cellseg*"))


def test_failed_overlay_leaves_no_label_file(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("no encoder")

    monkeypatch.setattr("cellseg_deploy.outputs.overlay.encode", fail)
    summary = run_folder(Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out")
    assert summary.failed == 4
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {*ALWAYS, "journal.jsonl", "run.json"}


def test_a_file_that_cannot_be_written_takes_those_before_it_along(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = commit.write_bytes

    def write(path: Path, content: bytes) -> None:
        if path.name == "b.png.jpg":
            raise OutputError("disk full")
        original(path, content)

    monkeypatch.setattr(commit, "write_bytes", write)
    with pytest.raises(OutputError, match="disk full"):
        run_folder(Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/labels").iterdir()] == ["a.png.tif"]
    assert [row["image"] for row in rows(tmp_path / "out/images.csv")] == ["a.png"]


def test_tables_are_written_before_threads_are_waited_for(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of a large network lasts; whoever ended the run may not wait that long before a kill."""
    order: list[str] = []
    leave, stop, original = Overlapped.__exit__, Overlapped.stop, session.run_json

    def stop_noted(self: Any) -> None:
        order.append("stop")
        stop(self)

    def exit_noted(self: Any, *error: Any) -> None:
        order.append("threads")
        leave(self, *error)

    def run_json(*args: Any, **settings: Any) -> bytes:
        order.append(settings["status"])
        return original(*args, **settings)

    monkeypatch.setattr(Overlapped, "__exit__", exit_noted)
    monkeypatch.setattr(Overlapped, "stop", stop_noted)
    monkeypatch.setattr(session, "run_json", run_json)

    def on_result(_: ImageResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out", on_result=on_result)
    assert order == ["running", "stop", "stopped", "threads", "stop"]


def test_a_signal_while_an_image_is_written_waits_for_its_record(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = commit.write_bytes

    def write(path: Path, content: bytes) -> None:
        original(path, content)
        if path.name == "b.png.tif":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commit, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out")
    check_stopped_after_two(tmp_path / "out")
    assert (tmp_path / "out/overlays/b.png.jpg").is_file()


def test_libraries_have_one_thread_during_a_run(four: Path, tmp_path: Path) -> None:
    import cv2

    before, seen = cv2.getNumThreads(), []
    cv2.setNumThreads(2)
    try:
        run_folder(
            Segmenter(DarknessBackend()),
            find_images([four]),
            tmp_path / "out",
            on_result=lambda _: seen.append(cv2.getNumThreads()),
        )
        assert (seen, cv2.getNumThreads()) == ([1] * 4, 2)
    finally:
        cv2.setNumThreads(before)


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToDoError):
        run_folder(Segmenter(DarknessBackend()), [], tmp_path / "out")


# --- what is written, and how much is on its way


def test_memory_is_planned_by_the_size_that_headers_declare(discs: Path, tmp_path: Path) -> None:
    images = [
        *find_images([discs]),
        FoundImage(discs / "5.png", "linked", problem="a link that leads outside the folder"),
    ]
    work = ImageWork(Segmenter(DarknessBackend()), RunOptions(), ())
    planned = {image.name: work.bytes_in_flight(image) for image in images}
    assert planned["5.png"] == 100 * 130 * (3 + 4 + 3 + 4)
    assert planned["linked"] == 0  # it is not even opened
    half = Segmenter(DarknessBackend(make_spec(variant="boundary")), scale=0.5)
    assert half.bytes_in_flight(1000) == 7000 + 250 * (3 + 8)


def test_another_output_needs_one_entry(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(found: SegmentedImage) -> bytes:
        return f"{found.name} {found.labels.max()} {sorted(found.columns)[0]}".encode()

    count = formats.Format("counts", "number of cells", "counts", ".txt", "encoders:count")
    monkeypatch.setattr(encoders, "count", encode, raising=False)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, count))
    run_folder(
        Segmenter(DarknessBackend()), find_images([four]), tmp_path / "out", options=RunOptions(save=("counts",))
    )
    assert (tmp_path / "out/counts/d.png.txt").read_text() == "d.png 1 area_px"
    assert not (tmp_path / "out/labels").exists()


def test_share_of_time_that_the_engine_was_busy() -> None:
    assert RunSummary(output=Path(), wall_seconds=4.0, engine_seconds=3.0).engine_busy == 0.75
    assert RunSummary(output=Path()).engine_busy == 0.0


def test_a_pixel_size_that_no_cell_has_gives_no_micrometres(tmp_path: Path) -> None:
    """The file's own is not used, the user's is: both are doubted in words. Discs are 14 px wide."""
    import tifffile

    (tmp_path / "in").mkdir()
    disc = draw_discs((40, 40), [(20, 20)])
    tifffile.imwrite(tmp_path / "in/a.tif", disc, photometric="rgb", resolution=(2400, 2400), resolutionunit="INCH")
    for out, given, size in (("file", None, ""), ("given", 65.0, "65")):
        options = RunOptions(reading=ReadOptions(pixel_size_um=given))
        run_folder(Segmenter(DarknessBackend()), find_images([tmp_path / "in"]), tmp_path / out, options=options)
        (row,) = rows(tmp_path / out / "images.csv")
        assert "the median cell would be" in row["warning"]
        assert row.get("pixel_size_um", "") == size
        assert bool(row.get("counted_per_mm2")) == bool(size)


def disc_image(size: int, pitch: int, diameter: int) -> np.ndarray:
    image = np.full((size, size, 3), 255, np.uint8)
    for row in range(pitch, size - pitch // 2, pitch):
        for column in range(pitch, size - pitch // 2, pitch):
            cv2.circle(image, (column, row), diameter // 2, (0, 0, 0), -1)
    return image


def scales_of(out: Path) -> dict[str, str]:
    return {row["image"]: row["scale"] for row in rows(out / "images.csv")}


def test_each_group_is_measured_once_and_the_run_keeps_it(tmp_path: Path) -> None:
    """A folder of cells twice as wide has a scale of its own; images that come later do not change what was found."""
    folder, out, told = tmp_path / "in", tmp_path / "out", list[str]()
    save(folder / "a/1.png", disc_image(200, 40, 28))
    save(folder / "b/1.png", disc_image(400, 80, 56))
    save(folder / "b/2.png", disc_image(400, 80, 56))

    def run(out: Path, options: RunOptions | None = None) -> None:
        segmenter = Segmenter(DarknessBackend(make_spec(cell_diameter_px=14.0)), cell_diameter_px="auto")
        run_folder(segmenter, find_images([folder]), out, options=options, on_scale=told.append)

    run(out)
    first = scales_of(out)
    assert first["b/1.png"] == first["b/2.png"]
    assert float(first["a/1.png"]) == pytest.approx(2 * float(first["b/1.png"]), rel=0.1)
    assert [line.partition(":")[0] for line in told] == ["a", "b"]
    assert "cells are 28 px wide (1 image measured): scale 0.5" in told[0]
    told.clear()
    save(folder / "b/3.png", disc_image(400, 40, 28))  # measured anew, the group would have another scale
    run(out)
    assert scales_of(out) == {**first, "b/3.png": first["b/1.png"]}
    journal = (out / "journal.jsonl").read_bytes()
    (out / "journal.jsonl").write_bytes(journal.replace(b'"kind":"scale"', b'"kind":"SCALE"'))
    save(folder / "b/4.png", disc_image(400, 40, 28))
    run(out)
    assert scales_of(out)["b/4.png"] == first["b/1.png"]  # a damaged line is made up for by run.json
    (folder / "b/4.png").unlink()
    known = json.loads((out / "run.json").read_text())["settings"]["scales"]
    for path in folder.glob("b/[12].png"):
        path.unlink()
    run(tmp_path / "like", RunOptions(scales=known))
    assert told == []
    assert scales_of(tmp_path / "like") == {"a/1.png": first["a/1.png"], "b/3.png": first["b/1.png"]}


def test_measuring_takes_few_tiles_however_many_images_there_are(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / "in" / f"{index:02}.png", disc_image(400, 80, 56))
    backend = DarknessBackend(make_spec(cell_diameter_px=14.0))
    segmenter = Segmenter(backend, cell_diameter_px="auto")
    segmenter.find_scale(read_image(path).pixels_hwc for path in sorted((tmp_path / "in").iterdir()))
    assert sum(backend.batches) <= 16  # two crops at each of six scales, and four to refine the diameter
