"""``cellseg-infer`` again, into a folder where somebody edited results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from PIL import Image
from running import infer, results, rows

from cellseg_deploy.errors import OutputError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run import commit
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter


@pytest.fixture
def out(model: Path, smears: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    assert infer(smears, "-o", tmp_path / "out", "--model", model, "-q") == 0
    return tmp_path / "out"


def erase_a_cell(out: Path) -> bytes:
    """In the label image of a.png, as a user does who corrects it; gives the file's new content."""
    path = out / "labels/a.png.tif"
    labels = np.asarray(Image.open(path)).copy()
    labels[labels == 1] = 0
    Image.fromarray(labels).save(path)
    return path.read_bytes()


def test_an_edited_file_is_kept_and_named(
    model: Path, smears: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, label = results(out), "labels/a.png.tif"
    edited = erase_a_cell(out)
    assert infer(smears, "-o", out, "--model", model, "--dry-run") == 0
    assert f"done   a.png ({label} edited since the run, kept)" in capsys.readouterr().out
    for _ in range(2):
        assert infer(smears, "-o", out, "--model", model) == 0
        said = capsys.readouterr()
        assert f"edited since the run, and kept: {label};" in said.err
        assert "edited   1 file, kept" in said.out
        assert results(out) == expected | {label: edited}
        assert json.loads((out / "run.json").read_text())["edited"] == [label]
    (out / "overlays/a.png.jpg").unlink()
    assert infer(smears, "-o", out, "--model", model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["edited"] == [label]
    assert results(out) == expected | {label: edited}
    assert infer(smears / "sub", "-o", out, "--model", model, "-q") == 6  # names would begin elsewhere
    capsys.readouterr()
    assert infer(smears / "a.jpg", "-o", out, "--model", model, "-q") == 0  # a.png is not passed: its row stays
    assert results(out) == expected | {label: edited}
    assert json.loads((out / "run.json").read_text())["edited"] == [label]
    assert infer(smears, "-o", out, "--model", model, "-q", "--overwrite") == 0
    assert results(out) == expected
    assert json.loads((out / "run.json").read_text())["edited"] == []


def test_an_edited_file_makes_way_for_one_of_a_changed_image(
    model: Path, smears: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(out)
    for number in (1, 2):
        edited = erase_a_cell(out)
        Image.fromarray(draw_discs((50, 50), [(20, 20)] * number)).resize((50 + number, 50)).save(smears / "a.png")
        assert infer(smears, "-o", out, "--model", model, "-q") == 0
        assert f"a.png.tif: was edited since the run; kept as a.png.edited-{number}.tif" in capsys.readouterr().err
        assert (out / f"labels/a.png.edited-{number}.tif").read_bytes() == edited
        assert results(out)["labels/a.png.tif"] not in (edited, before["labels/a.png.tif"])
    edited = erase_a_cell(out)
    (smears / "a.png").write_bytes(b"no image any more")
    assert infer(smears, "-o", out, "--model", model, "-q") == 3
    assert not (out / "labels/a.png.tif").exists()
    assert (out / "labels/a.png.edited-3.tif").read_bytes() == edited


def test_an_edited_file_of_an_image_that_now_fails_is_kept(smears: Path, tmp_path: Path) -> None:
    """It lost another file, and the image is gone: nothing is left that looks like a result."""
    images, out = find_images([smears]), tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), images, out)
    edited = erase_a_cell(out)
    (out / "overlays/a.png.jpg").unlink()
    (smears / "a.png").unlink()
    summary = run_folder(Segmenter(DarknessBackend()), images, out)
    assert (summary.failed, summary.edited_files) == (1, [])
    assert [path.name for path in out.glob("*/a.png*")] == ["a.png.edited-1.tif"]
    assert (out / "labels/a.png.edited-1.tif").read_bytes() == edited


EDITS: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "a cell taken out": ("cells", lambda lines: lines[:-1]),
    "all of an image taken out": ("images", lambda lines: [line for line in lines if "a.png" not in line]),
    "a number": ("images", lambda lines: [line.replace("done,3", "done,2") for line in lines]),
    "a column more": ("cells", lambda lines: [f"{line},x" for line in lines]),
    "a row more": ("images", lambda lines: [*lines, lines[-1]]),
    "another order": ("images", lambda lines: [lines[0], *lines[:0:-1]]),
}


