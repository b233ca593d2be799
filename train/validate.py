"""Whole validation images through the network as the runtime would run them: counts, not only losses.

Also where operating points come from: the probabilities of all validation images are kept, and a small grid of
settings is scored on them for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.metrics import pool
from cellseg_deploy.evaluate.calibration import Labelling, Scorer, most_trials, search
from cellseg_deploy.images.read import Pair
from cellseg_deploy.models.spec import TASKS, InstanceParams, Task, Variant, default_operating_points
from cellseg_deploy.segmenter import resize
from cellseg_train.config import TrainConfig
from cellseg_train.data import read_pair
from cellseg_train.model import CellSegNet, normalise

TILE_BATCH = 8


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
        image, labels = read_pair(pair, config.data.min_object_px, config.data.mask_foreground)
        small = resize(image, config.data.scale_of(pair.mask))
        yield Prediction(small, predict_image(net, small, halo, device).astype(np.float16), labels)


def merit(metrics: Mapping[str, float]) -> float:
    """What one network has to be better in than another: F1 + Dice, less half the relative count error."""
    mean_true = max(metrics["n_true"] / metrics["n_images"], 1)
    return metrics["f1"] + metrics["dice"] - 0.5 * metrics["count_mae"] / mean_true


def most_settings(variant: Variant) -> int:
    """Settings that ``calibrate`` tries at most."""
    return sum(most_trials([default_operating_points(variant)[task]], task) for task in TASKS)


def calibrate(
    predictions: Sequence[Prediction],
    variant: Variant,
    labelling: Labelling,
    *,
    on_trial: Callable[[], None] | None = None,
) -> dict[Task, tuple[InstanceParams, dict[str, float]]]:
    """Best settings and their metrics for each task, as ``cellseg_deploy.evaluate.calibration`` searches and
    ranks them.

    Only the variant's own method is tried: a training compares networks, not methods. ``on_trial``: called after each
    setting that was tried.
    """
    scorer = Scorer(predictions, labelling)
    scorer.on_trial = on_trial
    chosen: dict[Task, tuple[InstanceParams, dict[str, float]]] = {}
    for task in TASKS:
        params = search(scorer, [default_operating_points(variant)[task]], task)
        chosen[task] = (params, pool(scorer.full_scores(params, range(len(predictions)))))
    return chosen
