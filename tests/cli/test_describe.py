"""``cellseg-evaluate --describe``: compared with the model's training images, which it can write into the model."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from conftest import draw_discs, make_onnx, make_spec
from PIL import Image
from test_evaluate import evaluate, write

from cellseg_deploy.cli.describe import _speck_px
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.models.safetensors_file import read_weights_file
from cellseg_deploy.models.spec import DATA_SUMMARY_VERSION, METADATA_KEY, DataSummary, Spread, TrainingInfo, to_json

CENTRES = [(15.0 + 20 * i, 15.0 + 20 * j) for i in range(4) for j in range(3)]
SPEC = make_spec(cell_diameter_px=14.0, training=TrainingInfo(n_train_images=3, val_metrics={"f1": 0.9}))


@pytest.fixture
def smears(tmp_path: Path) -> Path:
    """train/ and dark/: three pictures each of twelve discs, the second in half the light."""
    for folder, light in (("train", 1.0), ("dark", 0.5)):
        for name in "abc":
            image = draw_discs((80, 95), CENTRES, radius=7)
            mask = np.where(image[..., 0] < 200, 255, 0).astype(np.uint8)
            write(tmp_path / folder / "images" / f"{name}.png", (image * light).astype(np.uint8))
            write(tmp_path / folder / "masks" / f"{name}.png", mask)
    return tmp_path


@pytest.fixture
def model(onnx_file: Callable[..., Path]) -> Path:
    return onnx_file(model=make_onnx(SPEC))


def describe(folder: Path, model: Path, out: Path, *more: object) -> int:
    places = ["--images", folder / "images", "--masks", folder / "masks", "--model", model, "-o", out]
    return evaluate("--describe", *places, "--min-area", 50, *more)


def test_training_images_are_written_into_the_model_and_others_compared_with_them(
    smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = smears / "new" / "described.onnx"
    assert describe(smears / "train", model, described) == 0
    assert "images   3 of the 3 it was trained on, 36 cells" in capsys.readouterr().out
    before, after = read_model_file(model), read_model_file(described)
    assert after.identity == before.identity
    summary = after.spec.training.data_summary
    assert summary is not None
    assert (summary.version, summary.n_images, summary.n_cells) == (DATA_SUMMARY_VERSION, 3, 36)
    training = msgspec.structs.replace(after.spec.training, data_summary=None)
    assert msgspec.structs.replace(after.spec, training=training) == before.spec

    assert describe(smears / "train", described, smears / "same") == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "note" not in said.err
    assert "outside" not in said.out
    assert describe(smears / "dark", described, smears / "dark-out") == 0
    said = capsys.readouterr()
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning")]
    assert "the background, so light or camera, differs from the training images: lightness" in warning
    (line,) = [line for line in said.out.splitlines() if line.startswith("lightness of the background")]
    assert line.endswith("outside")
    record = json.loads((smears / "dark-out" / "data.json").read_text())
    light = record["alignment"]["field_lightness"]
    assert (light["outside"], light["odd_images"]) == (True, ["a", "b", "c"])
    assert light["training"] == record["training"]["data_summary"]["values"]["field_lightness"]
    assert light["here"]["median"] < light["range"][0]
    assert record["alignment"]["stain_green"]["outside"] is False
    assert record["warnings"] == [warning.removeprefix("warning: ")]
    assert sorted(path.name for path in (smears / "dark-out").iterdir()) == ["data.csv", "data.json", "data.png"]


@pytest.mark.parametrize("masks", [True, False])
def test_specks_are_judged_by_the_cells_size(
    smears: Path, model: Path, masks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Discs of 154 px: a fixed limit of 200 px would take all of them for specks."""
    out = smears / "about"
    truth = ["--masks", smears / "train/masks"] if masks else ["--backend", "onnxruntime"]
    assert evaluate("--describe", "--images", smears / "train/images", *truth, "--model", model, "-o", out) == 0
    assert json.loads((out / "data.json").read_text())["n_cells"] == 36
    assert ("objects under 4 px" in capsys.readouterr().out) == masks


def test_the_limit_without_masks_follows_the_scale() -> None:
    spec = msgspec.structs.replace(SPEC, min_object_rel=0.1)
    assert _speck_px(spec, 1.0, None) == round(0.1 * 153.9)
    assert _speck_px(spec, 0.5, None) == round(0.1 * 615.8)
    assert _speck_px(msgspec.structs.replace(SPEC, cell_diameter_px=102.0), 1.0, None) == 200
    assert _speck_px(spec, 0.5, 7) == 7


