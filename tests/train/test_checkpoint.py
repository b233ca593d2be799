"""What a training leaves on disk can be read back, and is never half written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_spec

from cellseg_deploy.errors import ModelError, OutputError, UsageError
from cellseg_train import checkpoint
from cellseg_train.checkpoint import RunInputs, RunRecord
from cellseg_train.config import ModelConfig, OptimConfig, TrainConfig
from cellseg_train.model import CellSegNet

CONFIG = ModelConfig(
    tile_size=56, tiny_width=48, tiny_depth=1, decoder_channels=(16, 16, 8), image_skip=(), variant="plain"
)


def save(path: Path) -> CellSegNet:
    net = CellSegNet(CONFIG).eval()
    checkpoint.save_network(path, net.state_dict(), CONFIG, make_spec(name="here"))
    return net


def test_a_network_is_rebuilt_from_its_file_alone(tmp_path):
    net = save(tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = checkpoint.load_network(source)
        assert loaded.config == CONFIG
        assert loaded.spec.name == "here"
        image = torch.randn(1, 3, 56, 56)
        with torch.inference_mode():
            assert torch.equal(loaded.net(image), net(image))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = CellSegNet(CONFIG)
    with torch.no_grad():
        net.decoder.head.bias[0] = float("nan")
    with pytest.raises(ModelError, match=r"decoder\.head\.bias"):
        checkpoint.save_network(tmp_path / "model.safetensors", net.state_dict(), CONFIG, make_spec())
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_their_description(tmp_path):
    path = tmp_path / "model.safetensors"
    net = save(path)
    state = net.state_dict()
    state["surplus"] = torch.ones(1)
    del state["decoder.head.bias"]
    checkpoint.save_network(path, state, CONFIG, make_spec())
    with pytest.raises(ModelError, match=r"missing: decoder\.head\.bias; unexpected: surplus"):
        checkpoint.load_network(path)


def test_a_foreign_safetensors_file_is_not_ours(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ModelError, match="no cellseg description"):
        checkpoint.load_network(path)
    path.write_bytes(b"\x08")
    with pytest.raises(ModelError, match="not a readable safetensors"):
        checkpoint.load_network(path)


def test_a_run_without_a_network_yet_says_so(tmp_path):
    with pytest.raises(ModelError, match="has not finished its first validation"):
        checkpoint.load_network(tmp_path)


def test_record_survives_the_round_trip(tmp_path):
    config = TrainConfig(model=CONFIG, optim=OptimConfig(epochs=7), seed=3)
    record = RunRecord(config, RunInputs(images=("/a",), masks=("/b",)), "smears")
    checkpoint.save_record(tmp_path, record)
    assert checkpoint.load_record(tmp_path) == record


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="is not a training run"):
        checkpoint.load_record(tmp_path)
    (tmp_path / checkpoint.CONFIG_FILE).write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.load_record(tmp_path)


def test_a_checkpoint_replaces_the_old_one_or_leaves_it(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, {"epoch": 1})

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save_checkpoint(tmp_path, {"epoch": 2})
    monkeypatch.undo()
    state = checkpoint.load_checkpoint(tmp_path)
    assert state is not None
    assert state["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CHECKPOINT_FILE]


def test_a_torn_checkpoint_is_an_error_and_none_is_none(tmp_path):
    assert checkpoint.load_checkpoint(tmp_path) is None
    checkpoint.save_checkpoint(tmp_path, {"epoch": 1})
    path = tmp_path / checkpoint.CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.load_checkpoint(tmp_path)
