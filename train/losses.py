"""Training losses. All losses take logits; the sigmoid is at the end of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cellseg_train.config import LossConfig


def soft_dice_loss(logits: Tensor, target: Tensor, taught: Tensor | None = None) -> Tensor:
    """1 - Dice of sigmoid(``logits``) and ``target``, both (N, H, W), pooled over the batch (Milletari et al. 2016).

    Pooled rather than averaged over tiles: a tile without a cell has no Dice of its own. ``taught`` (N, H, W): 0 where
    a pixel is excluded, else 1; None for 1.
    """
    probability = logits.sigmoid()
    if taught is not None:
        probability, target = probability * taught, target * taught
    common = (probability * target).sum()
    return 1 - (2 * common + 1) / (probability.sum() + target.sum() + 1)


def surface_loss(logits: Tensor, signed_distance: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of sigmoid(``logits``) times ``signed_distance`` of the target, both (N, H, W); Kervadec et al. 2019, eq. 5.

    A false pixel costs more the further it is from the target's edge; cross-entropy only considers whether it is false.
    Negative where the target is found. ``weight`` (N, H, W): weight of each pixel in the mean, None for 1.
    """
    return _mean(logits.sigmoid() * signed_distance, weight)


def soft_target_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of ``logits`` with ``target`` in [0, 1], less its minimum, the target's
    entropy: the Kullback-Leibler divergence, 0 where sigmoid(``logits``) is ``target``. Same gradient as cross-entropy.

    Not a squared error as in StarDist (Schmidt et al. 2018): through a sigmoid its gradient almost vanishes
    where the network is confidently wrong. ``weight``: as in ``surface_loss``.
    """
    entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
    return _mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy, weight)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).sum() / weight.sum().clamp(min=1)


def segmentation_loss(
    logits: Tensor,
    targets: Tensor,
    gap_weight: Tensor,
    channels: Sequence[str],
    config: LossConfig,
    surface: Tensor | None = None,
    known: Tensor | None = None,
    taught: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its named parts (detached), for ``logits`` and ``targets`` (N, K, H, W), ``gap_weight`` (N, H, W).
    For the classes among the K channels see ``class_loss``.

    Foreground: weighted binary cross-entropy + soft Dice. Boundary, if it is among ``channels``: binary
    cross-entropy with its few pixels weighted up, and ``surface_loss`` with the signed distances ``surface`` (N, H, W)
    if ``config.surface_weight`` is set. Distance, if it is among them: ``soft_target_loss``. The weighted means
    divide by the sum of weights, so that a tile with many gaps does not raise the learning rate.

    ``known`` (N, H, W): 0 where the instance is unknown: no boundary or distance loss there; None for 1.
    ``taught`` (N, H, W): 0 where there is no foreground loss either; None for 1.
    """
    foreground, target = logits[:, 0], targets[:, 0]
    pixel_weight = 1 + gap_weight
    if taught is not None:
        pixel_weight = pixel_weight * taught
        known = taught if known is None else known * taught
    bce = (F.binary_cross_entropy_with_logits(foreground, target, reduction="none") * pixel_weight).sum()
    bce = bce / pixel_weight.sum().clamp(min=1)
    dice = soft_dice_loss(foreground, target, taught)
    total = bce + config.dice_weight * dice
    parts = {"bce": bce.detach(), "dice_loss": dice.detach()}
    if "boundary" in channels:
        k = list(channels).index("boundary")
        band = targets[:, k]
        band_weight = 1 + (config.boundary_positive_weight - 1) * band
        if known is not None:
            band_weight = band_weight * known
        edge = F.binary_cross_entropy_with_logits(logits[:, k], band, weight=band_weight, reduction="sum")
        edge = edge / band_weight.sum().clamp(min=1)
        total = total + config.boundary_weight * edge
        parts["boundary"] = edge.detach()
        if config.surface_weight:
            if surface is None:
                raise ValueError("surface_weight is set, but no signed distances were given")
            shape = surface_loss(logits[:, k], surface, known)
            total = total + config.surface_weight * shape
            parts["surface"] = shape.detach()
    if "distance" in channels:
        k = list(channels).index("distance")
        depth = soft_target_loss(logits[:, k], targets[:, k], known)
        total = total + config.distance_weight * depth
        parts["distance"] = depth.detach()
    return total, parts


def class_loss(logits: Tensor, class_map: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy of the class ``logits`` (N, C, H, W) with ``class_map`` (N, H, W), the class of each
    pixel, -1 for none or unknown: these pixels are ignored.

    ``class_weights`` (C,): weight of a pixel of each class. The mean is over the sum of the weights, so a tile full of
    rare cells counts no more than any other; 0 where no class is known.
    """
    summed = F.cross_entropy(logits, class_map, weight=class_weights, ignore_index=-1, reduction="sum")
    known = class_map >= 0
    return summed / class_weights[class_map[known]].sum().clamp(min=1)


def is_finite(loss: Tensor) -> bool:
    """Return False for NaN and infinity; training must stop there rather than write such weights."""
    return bool(torch.isfinite(loss))
