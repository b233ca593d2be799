"""Whole validation images through the network as the runtime would run them: counts, not only losses.

Also where operating points come from: the probabilities of all validation images are kept, and a small grid of
settings is scored on them for each task.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from cellseg_deploy import tiling
from cellseg_deploy.images import Pair
from cellseg_deploy.instances import segment
from cellseg_deploy.metrics import ImageScore, pool, score_image
from cellseg_deploy.model_spec import TASKS, InstanceParams, Task, Variant, default_operating_points
from cellseg_deploy.pipeline import resize
from cellseg_train.config import TrainConfig
from cellseg_train.data import read_pair
from cellseg_train.model import CellSegNet, normalise

TILE_BATCH = 8
ROUNDS = 2  # of calibration through all groups of settings; a later group may make another choice best in an earlier


@dataclass(frozen=True)
class Prediction:
    """One validation image: RGB at the model's scale, probabilities (K, h, w) float16, true labels at full size."""

    image_hwc: npt.NDArray[np.uint8]
    probabilities_khw: npt.NDArray[np.float16]
    true_labels: npt.NDArray[np.int32]


@torch.inference_mode()
def predict_image(
    net: CellSegNet, image_hwc: npt.NDArray[np.uint8], halo: int, device: torch.device
) -> npt.NDArray[np.float32]:
    """Probabilities (K, h, w) of an image (h, w, 3) that is already at the model's scale, tiled and stitched."""
    plan = tiling.plan(image_hwc.shape[:2], net.config.tile_size, halo)
    padded = tiling.pad(image_hwc, plan)
    out = np.empty((len(net.config.channels), *image_hwc.shape[:2]), np.float32)
    for start in range(0, len(plan.tiles), TILE_BATCH):
        tiles = torch.from_numpy(tiling.cut(padded, plan, start, start + TILE_BATCH)).to(device)
        logits = net(normalise(tiles.permute(0, 3, 1, 2).float(), net.config))
        tiling.stitch_into(out, plan, start, logits.sigmoid().float().cpu().numpy())
    return out


def predict_pairs(
    net: CellSegNet, pairs: Iterable[Pair], config: TrainConfig, halo: int, device: torch.device
) -> Iterator[Prediction]:
    """Read, scale and predict each pair; the network must be in eval mode."""
    for pair in pairs:
        image, labels = read_pair(pair, config.data.min_object_px)
        small = resize(image, config.data.image_scale)
        yield Prediction(small, predict_image(net, small, halo, device).astype(np.float16), labels)


@dataclass(frozen=True)
class Labelling:
    """What turns probabilities into scored labels, besides the operating point."""

    channels: tuple[str, ...]
    cell_diameter_px: float
    min_object_px: int

    def score(self, item: Prediction, params: InstanceParams) -> ImageScore:
        """Metrics of one image at its full size."""
        labels = segment(
            item.probabilities_khw.astype(np.float32),
            self.channels,
            params,
            cell_diameter_px=self.cell_diameter_px,
            out_hw=(item.true_labels.shape[0], item.true_labels.shape[1]),
        )
        return score_image(item.true_labels, labels, min_area_px=self.min_object_px)


@dataclass(frozen=True)
class _Trial:
    params: InstanceParams
    metrics: dict[str, float]
    area_error: float

    def rank(self, task: Task) -> tuple[float, ...]:
        """Higher is better. ``counting``: ``merit``; ``confluence``: Dice, then error of the covered area.

        Differences of Dice below 0.0005 are within what a few cells more or less would do.
        """
        if task == "counting":
            return (merit(self.metrics),)
        return (round(self.metrics["dice"] / 0.0005), -self.area_error, self.metrics["dice"])


def merit(metrics: Mapping[str, float]) -> float:
    """What one network has to be better in than another: F1 + Dice, less half the relative count error."""
    mean_true = max(metrics["n_true"] / metrics["n_images"], 1)
    return metrics["f1"] + metrics["dice"] - 0.5 * metrics["count_mae"] / mean_true


def search_axes(variant: Variant) -> list[dict[str, list[float]]]:
    """Settings that calibration varies together, one group after the other from the best of the group before.

    ``min_area_rel`` ends at 0.2: images of another magnification may hold cells of half the model's cell area.
    """
    foreground = [0.4, 0.45, 0.5, 0.55, 0.6]
    areas: dict[str, list[float]] = {"min_area_rel": [0.1, 0.15, 0.2], "min_border_area_rel": [0.1, 0.2, 0.3, 0.4]}
    if variant == "plain":
        return [{"foreground_threshold": [*foreground, 0.7, 0.8, 0.9, 0.95]}, areas]
    parting = {"seed_threshold": [0.6, 0.7, 0.8, 0.9], "boundary_weight": [0.25, 0.5, 1.0, 1.5]}
    return [parting, {"foreground_threshold": foreground}, areas]


def calibrate(
    predictions: Sequence[Prediction], variant: Variant, labelling: Labelling
) -> dict[Task, tuple[InstanceParams, dict[str, float]]]:
    """Best settings and their metrics for each task, by ``_Trial.rank``, on the images of ``predictions``."""
    tried: dict[InstanceParams, _Trial] = {}

    def trial(params: InstanceParams) -> _Trial:
        if params not in tried:
            scores = [labelling.score(item, params) for item in predictions]
            covered = sum(s.predicted_px for s in scores) / max(sum(s.true_px for s in scores), 1)
            tried[params] = _Trial(params, pool(scores), abs(covered - 1))
        return tried[params]

    chosen: dict[Task, tuple[InstanceParams, dict[str, float]]] = {}
    for task in TASKS:
        best = trial(default_operating_points(variant)[task])
        for axes in search_axes(variant) * ROUNDS:
            for values in itertools.product(*axes.values()):
                candidate = trial(msgspec.structs.replace(best.params, **dict(zip(axes, values, strict=True))))
                best = max(best, candidate, key=lambda entry: entry.rank(task))
        chosen[task] = (best.params, best.metrics)
    return chosen
