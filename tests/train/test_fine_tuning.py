"""README's first training command: the network that ships goes on learning, at the tile size of a training."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cellseg_deploy.cli import console
from cellseg_deploy.models import default_weights_path
from cellseg_deploy.samples import write_samples
from cellseg_train import run as train_run
from cellseg_train.checkpoint import load_network
from cellseg_train.cli import command

README = Path(__file__).parents[2] / "README.md"
CELLS_PX = 82.0
SHORT = ["--epochs", "1", "--patches-per-image", "4", "--batch-size", "4", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on and one to validate on; cells of ``CELLS_PX``."""
    folder = tmp_path_factory.mktemp("smears")
    write_samples(folder, 3, 5, (300, 400))
    return folder


@pytest.fixture(scope="module")
def taught_px() -> float:
    """Cells that the shipped network was trained on, in model px."""
    return load_network(default_weights_path()).spec.cell_diameter_px


def fine_tune(smears: Path, run: Path, *more: str) -> int:
    folders = ["--images", str(smears / "images"), "--masks", str(smears / "masks")]
    return console.run(command, [*folders, "-o", str(run), "--weights", "shipped", *SHORT, *more])


def test_the_first_training_command_of_the_readme_is_a_fine_tuning() -> None:
    commands = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("cellseg-train ")]
    assert "--weights shipped" in commands[0]
    assert "--cell-diameter" in commands[0]


def test_the_shipped_network_goes_on_from_what_it_knows(
    smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], taught_px: float
) -> None:
    """One epoch from scratch has Dice 0 here. Tiles of another size: the position embedding is resampled."""
    run, shipped = tmp_path / "run", load_network(default_weights_path())
    scale = f"{taught_px / CELLS_PX:.3f}"
    assert fine_tune(smears, run, "--image-scale", scale, "--tile-size", "168", "--no-calibrate") == 0
    assert "warning" not in capsys.readouterr().err
    with (run / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["val_dice"]) > 0.9
    assert float(row["val_f1"]) > 0.8
    tuned = load_network(run)
    assert tuned.config.tile_size == tuned.spec.tile_size == 168 != shipped.config.tile_size
    assert tuned.spec.weights.origin.startswith(f"fine-tuned from {shipped.spec.name}")
    before = safetensors.torch.load_file(default_weights_path())
    after = safetensors.torch.load_file(run / "model.safetensors")
    assert not torch.equal(before["decoder.head.weight"], after["decoder.head.weight"])
    assert before["encoder.pos_embed"].shape[1] != after["encoder.pos_embed"].shape[1]


def test_cells_of_another_size_are_refused_before_anything_is_written(
    smears: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], taught_px: float
) -> None:
    run = tmp_path / "run"
    assert fine_tune(smears, run, "--image-scale", f"{taught_px / CELLS_PX / 4:.3f}") == 2
    said = capsys.readouterr().err
    assert f"px for the network, but --weights shipped was trained on {taught_px:.0f} px; give --image-scale 0." in said
    assert not run.exists()


@pytest.mark.parametrize("quiet", [False, True])
def test_cells_of_a_doubtful_size_are_warned_of_and_trained(
    smears: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    taught_px: float,
    quiet: bool,
) -> None:
    trained = []
    monkeypatch.setattr(train_run, "_train", lambda run, *_: trained.append(run))
    run = tmp_path / "run"
    scale = f"{taught_px / CELLS_PX / 2:.3f}"
    assert fine_tune(smears, run, "--image-scale", scale, *(["-q"] if quiet else [])) == 0
    assert "warning: cells are " in (said := capsys.readouterr().err)
    assert f"its weights were trained on {taught_px:.0f} px; give --image-scale 0." in said
    assert trained == [run]
    assert not quiet or len(said.splitlines()) == 1
