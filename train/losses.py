"""What the network is punished for. All losses take logits; the sigmoid belongs to the graph's end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cellseg_train.config import LossConfig


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice of sigmoid(``logits``) and ``target``, both (N, H, W), pooled over the batch (Milletari et al. 2016).

    Pooled rather than averaged over tiles: a tile without a cell has no Dice of its own.
    """
    probability = logits.sigmoid()
    common = (probability * target).sum()
    return 1 - (2 * common + 1) / (probability.sum() + target.sum() + 1)


def segmentation_loss(
    logits: Tensor, targets: Tensor, gap_weight: Tensor, channels: Sequence[str], config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its named parts (detached), for ``logits`` and ``targets`` (N, K, H, W), ``gap_weight`` (N, H, W).

    Foreground: weighted binary cross-entropy + soft Dice. Boundary, if it is among ``channels``: binary
    cross-entropy with its few pixels weighted up. The weighted means divide by the sum of weights, so that a tile
    with many gaps does not raise the learning rate.
    """
    foreground, target = logits[:, 0], targets[:, 0]
    pixel_weight = 1 + gap_weight
    bce = (F.binary_cross_entropy_with_logits(foreground, target, reduction="none") * pixel_weight).sum()
    bce = bce / pixel_weight.sum()
    dice = soft_dice_loss(foreground, target)
    total = bce + config.dice_weight * dice
    parts = {"bce": bce.detach(), "dice_loss": dice.detach()}
    if "boundary" in channels:
        k = list(channels).index("boundary")
        band = targets[:, k]
        band_weight = 1 + (config.boundary_positive_weight - 1) * band
        edge = F.binary_cross_entropy_with_logits(logits[:, k], band, weight=band_weight, reduction="sum")
        edge = edge / band_weight.sum()
        total = total + config.boundary_weight * edge
        parts["boundary"] = edge.detach()
    return total, parts


def is_finite(loss: Tensor) -> bool:
    """False for NaN and infinity; a training must stop there rather than write such weights."""
    return bool(torch.isfinite(loss))
