"""Going on with a run: what is done is not done again, what is not is, and the end is the same."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs, make_spec
from PIL import Image
from running import results, rows, save

from cellseg_deploy.errors import OutputError, OutputInUseError
from cellseg_deploy.files import fingerprint
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run import commit, resume
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.folder import ImageResult, RunOptions, RunSummary, plan_folder, run_folder
from cellseg_deploy.run.journal import JOURNAL
from cellseg_deploy.run.output_folder import ALWAYS
from cellseg_deploy.run.record import Inputs
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")


def run(folder: Path, out: Path, *, worked: list[str] | None = None, **settings: Any) -> RunSummary:
    """A run over ``folder``; the names of images that were worked on are added to ``worked``."""
    options = RunOptions(**{name: settings.pop(name) for name in list(settings) if name in RunOptions.__annotations__})

    def on_result(result: ImageResult) -> None:
        if worked is not None:
            worked.append(result.image)

    return run_folder(
        Segmenter(DarknessBackend(), **settings), find_images([folder]), out, options=options, on_result=on_result
    )


def lines(out: Path) -> list[str]:
    """Images of the journal, in its order."""
    content = map(json.loads, (out / JOURNAL).read_text().splitlines())
    return [line["image"] for line in content if line["kind"] == "image"]


def test_all_done_is_done(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "bad.png").unlink()
    first = run(folder, out)
    before = results(out)
    worked: list[str] = []
    second = run(folder, out, worked=worked)
    assert (second.found, second.done, second.skipped, second.failed, second.remaining) == (4, 0, 4, 0, 0)
    assert (second.cells, second.counted) == (first.cells, first.counted) == (7, 7)
    assert worked == []
    assert results(out) == before
    totals = json.loads((out / "run.json").read_text())["totals"]
    assert (totals["done"], totals["remaining"], totals["cells"]) == (4, 0, 7)


def test_failed_images_are_tried_again(folder: Path, tmp_path: Path) -> None:
    out, worked = tmp_path / "out", list[str]()
    assert run(folder, out).failed == 1
    shutil.copy(folder / "a.png", folder / "bad.png")
    summary = run(folder, out, worked=worked)
    assert worked == ["bad.png"]
    assert (summary.done, summary.skipped, summary.failed) == (1, 4, 0)
    assert lines(out) == ["a.png", "b.png", "bad.png", "c.png", "d.png", "bad.png"]
    run(folder, tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


CHANGES: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "nothing": (lambda folder, out: None, []),
    "label file gone": (lambda folder, out: (out / "labels/b.png.tif").unlink(), ["b.png"]),
    "overlay cut": (lambda folder, out: (out / "overlays/b.png.jpg").write_bytes(b""), ["b.png"]),
    "all labels gone": (lambda folder, out: shutil.rmtree(out / "labels"), ["a.png", "b.png", "c.png", "d.png"]),
    "tables gone": (lambda folder, out: [(out / f"{name}.csv").unlink() for name in ("cells", "images")], []),
    "run.json gone": (lambda folder, out: (out / "run.json").unlink(), []),
    "last line torn": (lambda folder, out: tear(out / JOURNAL, "d.png"), ["d.png"]),
    "line gone, its files there": (lambda folder, out: drop(out / JOURNAL, "b.png"), ["b.png"]),
}


def drop(journal: Path, image: str) -> None:
    kept = [line for line in journal.read_bytes().splitlines(True) if f'"image":"{image}"'.encode() not in line]
    journal.write_bytes(b"".join(kept))


def tear(journal: Path, image: str) -> None:
    """As if the process had been killed while it wrote the line of ``image``."""
    lines = journal.read_bytes().splitlines(True)
    (line,) = (line for line in lines if f'"image":"{image}"'.encode() in line)
    journal.write_bytes(b"".join(other for other in lines if other is not line) + line[:-10])


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_missing_is_made_again_and_the_end_is_the_same(folder: Path, tmp_path: Path, case: str) -> None:
    out, worked = tmp_path / "out", list[str]()
    run(folder, out)
    expected = results(out)
    change, again = CHANGES[case]
    change(folder, out)
    run(folder, out, worked=worked)
    assert [name for name in worked if name != "bad.png"] == again
    assert results(out) == expected


@pytest.mark.parametrize("stop_after", [1, 3])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_stopped_and_gone_on_gives_the_same_bytes(folder: Path, tmp_path: Path, stop_after: int, order: str) -> None:
    """With every kind of file, in other batches, other threads and another order of the images."""
    options = RunOptions(save=("labels", "numbered", "confluence", "geojson"), reading=ReadOptions(pixel_size_um=0.25))
    images = find_images([folder])
    run_folder(Segmenter(DarknessBackend(), batch_size=1), images, tmp_path / "whole", options=options)
    if order == "shuffled":
        random.Random(stop_after).shuffle(images)
    told: list[str] = []

    def stop(result: ImageResult) -> None:
        told.append(result.image)
        if len(told) == stop_after:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend(), batch_size=5), images, out, options=options, on_result=stop)
    assert [row["image"] for row in rows(out / "images.csv")] == sorted(told)
    again: list[str] = []
    run_folder(
        Segmenter(DarknessBackend(), batch_size=16),
        images,
        out,
        options=options,
        on_result=lambda result: again.append(result.image),
    )
    assert not set(again) & (set(told) - {"bad.png"})
    assert results(out) == results(tmp_path / "whole")


def test_images_given_one_by_one_end_as_all_at_once(folder: Path, tmp_path: Path) -> None:
    images = find_images([folder])
    run(folder, tmp_path / "whole")
    for count in range(1, len(images) + 1):
        summary = run_folder(Segmenter(DarknessBackend()), images[count - 1 : count], tmp_path / "out")
        assert summary.found == 1
    assert summary.others == 4
    assert [row["image"] for row in rows(tmp_path / "out/images.csv") if row["status"] == "failed"] == ["bad.png"]
    run(folder, tmp_path / "out")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_rows_of_images_that_are_not_passed_stay(folder: Path, tmp_path: Path) -> None:
    """Whatever became of the images and of their files; a failed one too."""
    out = tmp_path / "out"
    run(folder, out)
    table = (out / "images.csv").read_bytes()
    for name in ("a.png", "b.png", "bad.png"):
        (folder / name).unlink()
    (out / "labels/b.png.tif").unlink()
    kept = results(out)
    for _ in range(2):
        summary = run(folder, out)
        assert (summary.found, summary.skipped, summary.others) == (2, 2, 3)
        assert results(out) == kept
    assert kept["images.csv"] == table


def test_files_of_images_that_are_not_passed_are_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(folder, out)
    real, hashed = resume.sha256_of, list[str]()
    monkeypatch.setattr(resume, "sha256_of", lambda path: (hashed.append(path.name), real(path))[1])
    run_folder(Segmenter(DarknessBackend()), find_images([folder / "a.png"]), out)
    assert sorted(hashed) == ["a.png.jpg", "a.png.tif"]


def test_finished_images_that_can_no_longer_be_read_are_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is gone, of one the server says nothing, one may not be read; one that is gone lost a file too."""
    out, images = tmp_path / "out", find_images([folder])
    run(folder, out)
    expected = results(out)
    (folder / "a.png").unlink()
    (folder / "d.png").unlink()
    (out / "labels/d.png.tif").unlink()
    images = [replace(image, problem="a link" if image.name == "c.png" else "") for image in images]
    real = fingerprint.sha256_of

    def stale(path: Path) -> str:
        if path == folder / "b.png":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(fingerprint, "sha256_of", stale)
    segmenter = Segmenter(DarknessBackend())
    planned = plan_folder(segmenter, images, out)
    assert planned.counts == {"work": 2, "skip": 3, "fail": 0}
    told: list[str] = []
    summary = run_folder(segmenter, images, out, on_result=lambda result: told.append(result.image))
    assert told == ["bad.png", "d.png"]
    assert (summary.found, summary.done, summary.skipped, summary.failed, summary.others) == (5, 0, 3, 2, 0)
    assert "3 finished images can no longer be read (a.png, b.png, c.png)" in caplog.text
    assert {(row["image"], row["status"]) for row in rows(out / "images.csv")} == {
        *((f"{name}.png", "done") for name in "abc"),
        *((f"{name}.png", "failed") for name in ("bad", "d")),
    }
    kept = {name: data for name, data in expected.items() if "/d.png" not in name and name not in ALWAYS}
    assert kept.items() <= results(out).items()
    assert not list(out.glob("*/d.png*"))


