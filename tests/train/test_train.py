"""cellseg-train from its command line: both variants learn, a killed run goes on as if nothing had been."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from small_encoders import shrink_encoders

from cellseg_deploy.cli import console
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.models.spec import DATA_SUMMARY_VERSION, default_operating_points
from cellseg_deploy.samples import write_samples
from cellseg_train import validate, weights
from cellseg_train.checkpoint import load_network, load_record
from cellseg_train.cli import command

FAST = [
    "--tile-size", "112", "--tiny-width", "48", "--tiny-depth", "2", "--decoder-channels", "32,24,16",
    "--image-skip", "16,16,16", "--batch-size", "8", "--patches-per-image", "8", "--image-scale", "0.4",
    "--lr", "3e-3", "--device", "cpu", "--threads", "1", "--ema-decay", "0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def smears(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smears")
    write_samples(folder, 4, 5, (300, 400))
    return folder


def train(*arguments: object) -> int:
    return console.run(command, [str(a) for a in arguments])


def inputs(smears: Path) -> list[str]:
    return ["--images", str(smears / "images"), "--masks", str(smears / "masks")]


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("variant", ["plain", "boundary", "distance"])
def test_a_variant_learns_and_leaves_a_whole_run(smears, tmp_path, variant):
    run = tmp_path / "run"
    assert train(*inputs(smears), "-o", run, "--variant", variant, "--epochs", 8, "--validate-every", 4, *FAST) == 0
    log = log_of(run)
    assert [int(row["epoch"]) for row in log] == list(range(1, 9))
    assert float(log[-1]["loss"]) < 0.7 * float(log[0]["loss"])
    assert float(log[-1]["val_dice"]) > 0.6
    rates = [float(row["lr"]) for row in log]
    assert rates == sorted(rates, reverse=True)  # the warm-up is over within the first epoch
    assert rates[-1] < 0.1 * rates[0]
    for channel in ("boundary", "distance"):
        assert (channel in log[0]) == (variant == channel)
    if variant != "plain":
        assert float(log[-1][variant]) < 0.8 * float(log[0][variant])
    loaded = load_network(run)
    assert loaded.spec.variant == variant
    assert loaded.spec.operating_points.keys() == {"counting", "confluence"}
    assert (loaded.spec.training.n_train_images, loaded.spec.training.n_val_images) == (3, 1)
    summary = loaded.spec.training.data_summary
    assert summary is not None
    assert (summary.version, summary.n_images) == (DATA_SUMMARY_VERSION, 3)
    scale = 0.4  # of FAST; the summary leaves out cells that the border cuts, the model's own diameter does not
    assert summary.values["diameter_px"].median * scale == pytest.approx(loaded.spec.cell_diameter_px, rel=0.1)
    assert summary.values["stain_green"].median > 0.1
    split = json.loads((run / "split.json").read_text())
    assert len(split["train"]) == 3
    assert split["sha256"] == loaded.spec.training.split_sha256
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["epoch_0004.jpg", "epoch_0008.jpg"]
    assert list((run / "tensorboard").iterdir())


def test_the_surface_loss_falls_and_an_uncalibrated_run_keeps_its_last_network(smears, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "calibrate", None)  # would fail if it were called
    run = tmp_path / "run"
    settings = ["--surface-weight", 1, "--no-calibrate", "--epochs", 6, "--validate-every", 2, *FAST]
    assert train(*inputs(smears), "-o", run, *settings) == 0
    surface = [float(row["surface"]) for row in log_of(run)]
    assert surface[-1] < surface[0] - 0.2
    spec = load_network(run).spec
    assert spec.training.epochs == 6
    assert spec.operating_points == default_operating_points("boundary")
    last = torch.load(run / "checkpoint.pt", weights_only=True)["ema"]
    assert torch.equal(last["decoder.head.weight"], load_network(run).net.decoder.head.weight)


def test_dinov3_learns_with_its_patch_of_16_and_slower_lower_blocks(smears, tmp_path, monkeypatch):
    """The real class with rotary positions and register tokens, made small."""
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    run = tmp_path / "run"
    settings = ["--encoder", "vit_small_patch16_dinov3", "--tile-size", "128", "--layer-decay", "0.7", "--epochs", "6"]
    assert train(*inputs(smears), "-o", run, *FAST, *settings, "--validate-every", "3") == 0
    log = log_of(run)
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert float(log[-1]["val_dice"]) > 0.5
    assert load_network(run).spec.patch_size == 16


def spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    code = "import sys; from cellseg_train.cli import main; sys.argv[0] = 'cellseg-train'; main()"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_killed_and_resumed_equals_uninterrupted(smears, tmp_path):
    arguments = [*inputs(smears), "--epochs", "5", "--validate-every", "2", "--drop-path", "0.2", *FAST]
    assert train(*arguments, "-o", tmp_path / "whole") == 0
    run = tmp_path / "killed"
    process = spawn([*arguments, "-o", str(run)])
    deadline = time.monotonic() + 120
    while not (run / "log.csv").exists() or len(log_of(run)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(log_of(run)) < 5
    assert train("--resume", run) == 0
    assert (run / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    whole, resumed = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not list(run.glob(".cellseg-*"))  # what the kill tore is gone, and the lock


def test_same_seed_same_losses_other_seed_others(smears, tmp_path):
    def losses(name: str, seed: int) -> list[str]:
        assert train(*inputs(smears), "-o", tmp_path / name, "--epochs", 1, "--seed", seed, *FAST) == 0
        return [row["loss"] for row in log_of(tmp_path / name)]

    assert losses("a", 1) == losses("b", 1) != losses("c", 2)


def test_resume_refuses_a_changed_mask(tmp_path, capsys):
    folder = tmp_path / "data"
    write_samples(folder, 2, 5, (150, 150))
    run = tmp_path / "run"
    assert train(*inputs(folder), "-o", run, "--epochs", 1, *FAST) == 0
    before = (run / "model.safetensors").read_bytes()
    mask = next((folder / "masks").iterdir())
    cv2.imwrite(str(mask), cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)[::-1])
    assert train("--resume", run) == 5
    assert "not those it was started with" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == before


def test_a_bad_validation_mask_is_named_before_anything_is_written(smears, tmp_path, capsys):
    val = tmp_path / "val"
    write_samples(val, 2, 9, (150, 150))
    mask = sorted((val / "masks").iterdir())[1]
    cv2.imwrite(str(mask), cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)[:100])
    places = ["--val-images", val / "images", "--val-masks", val / "masks"]
    assert train(*inputs(smears), *places, "-o", tmp_path / "run", "--epochs", 1, *FAST) == 3
    assert mask.name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validating_on_training_images_is_refused(smears, tmp_path, capsys):
    same = ["--val-images", smears / "images", "--val-masks", smears / "masks"]
    assert train(*inputs(smears), *same, "-o", tmp_path / "run", "--epochs", 1, *FAST) == 2
    assert "also training images" in capsys.readouterr().err


def test_one_run_folder_has_one_training(smears, tmp_path):
    run = tmp_path / "run"
    assert train(*inputs(smears), "-o", run, "--epochs", 1, *FAST) == 0
    with exclusive(run):
        assert train("--resume", run) == 7


def test_resuming_needs_the_start_weights_no_more(smears, tmp_path):
    settings = [*inputs(smears), "--epochs", "1", *FAST]
    assert train(*settings, "-o", tmp_path / "mother") == 0
    start = tmp_path / "start.safetensors"
    (tmp_path / "mother" / "model.safetensors").rename(start)
    assert train(*settings, "-o", tmp_path / "child", "--weights", start) == 0
    start.unlink()
    assert train("--resume", tmp_path / "child") == 0
    assert "fine-tuned from" in load_network(tmp_path / "child").spec.weights.origin


def test_without_pytorch_the_extra_is_named(smears, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert train(*inputs(smears), "-o", tmp_path / "run") == 8
    assert "pip install 'cellseg-deploy[train]'" in capsys.readouterr().err


def test_a_run_killed_before_its_first_epoch_is_begun_again(smears, tmp_path):
    arguments = [*inputs(smears), "--epochs", "1", *FAST]
    assert train(*arguments, "-o", tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    assert train("--resume", killed) == 0
    assert (killed / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_freeze_leaves_the_encoder_as_it_was(smears, tmp_path):
    settings = [*inputs(smears), "--epochs", "1", *FAST]
    assert train(*settings, "-o", tmp_path / "free") == 0
    start = tmp_path / "free" / "model.safetensors"
    assert train(*settings, "-o", tmp_path / "frozen", "--freeze", "--weights", start) == 0
    before, after = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (start.parent, tmp_path / "frozen")
    )
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("encoder."))
    assert not torch.equal(before["decoder.head.weight"], after["decoder.head.weight"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give --images DIR"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{images}"], 6, "not an empty folder"),
        (["--resume", "{images}"], 2, "is not a training run"),
        (["--resume", "{images}", "-o", "x"], 2, "takes no folders, -o or settings"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--tile-size", "100"], 2, "multiple of 8"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--weights", "none.pth"], 2, "no such file"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--encoder", "what"], 2, "not known to timm"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--image-skip", "a,b"], 2, "list of numbers"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--device", "cuda:9"], 8, "not available"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--device", "foo"], 8, "not a PyTorch device"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--scale-jitter", "1"], 2, "two positive"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--tiny-heads", "5"], 2, "multiple of"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--dice-weight", "nan"], 2, "dice_weight"),
        (["--images", "{images}", "--masks", "{masks}", "-o", "{new}", "--clip-norm", "0"], 2, "clip_norm"),
        (["--images", "{images}", "--masks", "nowhere", "-o", "{new}"], 2, "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_ends_with_its_code_and_no_run(smears, tmp_path, capsys, arguments, code, message):
    places = {"images": smears / "images", "masks": smears / "masks", "new": tmp_path / "new"}
    assert train(*[argument.format(**places) for argument in arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("hf-hub:lab/net", 2, "could not be fetched from the hub"),
        ("{folder}/damaged.safetensors", 5, "not a readable safetensors file"),
        ("{folder}/other.pth", 5, "does not fit encoder"),
    ],
)
def test_weights_that_cannot_be_had_leave_no_run(smears, tmp_path, capsys, monkeypatch, source, code, message):
    def unreachable(_: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(weights, "load_state_dict_from_hf", unreachable)
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    torch.save({"blocks.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    run = tmp_path / "run"
    settings = [*inputs(smears), "-o", run, "--encoder", "small", "--epochs", "1", *FAST]
    assert train(*settings, "--weights", source.format(folder=tmp_path)) == code
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_settings_are_not_silently_ignored_when_a_run_goes_on(tmp_path, capsys):
    assert train("--resume", tmp_path, "--lr", "1e-4", "--device", "cpu", "--quiet") == 2
    assert "takes no folders, -o or settings, got --lr, --device" in capsys.readouterr().err


def test_surface_loss_needs_the_boundary_channel(smears, tmp_path, capsys):
    arguments = [*inputs(smears), "-o", tmp_path / "run", "--variant", "distance", "--surface-weight", "1"]
    assert train(*arguments) == 2
    assert "which variant 'distance' does not have" in capsys.readouterr().err


def test_help_names_every_setting():
    text = CliRunner().invoke(command, ["--help"]).output
    for option in ("--variant", "--encoder", "--weights", "--freeze", "--layer-decay", "--image-scale", "--resume"):
        assert option in text


def test_masks_that_are_negatives_are_refused_and_read_where_it_is_said(smears, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (smears / "masks").iterdir():
        cells = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)) > 0
        cv2.imwrite(str(masks / f"{path.stem}.png"), np.where(cells, 0, 255).astype(np.uint8))
    given = ["--images", smears / "images", "--masks", masks, "-o", tmp_path / "run", "--epochs", 1, *FAST]
    assert train(*given) == 3
    assert "--mask-foreground dark" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(*given, "--mask-foreground", "dark", "--no-calibrate") == 0
    assert load_record(tmp_path / "run").config.data.mask_foreground == "dark"
    assert 30 < load_network(tmp_path / "run").spec.cell_diameter_px / 0.4 < 150


def test_a_training_measures_its_specks_says_so_and_remembers_it(smears, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(*inputs(smears), "-o", run, "--epochs", 1, "--no-calibrate", *FAST) == 0
    assert "in the masks dropped" in capsys.readouterr().err
    data = load_record(run).config.data
    assert data.min_object_px != 200
    spec = load_network(run).spec
    assert spec.min_object_rel == data.min_object_rel == pytest.approx(0.0245, rel=0.05)
    given = tmp_path / "given"
    assert train(*inputs(smears), "-o", given, "--epochs", 1, "--no-calibrate", "--min-object", 60, *FAST) == 0
    assert load_record(given).config.data.min_object_px == 60
    assert load_network(given).spec.min_object_rel == pytest.approx(60 / data.min_object_px * 0.0245, rel=0.1)
