"""``cellseg-infer`` again, into a folder where somebody edited results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from PIL import Image
from running import infer, results

from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import run_folder
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
    assert infer(smears / "a.jpg", "-o", out, "--model", model, "-q") == 0  # a.png is not given: its row stays
    assert label in capsys.readouterr().err
    assert results(out) == expected | {label: edited}
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
