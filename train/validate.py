"""Predict whole validation images as the runtime would: counts, not only losses.

Also finds operating points: the probabilities of all validation images are kept, and a small grid of
settings is scored on them for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.ignored import IGNORED, set_aside
from cellseg_deploy.cells.instances import segment
from cellseg_deploy.cells.metrics import overlap_table, pool
from cellseg_deploy.evaluate.calibration import Labelling, Scorer, most_trials, search
from cellseg_deploy.images.read import Pair
from cellseg_deploy.models.spec import TASKS, InstanceParams, Task, Variant, default_operating_points
from cellseg_deploy.segmenter import resize
from cellseg_train.cell_classes import UNKNOWN, CellClasses, ClassNumbers
from cellseg_train.config import TrainConfig
from cellseg_train.data import read_pair
from cellseg_train.model import CellSegNet
from cellseg_train.model import probabilities as probabilities_of
from cellseg_train.overlaps import UNTAUGHT

TILE_BATCH = 8


@dataclass(frozen=True)
class Prediction:
    """One validation image: RGB at the model's scale, probabilities (K, h, w) float16, true labels at full size, and
    class number by label, ``UNKNOWN`` if unknown (empty if the network has no classes)."""

    image_hwc: npt.NDArray[np.uint8]
    probabilities_khw: npt.NDArray[np.float16]
    true_labels: npt.NDArray[np.int32]
    class_of: ClassNumbers


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
        logits = net(net.normalise(tiles.permute(0, 3, 1, 2).float()))
        tiling.stitch_into(out, plan, start, probabilities_of(logits, net.config).float().cpu().numpy())
    return out


def predict_pairs(
    net: CellSegNet,
    pairs: Iterable[Pair],
    config: TrainConfig,
    halo: int,
    device: torch.device,
    classes: CellClasses | None = None,
) -> Iterator[Prediction]:
    """Read, scale and predict each pair; the network must be in eval mode. Excluded cells are not counted."""
    for pair in pairs:
        image, truth = read_pair(pair, config.data.min_object_px, config.data.mask_foreground, classes)
        small = resize(image, config.data.scale_of(pair.mask))
        labels = np.where(truth.labels_hw == UNTAUGHT, IGNORED, truth.labels_hw).astype(np.int32)
        yield Prediction(small, predict_image(net, small, halo, device).astype(np.float16), labels, truth.class_of)


@dataclass
class ClassScores:
    """True positives, false positives and false negatives of each class, over images.

    A predicted cell (as labelled at the model's scale) has the class with the largest mean probability over its
    pixels. It is correct if it matches a true cell of that class (IoU above 0.5). A match with a cell of unknown
    class is not counted.
    """

    names: tuple[str, ...]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, names: tuple[str, ...]) -> ClassScores:
        """Scores before any image is added."""
        return cls(names, np.zeros((len(names), 3), np.int64))

    def add(self, item: Prediction, channels: Sequence[str], params: InstanceParams, cell_diameter_px: float) -> None:
        """Count the cells of one image."""
        probabilities = item.probabilities_khw.astype(np.float32)
        hw = (probabilities.shape[1], probabilities.shape[2])
        labels = segment(probabilities, channels, params, cell_diameter_px=cell_diameter_px, classes=self.names)
        true = cv2.resize(item.true_labels.astype(np.float32), (hw[1], hw[0]), interpolation=cv2.INTER_NEAREST)
        true_labels, found = set_aside(true.astype(np.int32), labels)
        table = overlap_table(true_labels, found)
        true_class = np.array([self._class_of(item.class_of, n) for n in table.true_number.tolist()], np.int64)
        found_class = _likeliest(probabilities[-len(self.names) :], found, table.predicted_number)
        union = table.true_area[table.true_index] + table.predicted_area[table.predicted_index] - table.common_px
        strict = 2 * table.common_px > union
        true_at, found_at = table.true_index[strict], table.predicted_index[strict]
        partner = np.full(len(found_class), -1, np.int64)
        partner[found_at] = true_at
        hit = np.zeros(len(true_class), np.bool_)
        for class_number, at in zip(found_class.tolist(), partner.tolist(), strict=True):
            if at >= 0 and true_class[at] == UNKNOWN:
                continue
            right = at >= 0 and true_class[at] == class_number
            self.counts[class_number, 0 if right else 1] += 1
            if right:
                hit[at] = True
        for class_number in true_class[~hit & (true_class != UNKNOWN)].tolist():
            self.counts[class_number, 2] += 1

    def f1(self) -> dict[str, float]:
        """F1 of each class; NaN if it has neither a true nor a predicted cell."""
        right, wrong, missed = self.counts.T
        with np.errstate(invalid="ignore"):
            values = 2 * right / (2 * right + wrong + missed)
        return {name: float(value) for name, value in zip(self.names, values, strict=True)}

    @staticmethod
    def _class_of(class_of: ClassNumbers, label: int) -> int:
        return int(class_of[label]) if label < len(class_of) else UNKNOWN


def _likeliest(
    planes_chw: npt.NDArray[np.float32], labels_hw: npt.NDArray[np.integer], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Class number (n,) with the largest sum of ``planes_chw`` (C, h, w) over the pixels of each of ``numbers``."""
    flat = labels_hw.ravel()
    size = int(flat.max(initial=0)) + 1
    sums = np.stack([np.bincount(flat, weights=plane.ravel(), minlength=size)[numbers] for plane in planes_chw])
    return np.asarray(sums.argmax(axis=0), np.int64)


def merit(metrics: Mapping[str, float]) -> float:
    """Score by which networks are compared: F1 + Dice, less half the relative count error."""
    mean_true = max(metrics["n_true"] / metrics["n_images"], 1)
    return metrics["f1"] + metrics["dice"] - 0.5 * metrics["count_mae"] / mean_true


def most_settings(variant: Variant) -> int:
    """Largest number of settings that ``calibrate`` tries."""
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
    setting.
    """
    scorer = Scorer(predictions, labelling)
    scorer.on_trial = on_trial
    chosen: dict[Task, tuple[InstanceParams, dict[str, float]]] = {}
    for task in TASKS:
        params = search(scorer, [default_operating_points(variant)[task]], task)
        chosen[task] = (params, pool(scorer.full_scores(params, range(len(predictions)))))
    return chosen
