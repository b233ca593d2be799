"""``cellseg-evaluate`` with a model that tells classes apart: which cells are judged, and the score of each class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cell_classes import Cell, class_onnx, save_field
from PIL import Image

from cellseg_deploy.annotations.class_score import class_pairs, names_in_file
from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate import command
from cellseg_deploy.errors import UsageError

# None at the border, where boxes count neither way.
CELLS: tuple[Cell, ...] = (
    ("red", 20, 20, 10),
    ("red", 50, 50, 10),
    ("red", 20, 60, 10),
    ("white", 75, 24, 14),
    ("platelet", 100, 60, 5),
    ("platelet", 80, 80, 5),
)
CALLED = {"red": "RBC", "white": "WBC", "platelet": "Platelets"}


@pytest.fixture
def folder(tmp_path: Path, onnx_file: Callable[..., Path]) -> Path:
    """Images, masks of all cells, and boxes in which the second red cell is called a white one."""
    pytest.importorskip("onnxruntime")
    save_field(tmp_path / "images" / "a.png", CELLS)
    rows = ["image,class,x0,y0,x1,y1"]
    mask = np.zeros((100, 120), np.uint8)
    y, x = np.mgrid[:100, :120]
    for number, (name, centre_x, centre_y, radius) in enumerate(CELLS, start=1):
        called = "WBC" if number == 2 else CALLED[name]
        box = (centre_x - radius, centre_y - radius, centre_x + radius + 1, centre_y + radius + 1)
        rows.append(f"a.png,{called},{','.join(map(str, box))}")
        mask[(x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2] = number
    (tmp_path / "boxes.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    (tmp_path / "counts.csv").write_text("image,count\na,4\n")
    onnx_file(model=class_onnx(), name="classes.onnx")
    return tmp_path


def evaluate(folder: Path, *more: object, code: int = 0, file: str = "metrics.json") -> Any:
    given = (
        "--model",
        folder / "classes.onnx",
        "--images",
        folder / "images",
        "--scale",
        1,
        "-o",
        folder / "out",
        *more,
    )
    assert console.run(command, [str(argument) for argument in given]) == code
    return json.loads((folder / "out" / file).read_text("utf-8")) if code == 0 else None


def test_each_class_has_its_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(folder, "--boxes", folder / "boxes.csv", "--classes", "red=RBC,white=WBC,platelet=Platelets")
    assert (found["f1"], found["n_true"], found["n_predicted"]) == (1, 6, 6)
    red, white, platelet = (found["of_model"][name] for name in ("red", "white", "platelet"))
    # The cell that is called RBC here and WBC there is an invention of the one class and missed in the other.
    assert (red["marked"], red["precision"], red["recall"], red["f1"]) == (["RBC"], 2 / 3, 1, 0.8)
    assert (white["marked"], white["precision"], white["recall"], white["n_true"]) == (["WBC"], 1, 0.5, 2)
    assert (platelet["f1"], platelet["n_true"]) == (1, 2)
    assert found["classes"] == ["RBC", "WBC", "Platelets"]
    assert found["model"]["classes"] == ["red", "white", "platelet"]
    assert "f1 0.8000   precision 0.6667, recall 1.0000 (3 found, 2 marked as RBC)" in capsys.readouterr().out


def test_classes_that_do_not_count_are_judged_neither_way(folder: Path) -> None:
    found = evaluate(folder, "--boxes", folder / "boxes.csv", "--classes", "red=RBC,white=WBC", "-q")
    assert (found["f1"], found["n_true"], found["n_predicted"]) == (1, 4, 4)
    assert list(found["of_model"]) == ["red", "white"]
    named = evaluate(folder, "--boxes", folder / "boxes.csv", "--classes", "RBC,WBC", "-q")
    assert (named["f1"], named["n_true"], named["n_predicted"]) == (1, 4, 4)
    assert "of_model" not in named


def test_names_that_the_file_and_the_model_share_need_not_be_said(folder: Path) -> None:
    boxes = (folder / "boxes.csv").read_text()
    for ours, theirs in CALLED.items():
        boxes = boxes.replace(theirs, ours)
    (folder / "same.csv").write_text(boxes)
    found = evaluate(folder, "--boxes", folder / "same.csv", "-q")
    assert (found["f1"], found["n_true"], found["n_predicted"]) == (1, 4, 4)  # without platelets on both sides
    assert found["of_model"]["platelet"]["f1"] == 1
    assert found["of_model"]["red"]["f1"] == 0.8


def test_a_class_of_the_model_may_be_several_of_the_file(folder: Path) -> None:
    found = evaluate(folder, "--boxes", folder / "boxes.csv", "--classes", "red=RBC,red=WBC", "-q")
    assert (found["n_true"], found["n_predicted"]) == (4, 3)  # of the white cells one is called red
    assert found["of_model"]["red"]["marked"] == ["RBC", "WBC"]
    assert (found["of_model"]["red"]["precision"], found["of_model"]["red"]["recall"]) == (1, 3 / 4)


def test_points_have_classes_too(folder: Path) -> None:
    rows = [f"a,{CALLED[name]},{x},{y}" for name, x, y, _ in CELLS]
    (folder / "points.csv").write_text("\n".join(["image,class,x,y", *rows]) + "\n")
    found = evaluate(folder, "--points", folder / "points.csv", "--classes", "platelet=Platelets", "-q")
    assert (found["f1"], found["n_true"], found["of_model"]["platelet"]["f1"]) == (1, 2, 1)


def test_masks_and_counts_are_compared_with_the_classes_that_count(folder: Path) -> None:
    masks = ("--masks", folder / "masks", "--min-area", 0, "-q")
    assert evaluate(folder, *masks)["n_predicted"] == 4
    assert evaluate(folder, *masks, "--classes", "red,white,platelet")["f1"] == 1
    assert evaluate(folder, *masks, "--classes", "white")["n_predicted"] == 1
    counts = ("--counts", folder / "counts.csv", "-q")
    assert evaluate(folder, *counts, file="agreement.json")["found"] == 4
    assert evaluate(folder, *counts, "--classes", "platelet", file="agreement.json")["found"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--boxes", "boxes.csv", "--classes", "blue=RBC"], "has no class blue; it has red, white, platelet"),
        (["--boxes", "boxes.csv", "--classes", "red=nobody"], "no boxes of class nobody"),
        (["--masks", "masks", "--classes", "blue"], "has no class 'blue'"),
        (["--calibrate", "--masks", "masks", "--classes", "red"], "No such option '--classes'"),
    ],
)
def test_classes_that_do_not_fit(
    folder: Path, more: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    evaluate(folder, *more, code=2)
    assert words in capsys.readouterr().err


def test_label_images_have_no_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--labels", folder / "masks", "--boxes", folder / "boxes.csv", "-o", folder / "out"]
    assert console.run(command, [*map(str, given), "--classes", "red=RBC"]) == 2
    assert "label images have none" in capsys.readouterr().err
    assert console.run(command, [*map(str, given), "--classes", "RBC", "-q"]) == 0


def test_pairs_of_names() -> None:
    known, marks = ("red", "white", "platelet"), ("RBC", "WBC", "white")
    assert class_pairs(("white=WBC", "red = RBC"), known, marks) == {"red": ("RBC",), "white": ("WBC",)}
    assert class_pairs(("RBC", "white"), known, marks) == {"white": ("white",)}
    assert class_pairs((), known, marks) == {"white": ("white",)}
    assert class_pairs(("red=RBC", "red=WBC"), known, marks) == {"red": ("RBC", "WBC")}
    assert class_pairs((), (), marks) == {}
    assert names_in_file(("red = RBC", "WBC")) == ("RBC", "WBC")
    with pytest.raises(UsageError, match="has no class blue; it has none"):
        class_pairs(("blue=RBC",), (), marks)