@pytest.mark.parametrize("case", EDITS)
@pytest.mark.parametrize("has_work", [False, True])
def test_an_edited_table_is_kept_under_another_name(
    model: Path, smears: Path, out: Path, case: str, has_work: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = results(out)
    name, edit = EDITS[case]
    path = out / f"{name}.csv"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    edited = path.read_bytes()
    assert edited != expected[path.name]
    if has_work:
        (out / "labels/a.jpg.tif").unlink()
    for _ in range(2):
        assert infer(smears, "-o", out, "--model", model, "-q") == 0
        assert results(out) == expected | {f"{name}.edited-1.csv": edited}
    assert capsys.readouterr().err.count(f"kept as {name}.edited-1.csv") == 1


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_table_without_content_is_no_edited_one(
    model: Path, smears: Path, out: Path, make: Callable[[Path], object]
) -> None:
    expected = results(out)
    make(out / "cells.csv")
    assert infer(smears, "-o", out, "--model", model, "-q") == 0
    assert results(out) == expected


@pytest.mark.reliability
@pytest.mark.parametrize("has_work", [False, True])
def test_edited_files_of_the_whole_run_are_kept_under_another_name(
    smears: Path, tmp_path: Path, has_work: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("pycocotools", "pyarrow"):
        pytest.importorskip(module)
    images, out, options = find_images([smears]), tmp_path / "out", RunOptions(save=("labels", "coco", "parquet"))
    run_folder(Segmenter(DarknessBackend()), images, out, options=options)
    expected, edited = results(out), {}
    for name in ("coco.json", "cells.parquet", "images.csv"):
        edited[name] = expected[name] + b"\n"
        (out / name).write_bytes(edited[name])
    if has_work:
        (out / "labels/a.png.tif").unlink()
    asides = {name.replace(".", ".edited-1."): content for name, content in edited.items()}
    for _ in range(2):
        run_folder(Segmenter(DarknessBackend()), images, out, options=options)
        assert results(out) == expected | asides
    for name in edited:
        assert caplog.text.count(f"{name}: was edited since the run") == 1


def test_a_run_without_lines_of_files_is_resumed(smears: Path, tmp_path: Path) -> None:
    """A journal as earlier versions wrote it; tables that are what the journal gives are not taken for edited."""
    images, out = find_images([smears]), tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), images, out)
    expected, journal = results(out), out / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b'"kind":"file"' not in line))
    assert run_folder(Segmenter(DarknessBackend()), images, out).skipped == len(images)
    assert results(out) == expected
    assert journal.read_bytes().splitlines(keepends=True) == lines


def test_the_row_of_a_changed_image_is_the_one_before_until_its_new_result_is_there(
    smears: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are its files; where writing breaks off in the middle, no line vouches for what is left."""
    images, out = find_images([smears]), tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), images, out)
    before = results(out)
    Image.fromarray(draw_discs((40, 40), [(20, 20)])).save(smears / "a.png")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend()), images, out, on_plan=stop)
    assert results(out) == before
    real = commit.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == "a.png.jpg":
            raise OutputError("disk full")
        real(path, content)

    monkeypatch.setattr(commit, "write_bytes", full)
    with pytest.raises(OutputError, match="disk full"):
        run_folder(Segmenter(DarknessBackend()), images, out)
    row = next(row for row in rows(out / "images.csv") if row["image"] == "a.png")
    assert (row["status"], row["error"]) == ("failed", "changed, and not finished when the run ended")
    assert not (out / "labels/a.png.tif").exists()
    monkeypatch.undo()
    assert run_folder(Segmenter(DarknessBackend()), images, out).done == 1
    run_folder(Segmenter(DarknessBackend()), images, tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")
