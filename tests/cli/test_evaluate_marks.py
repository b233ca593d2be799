"""``cellseg-evaluate --boxes`` and ``--points`` from arguments to files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import draw_discs

from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate import command


def evaluate(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


@pytest.fixture
def smear(tmp_path: Path) -> Path:
    image = draw_discs((80, 90), [(20.0, 20.0), (60.0, 30.0)])
    for name, pixels in (("images", image), ("labels", np.where(image[..., 0] < 200, 255, 0).astype(np.uint8))):
        (tmp_path / name).mkdir()
        assert cv2.imwrite(str(tmp_path / name / "a.png"), pixels)
    (tmp_path / "b.csv").write_text("image,class,x0,y0,x1,y1\na.png,RBC,10,10,31,31\na.png,WBC,20,50,40,70\n")
    (tmp_path / "p.csv").write_text("image,x,y\na,20,20\na,60,30\n")
    return tmp_path


@pytest.mark.parametrize("by_model", [False, True])
def test_boxes(by_model: bool, smear: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    judged = ["--model", onnx_file(), "--images", smear / "images"] if by_model else ["--labels", smear / "labels"]
    assert evaluate(*judged, "--boxes", smear / "b.csv", "-o", smear / "out") == 0
    result = json.loads((smear / "out" / "metrics.json").read_text("utf-8"))
    assert (result["n_true"], result["n_predicted"], result["f1"]) == (2, 2, 1 / 2)
    assert result["by_class"]["WBC"] == {"n": 1, "found": 0, "recall": 0, "pieces": 0}
    said = capsys.readouterr()
    assert "1 image, 2 boxes (RBC 1, WBC 1)" in said.out + said.err
    assert len((smear / "out" / "metrics.csv").read_text("utf-8").splitlines()) == 2


def test_the_scale_of_linked_images_is_measured_once(smear: Path, onnx_file: Callable[..., Path]) -> None:
    (smear / "linked").mkdir()
    (smear / "linked" / "a.png").symlink_to(smear / "images" / "a.png")
    judged = ["--model", onnx_file(), "--images", smear / "linked", "--boxes", smear / "b.csv"]
    assert evaluate(*judged, "-o", smear / "out", "-q") == 0
    model = json.loads((smear / "out" / "metrics.json").read_text("utf-8"))["model"]
    assert model["scale"] == "measured"
    assert len(model["measured_scales"]) == 1


def test_points(smear: Path) -> None:
    assert evaluate("--labels", smear / "labels", "--points", smear / "p.csv", "-o", smear / "out", "-q") == 0
    assert json.loads((smear / "out" / "metrics.json").read_text("utf-8"))["f1"] == 1


@pytest.mark.parametrize("by_model", [False, True])
def test_objects_without_a_point_count_neither_way(
    by_model: bool, smear: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (smear / "one.csv").write_text("image,x,y\na,20,20\n")
    judged = ["--model", onnx_file(), "--images", smear / "images"] if by_model else ["--labels", smear / "labels"]
    common = [*judged, "--points", smear / "one.csv", "-o", smear / "out", "-q"]
    for more, n_predicted in (([], 2), (["--unmarked", smear / "labels"], 1)):
        assert evaluate(*common, *more) == 0
        result = json.loads((smear / "out" / "metrics.json").read_text("utf-8"))
        assert (result["n_true"], result["n_predicted"]) == (1, n_predicted)
    assert result["data"]["unmarked"] == str(smear / "labels")
    (smear / "other").mkdir()
    assert cv2.imwrite(str(smear / "other" / "b.png"), np.zeros((80, 90), np.uint8))
    assert evaluate(*common, "--unmarked", smear / "other") == 3
    assert "a.png: no mask or label image of the same name" in capsys.readouterr().err
    assert cv2.imwrite(str(smear / "other" / "a.png"), np.zeros((80, 80), np.uint8))
    assert evaluate(*common, "--unmarked", smear / "other") == 3
    assert "80 x 80 px, expected 90 x 80 px like a.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--unmarked", "images"],
        ["--masks", "labels"],
        ["--anatomy"],
        ["--count-rule", "frame"],
        ["--classes", "nobody"],
    ],
)
def test_what_does_not_go_together_is_refused(more: list[str], smear: Path) -> None:
    assert evaluate("--labels", smear / "labels", "--boxes", smear / "b.csv", "-o", smear / "out", *more) == 2


def test_figures_of_an_earlier_evaluation_go(smear: Path) -> None:
    common = ["--labels", smear / "labels", "-o", smear / "out", "-q"]
    assert evaluate(*common, "--masks", smear / "labels", "--anatomy") == 0
    assert (smear / "out" / "anatomy.csv").exists()
    assert evaluate(*common, "--points", smear / "p.csv") == 0
    assert sorted(path.name for path in (smear / "out").iterdir()) == ["metrics.csv", "metrics.json"]
