"""``cellseg-evaluate`` from its arguments to its files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from conftest import draw_discs, make_spec, run_obeying_permissions

from cellseg_deploy.cli import console
from cellseg_deploy.cli.evaluate import command
from cellseg_deploy.evaluate.score import CSV_COLUMNS

METRICS = [
    *("dice", "iou", "f1", "precision", "recall", "map", "pq_strict"),
    *("count_mae", "count_bias", "count_mape"),
    *("f1_apart", "precision_apart", "recall_apart", "count_mae_apart", "count_bias_apart", "count_mape_apart"),
    *("f1_inner", "precision_inner", "recall_inner", "map_inner"),
    *("count_mae_inner", "count_bias_inner", "count_mape_inner", "dice_inner"),
    *("merges", "splits", "n_images", "n_true", "n_predicted", "n_clumps", "n_border"),
]
CENTRES: dict[str, list[tuple[float, float]]] = {"a": [(20, 20), (60, 30), (40, 60)], "b": [(30, 40)], "empty": []}


def evaluate(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


def report(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text("utf-8"))
    return result


def write(path: Path, pixels: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


@pytest.fixture
def smears(tmp_path: Path) -> Path:
    """images/*.png with dark discs of radius 10 and masks/*.png with the same discs in white."""
    for name, centres in CENTRES.items():
        image = draw_discs((80, 90), centres)
        write(tmp_path / "images" / f"{name}.png", image)
        write(tmp_path / "masks" / f"{name}.png", np.where(image[..., 0] < 200, 255, 0).astype(np.uint8))
    return tmp_path


def test_a_model_that_is_right(
    smears: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx_file()
    out = smears / "out"
    assert evaluate("--model", model, "--images", smears / "images", "--masks", smears / "masks", "-o", out) == 0
    result = report(out)
    assert list(result)[: len(METRICS)] == METRICS
    assert (result["f1"], result["dice"], result["n_images"], result["n_true"]) == (1, 1, 3, 4)
    assert result["model"]["name"] == "stub"
    assert result["model"]["operating_point"]["method"] == "threshold"
    assert len(result["model"]["model_identity"]) == 64
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(CSV_COLUMNS)
    assert [(row[0], row[8]) for row in rows[1:]] == [("a", "3"), ("b", "1"), ("empty", "0")]
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "metrics.json"]
    assert "1.0000" in capsys.readouterr().out


def test_saved_labels_give_the_same_metrics(smears: Path, onnx_file: Callable[..., Path]) -> None:
    """One disc is missing in the truth, so that there is something to count wrong."""
    write(smears / "masks" / "b.png", np.zeros((80, 90), np.uint8))
    common = ["--masks", smears / "masks", "-q", "-o"]
    first, second = smears / "first", smears / "second"
    assert evaluate("--model", onnx_file(), "--images", smears / "images", "--save-labels", *common, first) == 0
    assert tifffile.imread(first / "labels" / "a.tif").max() == 3
    assert evaluate("--labels", first / "labels", *common, second) == 0
    by_model, by_labels = report(first), report(second)
    assert [by_model[key] for key in METRICS] == [by_labels[key] for key in METRICS]
    assert (by_labels["precision"], by_labels["count_bias"], by_labels["merges"]) == (3 / 4, 1 / 3, 0)
    assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()


def test_label_images_of_another_tool(smears: Path) -> None:
    """Two cells of image a merged by the tool; label numbers with gaps, 32 bit, stored as a.png.tif."""
    labels = np.zeros((80, 90), np.uint32)
    labels[draw_discs((80, 90), CENTRES["a"][:2])[..., 0] < 200] = 70_000
    labels[draw_discs((80, 90), CENTRES["a"][2:])[..., 0] < 200] = 9
    (smears / "tool").mkdir()
    tifffile.imwrite(smears / "tool" / "a.png.tif", labels)
    for name in ("b", "empty"):
        (smears / "masks" / f"{name}.png").rename(smears / f"{name}.png")
    assert evaluate("--labels", smears / "tool", "--masks", smears / "masks", "-o", smears / "out") == 0
    result = report(smears / "out")
    assert (result["n_true"], result["n_predicted"], result["merges"], result["splits"]) == (3, 2, 1, 0)
    assert (result["f1"], result["dice"]) == (4 / 5, 1)  # one match is exact, the other at IoU 1/2 counts
    assert "model" not in result


def test_nothing_there_and_nothing_found_is_perfect(smears: Path) -> None:
    for name in ("a", "b"):
        (smears / "masks" / f"{name}.png").unlink()
    assert evaluate("--labels", smears / "masks", "--masks", smears / "masks", "-o", smears / "out", "-q") == 0
    result = report(smears / "out")
    assert (result["f1"], result["dice"], result["count_mae"], result["count_mape"]) == (1, 1, 0, None)


def test_what_counts_as_a_true_cell_does_not_depend_on_the_model(smears: Path, onnx_file: Callable[..., Path]) -> None:
    """The discs have 317 px, 2.45 % of that are 8; at twice the model's scale it would be 32."""
    model = onnx_file(make_spec(image_scale=0.5, cell_diameter_px=20.0))
    common = ["--model", model, "--images", smears / "images", "--masks", smears / "masks", "-q", "-o"]
    out = smears / "out"
    assert evaluate(*common, out) == 0
    assert report(out)["min_area_px"] == 8
    for scale in ("0.25", "1"):
        assert evaluate(*common, out, "--scale", scale) == 0
        assert (report(out)["min_area_px"], report(out)["n_true"]) == (8, 4)
    assert evaluate(*common, out, "--cell-diameter", "20", "--min-area", "400") == 0
    assert (report(out)["min_area_px"], report(out)["n_true"]) == (400, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--images DIR"),
        (("--images", "images", "--labels", "images"), "exclude each other"),
        (("--labels", "images", "--scale", "1"), "--scale and --labels"),
        (("--labels", "images", "--model", "m.onnx"), "--model and --labels"),
        (("--labels", "images", "--save-labels"), "--save-labels and --labels"),
        (("--labels", "nowhere"), "nowhere"),
        (("--labels", "images", "--min-area", "-1"), "min-area"),
    ],
)
def test_what_cannot_be_meant_ends_with_2(
    smears: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(smears)
    assert evaluate(*arguments, "--masks", "masks", "-o", "out") == 2
    assert message in capsys.readouterr().err
    assert not (smears / "out").exists()


@pytest.mark.parametrize("out", ["masks", "images/out", "."])
def test_output_inside_the_input_ends_with_2(
    smears: Path, out: str, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--images", smears / "images", "--masks", smears / "masks"]
    assert evaluate("--model", onnx_file(), *inputs, "-o", smears / out) == 2
    assert "contain each other" in capsys.readouterr().err


def test_files_that_do_not_fit_end_with_3_and_are_named(
    smears: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = smears / "out"
    arguments = ["--model", onnx_file(), "--images", smears / "images", "--masks", smears / "masks", "-o", out]
    write(smears / "masks" / "b.png", np.zeros((80, 91), np.uint8))
    assert evaluate(*arguments) == 3
    said = capsys.readouterr().err
    assert "masks/b.png" in said
    assert "images/b.png" in said
    assert evaluate("--labels", smears / "images", *arguments[4:]) == 3
    assert "in colour" in capsys.readouterr().err
    (smears / "masks" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert evaluate(*arguments) == 3
    assert "b.png" in capsys.readouterr().err
    (smears / "masks" / "b.png").unlink()
    assert evaluate(*arguments) == 3
    assert "b.png" in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.fixture
def negatives(smears: Path) -> Path:
    """The masks of ``smears`` black on white, without the one that is empty."""
    for kind in ("images", "masks"):
        (smears / kind / "empty.png").unlink()
    for name in ("a", "b"):
        path = smears / "masks" / f"{name}.png"
        write(path, 255 - np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    return smears


@pytest.mark.parametrize("extra", [[], ["--anatomy"], ["--sweep"], ["--calibrate"], ["--describe"]], ids=str)
def test_masks_that_are_negatives_stop_every_evaluation(
    negatives: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    out = negatives / ("out.onnx" if extra in (["--calibrate"], ["--describe"]) else "out")
    data = ("--model", onnx_file(), "--images", negatives / "images", "--masks", negatives / "masks")
    assert evaluate(*data, "-o", out, *extra) == 3
    assert "a.png: one object touches all four sides" in capsys.readouterr().err
    assert not (out if out.suffix else out / "metrics.json").exists()


def test_masks_that_are_said_to_be_negatives_are_read(negatives: Path, onnx_file: Callable[..., Path]) -> None:
    data = ("--model", onnx_file(), "--images", negatives / "images", "--masks", negatives / "masks")
    assert evaluate(*data, "-o", negatives / "out", "--mask-foreground", "dark") == 0
    result = report(negatives / "out")
    assert (result["f1"], result["n_true"], result["mask_foreground"]) == (1, 4, "dark")


@pytest.mark.parametrize("truth", ["masks", "counts", "points"])
def test_negatives_of_smears_are_said(
    smears: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], truth: str
) -> None:
    if truth == "counts":
        pytest.importorskip("matplotlib")
    path = smears / "images" / "a.png"
    write(path, 255 - np.asarray(cv2.imread(str(path))))
    (smears / "counts.csv").write_text("image,count\na.png,3\nb.png,1\nempty.png,0\n")
    (smears / "points.csv").write_text("image,class,x,y\na.png,c,20,20\nb.png,c,30,40\n")
    given = smears / ("masks" if truth == "masks" else f"{truth}.csv")
    arguments = ("--model", onnx_file(), "--images", smears / "images", f"--{truth}", given, "-o", smears / "out")
    assert evaluate(*arguments, "--scale", 1) == 0
    assert "warning: negative, 1 image: a" in capsys.readouterr().err
    name = "agreement.json" if truth == "counts" else "metrics.json"
    found = json.loads((smears / "out" / name).read_text("utf-8"))["warnings"]
    assert found["negative"]["images"] == 1
    assert "dark field, fluorescence or a negative?" in found["negative"]["first"]["warning"]


def test_no_image_ends_with_4(smears: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (smears / "none").mkdir()
    assert evaluate("--labels", smears / "none", "--masks", smears / "masks", "-o", smears / "out") == 4
    assert "no image found" in capsys.readouterr().err


def test_a_missing_model_ends_with_5_and_an_unusable_output_with_6(
    smears: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["--images", smears / "images", "--masks", smears / "masks"]
    assert evaluate("--model", smears / "no.onnx", *inputs, "-o", smears / "out") == 5
    assert "no.onnx" in capsys.readouterr().err
    (smears / "file").write_text("")
    assert evaluate("--labels", smears / "masks", *inputs[2:], "-o", smears / "file") == 6


def test_an_unusable_output_folder_is_found_before_any_work(
    smears: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cellseg_deploy.evaluate import score
    from cellseg_deploy.files.lock import exclusive

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(score, "score_pairs", work)
    out = smears / "out"
    arguments = ["--labels", smears / "masks", "--masks", smears / "masks", "-o", out]
    out.mkdir()
    for name in ("metrics.json", "metrics.csv"):
        (out / name).write_text('{"program": "another one", "f1": 0.9}')
        assert evaluate(*arguments) == 6
        assert f"{name}: not written by cellseg-evaluate" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).unlink()
    with exclusive(out):
        assert evaluate(*arguments) == 7


def test_a_read_only_output_folder_ends_with_6(smears: Path) -> None:
    """Before any work: the mask that would end it with 3 is not even read."""
    (smears / "masks" / "a.png").write_bytes(b"")
    (smears / "out").mkdir(mode=0o555)
    done = run_obeying_permissions(
        "evaluate", "--labels", smears / "masks", "--masks", smears / "masks", "-o", smears / "out"
    )
    assert done.returncode == 6, done.stderr
    assert "Permission denied" in done.stderr


def test_earlier_metrics_of_ours_are_replaced(smears: Path) -> None:
    arguments = ["--labels", smears / "masks", "--masks", smears / "masks", "-q", "-o", smears / "out"]
    assert evaluate(*arguments) == 0
    assert evaluate(*arguments, "--min-area", "400") == 0
    assert report(smears / "out")["n_true"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [("", "describe"), ("score", "metrics.json"), ("calibrate", "calibration.json"), ("describe", "data.json")],
)
def test_help_loads_no_heavy_module(command: str, words: str) -> None:
    code = (
        "import sys; from cellseg_deploy.cli import console as _common, evaluate; "
        "code = _common.run(evaluate.command, [*sys.argv[1:], '--help']); "
        "heavy = {'numpy', 'cv2', 'onnxruntime', 'torch', 'scipy', 'skimage', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.real
def test_masks_of_the_photographs_judged_by_themselves(real_data: Path, tmp_path: Path) -> None:
    """Perfect, and with the number of cells that the data's own table lists."""
    masks = real_data / "bbbc041seg" / "val" / "masks"
    assert evaluate("--labels", masks, "--masks", masks, "-o", tmp_path / "out", "-q") == 0
    with (real_data / "bbbc041seg" / "images.csv").open(encoding="utf-8", newline="") as file:
        stems = {path.stem for path in masks.iterdir()}
        listed = sum(int(row["n_components"]) for row in csv.DictReader(file) if row["stem"] in stems)
    result = report(tmp_path / "out")
    assert (result["f1"], result["map"], result["dice"], result["n_images"]) == (1, 1, 1, 10)
    assert result["n_true"] == listed


def test_the_scale_is_measured_once_for_images_of_one_size(
    tmp_path: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The cells of one image alone are too few to measure."""
    model, centres = onnx_file(make_spec(cell_diameter_px=10.0)), [(20.0, 20.0), (60.0, 30.0)]
    for name in ("a", "b", "c"):
        write(tmp_path / "images" / f"{name}.png", draw_discs((80, 90), centres))
        write(tmp_path / "masks" / f"{name}.png", 255 * (draw_discs((80, 90), centres)[..., 0] < 200).astype(np.uint8))
    common = ["--model", model, "--images", tmp_path / "images", "--masks", tmp_path / "masks", "-o", tmp_path / "out"]
    assert evaluate(*common) == 0
    assert "90 x 80 px: cells are 18 px wide (3 images measured): scale 0.55" in capsys.readouterr().err
    about = report(tmp_path / "out")["model"]
    assert about["scale"] == "measured"
    assert about["measured_scales"] == [pytest.approx(0.55, abs=0.01)]
    assert evaluate(*common, "--scale", 1) == 0
    assert (report(tmp_path / "out")["model"]["scale"], report(tmp_path / "out")["model"]["measured_scales"]) == (1, [])