def test_a_model_that_says_nothing_is_said_to(smears: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(smears / "dark", model, smears / "out", "-q") == 0
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("note: the model stub has no description of its training images")
    record = json.loads((smears / "out" / "data.json").read_text())
    assert record["training"]["data_summary"] is None
    assert record["alignment"]["field_lightness"]["outside"] is None
    assert record["warnings"][-1] == line.removeprefix("note: ")


def test_a_safetensors_model_is_described_too(smears: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = smears / "model.safetensors"
    safetensors.numpy.save_file({"w": np.arange(3.0)}, weights, {METADATA_KEY: to_json(SPEC)})
    identity = read_weights_file(weights).identity
    assert describe(smears / "train", weights, smears / "x.onnx") == 2
    assert "ending in .safetensors as" in capsys.readouterr().err
    assert describe(smears / "train", weights, weights, "-q") == 0  # in place
    found = read_weights_file(weights)
    assert found.identity == identity
    assert found.spec.training.data_summary is not None
    assert describe(smears / "dark", weights, smears / "out", "-q") == 0
    assert "the background" in capsys.readouterr().err


def test_what_cannot_be_training_images_is_refused(
    smears: Path, onnx_file: Callable[..., Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = smears / "out.onnx"
    small = onnx_file(model=make_onnx(make_spec(training=TrainingInfo(n_train_images=2))), name="small.onnx")
    assert describe(smears / "train", small, out) == 2
    assert "3 images, but stub was trained on 2" in capsys.readouterr().err
    assert evaluate("--describe", "--images", smears / "train" / "images", "--model", model, "-o", out) == 2
    assert "give their --masks DIR too" in capsys.readouterr().err
    assert describe(smears / "train", model, smears / "train" / "masks" / "m.onnx") == 2
    assert "is in the folder of images or masks" in capsys.readouterr().err
    other = onnx_file(model=make_onnx(SPEC, contrast=9.0), name="other.onnx")
    kept = other.read_bytes()
    assert describe(smears / "train", model, other) == 6
    assert "a different network" in capsys.readouterr().err
    (smears / "notes.onnx").write_text("mine")
    assert describe(smears / "train", model, smears / "notes.onnx") == 6
    assert "not a cellseg model file" in capsys.readouterr().err
    assert not out.exists()
    assert other.read_bytes() == kept


def test_fewer_images_than_were_trained_on_are_counted(
    smears: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for n, words in ((5, "3 of the 5 it was trained on, 36 cells"), (0, "3, 36 cells")):
        file = onnx_file(model=make_onnx(make_spec(training=TrainingInfo(n_train_images=n))), name=f"{n}.onnx")
        assert describe(smears / "train", file, smears / f"out{n}.onnx") == 0
        assert f"images   {words}" in capsys.readouterr().out


def test_pixel_sizes_of_the_files_are_listed(smears: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (smears / "train" / "images").iterdir():
        with Image.open(path) as image:
            image.load()
            image.save(path, dpi=(127_000, 127_000))  # 0.2 micrometres
    assert describe(smears / "train", model, smears / "out") == 0
    said = capsys.readouterr().out
    assert "resolution in the files: PNG 0.2 µm/px in 3" in said
    assert "; 2.8 µm from file tags" in said
    record = json.loads((smears / "out" / "data.json").read_text())
    assert record["um_per_px"] == pytest.approx(0.2, rel=1e-3)
    with (smears / "out" / "data.csv").open(newline="") as file:
        assert [row["resolution"] for row in csv.DictReader(file)] == ["PNG 0.2 µm/px"] * 3


@pytest.mark.parametrize("option", [("--scale", "1"), ("--task", "counting"), ("--backend", "onnxruntime")])
def test_settings_of_a_model_that_is_not_run_are_refused(
    option: tuple[str, str], smears: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe(smears / "train", model, smears / "out", *option) == 2
    assert f"{option[0]} and --masks exclude each other" in capsys.readouterr().err


def spread(**values: Any) -> TrainingInfo:
    numbers = {"median": 1.0, "p05": 0.5, "p95": 2.0} | values
    return TrainingInfo(
        data_summary=DataSummary(version=1, n_images=1, n_cells=1, values={"covered": Spread(**numbers)})
    )


@pytest.mark.parametrize("values", [{"p05": 1.5}, {"p95": 0.9}, {"p95": 1e999}])
def test_a_summary_that_cannot_be_meant_is_refused(
    values: dict[str, float], onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], smears: Path
) -> None:
    path = onnx_file(model=make_onnx(make_spec(training=spread(**values))))
    assert describe(smears / "train", path, smears / "out") == 5
    assert "invalid model metadata" in capsys.readouterr().err


def test_models_made_before_there_was_a_summary_still_load(onnx_file: Callable[..., Path]) -> None:
    proto = make_onnx(SPEC)
    entry = next(entry for entry in proto.metadata_props if entry.key == METADATA_KEY)
    content = json.loads(entry.value)
    del content["training"]["data_summary"]
    entry.value = json.dumps(content)
    assert read_model_file(onnx_file(model=proto)).spec == SPEC
