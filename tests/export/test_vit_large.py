"""The reference encoder, ViT-L/14 of DINOv2 (304 million parameters), exports, runs and learns on a plain machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from export_networks import random_network, smear_tiles, train_steps

from cellseg_deploy.models import onnx_file
from cellseg_deploy.samples import SmearParams, make_smear
from cellseg_export.forms.onnx import export_onnx
from cellseg_export.gate.verify import GateImages
from cellseg_train.config import ModelConfig, OptimConfig
from cellseg_train.model import CellSegNet, enliven_layer_scale

CONFIG = ModelConfig(encoder="large", image_skip=())

pytestmark = pytest.mark.slow


def test_vit_large_exports_and_agrees(tmp_path: Path) -> None:
    """About a minute and 7 GB. Random weights find no cells, so it is written unverified, by its tensors."""
    network = random_network(CONFIG)
    assert enliven_layer_scale(network.net) == 48  # two a block; asleep, any change of a block would look perfect
    smear = make_smear(SmearParams(size_hw=(224, 300), n_cells=20, cell_diameter_px=24), 0)
    images = GateImages("one sample smear", lambda: iter([("sample", smear.image_hwc)]))
    path = tmp_path / "large.onnx"

    exported = export_onnx(network, path, images=images, unverified=True, tile_batch=1)

    assert exported.report.max_difference < 1e-3
    low, high = exported.report.tensor("foreground")[0].reference_range
    assert high - low > 0.01  # a constant answer would agree with anything
    assert exported.spec.parity.startswith("unverified")
    assert 1.1e9 < path.stat().st_size < onnx_file.MAX_BYTES
    path.unlink()  # pytest keeps folders of the last runs


@pytest.mark.night
def test_vit_large_learns() -> None:
    """Every layer, two tiles an update: the loss falls on the four tiles that it is shown again and again."""
    torch.manual_seed(0)
    # A quarter of the usual tile, so that the eight updates take seconds and not minutes.
    net = CellSegNet(dataclasses.replace(CONFIG, tile_size=112)).train()
    before = net.encoder.blocks[0].attn.qkv.weight.detach().clone()
    optim = OptimConfig(lr=2e-3, encoder_lr_ratio=0.02, warmup_fraction=0.0, batch_size=2)
    losses = train_steps(net, optim, smear_tiles(4, 112), 8)
    assert np.isfinite(losses).all()
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses
    assert not torch.equal(net.encoder.blocks[0].attn.qkv.weight, before)
