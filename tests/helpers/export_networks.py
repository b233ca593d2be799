"""Networks for the export tests: random ones of any kind, and a tiny one that really finds cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cellseg_deploy.models.spec import (
    DataSummary,
    ModelSpec,
    Spread,
    TrainingInfo,
    WeightsInfo,
    default_operating_points,
)
from cellseg_deploy.samples import SmearParams, make_smear, random_params
from cellseg_train.checkpoint import LoadedNetwork
from cellseg_train.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from cellseg_train.data import make_targets
from cellseg_train.losses import segmentation_loss
from cellseg_train.model import CellSegNet, enliven_layer_scale
from cellseg_train.optim import make_optimizer, make_schedule

TRAINED = Path(__file__).parent / "data" / "trained.safetensors"
CELL_PX = 24.0
SUMMARY = DataSummary(
    version=1, n_images=6, n_cells=720, values={"diameter_px": Spread(median=24.0, p05=20.0, p95=28.0)}
)
TINY = ModelConfig(tile_size=112, tiny_width=48, tiny_depth=2, decoder_channels=(32, 24, 16), image_skip=(16, 16, 16))


def spec_of(config: ModelConfig, *, patch_size: int = 14, **changes: Any) -> ModelSpec:
    """A ModelSpec for ``config``: cells of 24 px at the scale of the images."""
    values: dict[str, Any] = {
        "name": "test",
        "variant": config.variant,
        "channels": config.channels,
        "tile_size": config.tile_size,
        "halo": config.tile_size // 7,
        "image_scale": 1.0,
        "cell_diameter_px": CELL_PX,
        "patch_size": patch_size,
        "encoder": config.encoder_name,
        "weights": WeightsInfo(origin="random initialisation", licence="MIT"),
        "training": TrainingInfo(val_metrics={"f1": 0.5}, data_summary=SUMMARY),
        "operating_points": default_operating_points(config.variant),
    }
    return ModelSpec(**(values | changes))


def random_network(config: ModelConfig, *, seed: int = 0) -> LoadedNetwork:
    """Random weights of which each one matters: LayerScale awake, biases and norms away from 0 and 1."""
    torch.manual_seed(seed)
    net = CellSegNet(config)
    enliven_layer_scale(net)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(("bias", "running_mean", "cls_token", "reg_token")):
                tensor.normal_(0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    return LoadedNetwork(net.eval(), config, spec_of(config, patch_size=net.patch_size))


def smear_tiles(n: int, size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``n`` tiles of sample smears with cells of 24 px: RGB uint8 (n, 3, S, S), targets (n, 2, S, S), gap weights."""
    rng = np.random.default_rng(seed)
    config = TrainConfig(data=DataConfig(boundary_width_px=2))
    smears = [make_smear(_params(rng, usual=k % 2 == 0), seed + k) for k in range(6)]
    images, targets, gaps = [], [], []
    for k in range(n):
        smear = smears[k % len(smears)]
        y, x = rng.integers(0, 400 - size, 2)
        window = np.s_[y : y + size, x : x + size]
        made = make_targets(np.ascontiguousarray(smear.labels_hw[window]), config)
        images.append(smear.image_hwc[window].transpose(2, 0, 1).copy())
        targets.append(made["targets"])
        gaps.append(made["gap"])
    return torch.tensor(np.stack(images)), torch.tensor(np.stack(targets)), torch.tensor(np.stack(gaps))


def _params(rng: np.random.Generator, *, usual: bool) -> SmearParams:
    drawn = random_params(rng, size_hw=(400, 400), cell_diameter_px=CELL_PX)
    usual_ones = SmearParams(size_hw=(400, 400), cell_diameter_px=CELL_PX, blur_px=0.4)
    return replace(usual_ones if usual else drawn, n_cells=120)


def train_steps(net: CellSegNet, optim: OptimConfig, tiles: tuple[torch.Tensor, ...], steps: int) -> list[float]:
    """Losses of ``steps`` updates over the ``tiles`` in turn, ``optim.batch_size`` at a time."""
    optimizer = make_optimizer(net, optim)
    schedule = make_schedule(optimizer, optim, steps)
    images, targets, gaps = tiles
    losses = []
    for step in range(steps):
        chosen = [(step * optim.batch_size + i) % len(images) for i in range(optim.batch_size)]
        logits = net(net.normalise(images[chosen].float()))
        schedule.step_update(step)
        loss, _ = segmentation_loss(
            logits, targets[chosen].float(), gaps[chosen], net.config.channels, LossConfig(gap_weight=2.0)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained_network() -> LoadedNetwork:
    """A tiny network that finds most cells of a sample smear.

    Its weights are a file: what a training learns depends on processor and threads, and a test must not.
    """
    net = CellSegNet(TINY)
    net.load_state_dict(load_file(TRAINED))
    return LoadedNetwork(net.eval(), TINY, spec_of(TINY))


def main() -> None:
    """Train the weights of ``trained_network`` again; some seconds on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = CellSegNet(TINY).train()
    train_steps(net, OptimConfig(lr=6e-3, batch_size=8), smear_tiles(64, TINY.tile_size), 70)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, TRAINED)


if __name__ == "__main__":
    main()