def test_a_changed_image_that_now_fails_leaves_nothing_that_looks_like_a_result(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    (folder / "a.png").write_bytes(b"<html>")
    assert run(folder, out).failed == 2
    assert not list(out.glob("*/a.png*"))
    assert rows(out / "images.csv")[0]["status"] == "failed"
    assert "a.png" not in {row["image"] for row in rows(out / "cells.csv")}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "confluence"}, "`task`"),
    "scale": ({"scale": 0.5}, "`scale`"),
    "auto scale": ({"cell_diameter_px": "auto"}, "`cell_diameter_px`"),
    "halo": ({"halo": 4}, "`halo`"),
    "bit depth": ({"reading": ReadOptions(bit_depth=12)}, "`bit_depth`"),
    "pixel size": ({"reading": ReadOptions(pixel_size_um=0.1)}, "`pixel_size_um`"),
    "count rule": ({"count_rule": "frame"}, "`count_rule`"),
    "field of view": ({"field_of_view": "full"}, "`field`"),
}


def test_fewer_kinds_are_the_same_run_and_keep_its_files(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = results(out)
    assert run(folder, out, save=("labels",)).done == 0
    assert results(out) == before


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused_and_says_in_what(folder: Path, tmp_path: Path, case: str) -> None:
    out = tmp_path / "out"
    run(folder, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    settings, argument = OTHERS[case]
    with pytest.raises(OutputError, match=f"{argument}.*there.*now.*`overwrite=True`") as caught:
        run(folder, out, **settings)
    assert caught.value.exit_code == 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run(folder, out, **settings, overwrite=True).done == 4
    run(folder, tmp_path / "whole", **settings)
    assert results(out) == results(tmp_path / "whole")


def test_another_engine_or_model_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    other = DarknessBackend()
    other.precision = "fp16"
    with pytest.raises(OutputError, match="`precision`"):
        run_folder(Segmenter(other), find_images([folder]), out)
    with pytest.raises(OutputError, match="model name"):
        run_folder(Segmenter(DarknessBackend(make_spec(name="another"))), find_images([folder]), out)


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"reading": ReadOptions(max_pixels=10**9)}])
def test_what_changes_no_result_may_differ(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out", **settings).skipped == 4


def test_another_folder_of_images_is_another_run(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    save(tmp_path / "in" / "other.png", draw_discs((40, 40), [(20, 20)]))
    with pytest.raises(OutputError, match="inputs"):
        run(tmp_path / "in", tmp_path / "out")


def test_one_writer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out"), pytest.raises(OutputInUseError):
        run(folder, tmp_path / "out")


def test_the_sum_is_checked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that loses an image breaks instead of ending well."""
    monkeypatch.setattr(RunSummary, "add", lambda self, result: None)
    with pytest.raises(RuntimeError, match="5 images found"):
        run(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "stopped"


def test_a_line_follows_the_files_it_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real_write, real_append = commit.write_bytes, journals.Journal.append

    def write(path: Path, content: bytes) -> None:
        real_write(path, content)
        seen.append(path.name)

    def append(self: Any, record: Any) -> Any:
        for file in record.outputs:
            assert (tmp_path / "out" / file.path).stat().st_size == file.size
        entry = real_append(self, record)
        seen.append(record.image)
        return entry

    monkeypatch.setattr(commit, "write_bytes", write)
    monkeypatch.setattr(journals.Journal, "append", append)
    run(folder, tmp_path / "out")
    assert seen[:3] == ["a.png.tif", "a.png.jpg", "a.png"]


def test_a_journal_that_cannot_be_written_leaves_no_file_of_its_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = journals.Journal.append

    def append(self: Any, record: Any) -> Any:
        if record.image == "b.png":
            raise OutputError("journal.jsonl: cannot be written (No space left on device)")
        return real(self, record)

    monkeypatch.setattr(journals.Journal, "append", append)
    with pytest.raises(OutputError, match="No space left"):
        run(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/labels").iterdir()] == ["a.png.tif"]
    assert [row["image"] for row in rows(tmp_path / "out/images.csv")] == ["a.png"]


def test_tables_that_cannot_be_written_do_not_hide_why_the_run_ended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("cells.csv: cannot be written")

    def stop(_: ImageResult) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commit.run_tables, "write", full)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        run_folder(Segmenter(DarknessBackend()), find_images([folder]), tmp_path / "out", on_result=stop)
    assert "cells.csv: cannot be written" in caplog.text
    monkeypatch.undo()
    assert run(folder, tmp_path / "out").skipped == 1


def test_a_plan_is_refused_where_the_run_would_be(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out", find_images([folder])
    run(folder, out)
    (out / "labels").rename(tmp_path / "elsewhere")
    (out / "labels").symlink_to(tmp_path / "elsewhere")
    for options in (RunOptions(), RunOptions(overwrite=True)):
        with pytest.raises(OutputError, match="labels: a link that leads outside the output folder"):
            plan_folder(Segmenter(DarknessBackend()), images, out, options=options)
        with pytest.raises(OutputError, match="labels: a link that leads outside the output folder"):
            run_folder(Segmenter(DarknessBackend()), images, out, options=options)


def test_a_plan_is_what_happens(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    images, segmenter = find_images([folder]), Segmenter(DarknessBackend())
    assert plan_folder(segmenter, images, out).counts == {"work": 5, "skip": 0, "fail": 0}
    assert not out.exists()
    run(folder, out)
    assert plan_folder(segmenter, images, out).counts == {"work": 1, "skip": 4, "fail": 0}
    options = RunOptions(overwrite=True)
    assert plan_folder(segmenter, images, out, options=options).counts == {"work": 5, "skip": 0, "fail": 0}
    with pytest.raises(OutputError, match="`task`"):
        plan_folder(Segmenter(DarknessBackend(), task="confluence"), images, out)
    assert results(out)["images.csv"]


def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"sm\xffears")
    save(folder / "a.png", draw_discs((40, 40), [(20, 20)]))
    out = tmp_path / "out"
    assert run(folder, out).done == 1
    assert run(folder, out).skipped == 1
    recorded = json.loads((out / "run.json").read_text())["inputs"]["paths"]
    assert [Path(path) for path in recorded] == [folder]


def test_inputs_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", draw_discs((40, 40), [(20, 20)]))
    assert Inputs.of([Path("a.png")]) == Inputs((str(tmp_path / "a.png"),), (str(tmp_path),))


def test_the_pixel_size_of_each_image_and_who_says_so(tmp_path: Path) -> None:
    import tifffile

    save(tmp_path / "in/plain.png", draw_discs((40, 40), [(20, 20)]))
    tifffile.imwrite(
        tmp_path / "in/known.tif",
        draw_discs((40, 40), [(20, 20)]),
        photometric="rgb",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    run(tmp_path / "in", tmp_path / "out")
    known, plain = rows(tmp_path / "out/images.csv")
    assert (known["pixel_size_um"], known["pixel_size_source"]) == ("0.5", "TIFF")
    assert (plain["pixel_size_um"], plain["pixel_size_source"]) == ("", "")
    run(tmp_path / "in", tmp_path / "given", reading=ReadOptions(pixel_size_um=0.25))
    for row in rows(tmp_path / "given/images.csv"):
        assert (row["pixel_size_um"], row["pixel_size_source"]) == ("0.25", "given")
    cell = rows(tmp_path / "given/cells.csv")[0]
    assert float(cell["area_um2"]) == pytest.approx(int(cell["area_px"]) / 16, abs=1e-4)
    assert np.asarray(Image.open(tmp_path / "given/labels/plain.png.tif")).max() == 1


def test_overwriting_leaves_no_file_of_the_earlier_run(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    run(folder, out, save=("labels", "parquet"))
    assert (out / "cells.parquet").exists()
    run(folder, out, save=("overlays",), overwrite=True)
    assert {path.name for path in out.iterdir()} == {*ALWAYS, "journal.jsonl", "overlays", "run.json"}


def test_files_that_somebody_put_beside_the_results_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folder, out)
    theirs = ["labels/a_corrected.tif", "labels/a.png_corrected.tif", "rois/mine.zip", "coco.json", "confluence/a.csv"]
    for name in theirs:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"work")
    run(folder, out)
    (out / "labels/b.png.tif").unlink()
    run(folder, out)
    run(folder, out, overwrite=True)
    assert {(out / name).read_bytes() for name in theirs} == {b"work"}


def test_files_without_a_line_are_gone_before_work_begins(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the tables that tell of the results before."""
    out, seen = tmp_path / "out", list[set[str]]()
    run(folder, out)
    drop(out / JOURNAL, "b.png")
    real = Segmenter.overlapped

    def overlapped(self: Segmenter, *arguments: Any) -> Any:
        seen.append({path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()})
        return real(self, *arguments)

    monkeypatch.setattr(Segmenter, "overlapped", overlapped)
    run(folder, out)
    assert len(seen) == 1
    assert "labels/a.png.tif" in seen[0]
    assert not seen[0] & {"labels/b.png.tif", "overlays/b.png.jpg", "cells.csv", "images.csv"}
    assert {"cells.csv", "images.csv"} <= {path.name for path in out.iterdir()}


def test_a_journal_cannot_make_a_run_write_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    run(folder, out)
    content = journals.read(out / JOURNAL)
    (record,) = journals.whole_records(out / JOURNAL, [content.entries["a.png"]])
    with journals.Journal.resume(content) as journal:
        journal.append(replace(record, output_name="../../escaped", outputs=()))
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
    run(folder, out)
    assert not list(tmp_path.rglob("*escaped*"))
    assert (out / "labels/a.png.tif").exists()


def test_a_run_with_nothing_to_do_takes_time_too(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.png").unlink()
    run(folder, tmp_path / "out")
    assert run(folder, tmp_path / "out").wall_seconds > 0
