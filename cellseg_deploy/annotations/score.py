"""Agreement of label images with boxes or points. Pure arithmetic on arrays.

Definitions
    *Left out*, counting neither way: true objects of a class that was not requested; true boxes that reach within 1 px
    of the image's border; predicted cells within 1 px of the border, unless they match a box that counts; points in
    such a cell; points in no cell, at most half the image's median predicted diameter (disc of equal area) from the
    border; predicted cells that match only true objects that are left out; and predicted cells without a point that lie
    mostly on objects that nobody marked, where these are known (``unmarked``).
    *Hit*, boxes: IoU of the true box and the box around the predicted cell >= 0.5, one to one, as many as possible;
    first among the boxes that count, then, for the remaining cells, among the boxes left out.
    *Hit*, points: the cell under the point has no other point. A cell with several points is one false positive and its
    points are false negatives; a cell without a point is a false positive.
    ``merges``: boxes: predicted cells that cover more than half of the area of each of two or more true boxes, not
    counting boxes that another cell matches (in a pile a whole cell may cover its neighbour's box); points: cells
    with several points.
    ``pieces``: false positives, other than merges, whose box has its centre in a true box that counts: fragments of a
    cell, or its nucleus. Each belongs to the box in whose ellipse it lies deepest.
    ``recall_overlapping``, ``recall_apart``: recall of boxes that have an IoU > 0.15 with another true box of any
    requested class, and of the other boxes.
    ``count_bias``, ``count_mae``: predicted minus true cells that count, and its absolute value; mean over images.
Pooling: counts are summed over images before a ratio is formed. Division by zero: 1 if nothing was found, else 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.annotations.objects import Boxes, Floats, Points
from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cells.label_runs import Ints
from cellseg_deploy.cells.measure import boxes as cell_boxes
from cellseg_deploy.cells.metrics import match

HIT_IOU, OVERLAPPING_IOU = 0.5, 0.15
_BORDER_PX = 1.0

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClassScore:
    """True objects of one class: those that count, those hit, and the ``pieces`` in them."""

    n_true: int
    hits: int
    pieces: int


@dataclass(frozen=True)
class MarkScore:
    """Sums of one image. ``overlapping``: number of boxes that overlap another, and of those hit; zeros for points.
    ``by_class``: by class name, empty if the ground truth has no classes. ``of_model``: by the model's class, the score
    of the cells assigned to it; see ``class_score``."""

    n_true: int
    n_predicted: int
    hits: int
    merges: int
    pieces: int
    overlapping: tuple[int, int]
    left_out: tuple[int, int]
    by_class: dict[str, ClassScore]
    of_model: dict[str, MarkScore] = field(default_factory=dict)


def score_marks(
    true: Boxes | Points,
    labels: npt.NDArray[np.integer[Any]],
    *,
    classes: Collection[str] = (),
    min_area_px: int = 0,
    unmarked_hw: Bools | None = None,
) -> MarkScore:
    """Compare ``labels`` (h, w), whose numbers may have gaps, with boxes or points of the same image.

    ``classes``: the classes that count; all if empty. ``min_area_px``: smaller predicted objects are not cells.
    ``unmarked_hw``: with points, where objects without a point are, bool (h, w); see ``unmarked``.
    """
    area = np.bincount(labels.reshape(-1).astype(np.int64))
    area[:1] = 0
    numbers = np.flatnonzero((area > 0) & (area >= min_area_px)).astype(np.int64)
    labels = np.where(np.isin(labels, numbers), labels, 0)
    found = _Found(labels, numbers, area[numbers])
    wanted = np.array([not classes or name in classes for name in true.classes], np.bool_)
    if isinstance(true, Boxes):
        return _score_boxes(true, wanted, found)
    return _score_points(true, wanted, found, unmarked_hw)


def unmarked(true: Points, objects_hw: npt.NDArray[np.int32]) -> Bools:
    """Pixels of ``objects_hw`` (h, w) whose object has no point, or whose object is unknown (``IGNORED``), bool (h, w).

    Such objects were not marked: white cells, heaps, cells at the border in a file of points of red cells.
    """
    x, y = _pixels(true, (objects_hw.shape[0], objects_hw.shape[1]))
    has_point = np.isin(objects_hw, np.unique(objects_hw[y, x])) & (objects_hw != IGNORED)
    return np.asarray((objects_hw > 0) & ~has_point, np.bool_)


def _pixels(points: Points, image_hw: tuple[int, int]) -> tuple[Ints, Ints]:
    """Columns and rows (n,) of the pixels under ``points``."""
    height, width = image_hw
    x, y = np.clip(np.floor(points.points_xy), 0, [width - 1, height - 1]).astype(np.int64).T
    return x, y


class _Found:
    """Predicted cells: their numbers in ``labels`` (ascending), areas, boxes, and which of them touch the border."""

    def __init__(self, labels: npt.NDArray[np.integer[Any]], numbers: Ints, area: Ints) -> None:
        self.labels, self.numbers, self.area = labels, numbers, area
        left_top_wh = cell_boxes(labels, numbers).astype(np.float64)
        self.boxes_xyxy = np.concatenate([left_top_wh[:, :2], left_top_wh[:, :2] + left_top_wh[:, 2:]], axis=1)
        self.at_border = at_border(self.boxes_xyxy, (labels.shape[0], labels.shape[1]))


def at_border(boxes_xyxy: Floats, image_hw: tuple[int, int]) -> Bools:
    """Whether each box (n, 4) reaches within 1 px of the image's border, bool (n,)."""
    height, width = image_hw
    low = (boxes_xyxy[:, :2] <= _BORDER_PX).any(axis=1)
    high = (boxes_xyxy[:, 2:] >= np.array([width, height]) - _BORDER_PX).any(axis=1)
    return np.asarray(low | high, np.bool_)


def intersections(first_xyxy: Floats, second_xyxy: Floats) -> tuple[Floats, Floats]:
    """Areas of intersection and union of every pair of boxes, float64 (n, m) each."""
    low = np.maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    high = np.minimum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    common: Floats = np.clip(high - low, 0, None).prod(axis=2)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first_xyxy, second_xyxy)]
    return common, sizes[0][:, None] + sizes[1][None, :] - common


def _score_boxes(true: Boxes, wanted: Bools, found: _Found) -> MarkScore:
    boxes = true.boxes_xyxy
    height, width = found.labels.shape
    counts = wanted & ~at_border(boxes, (height, width))
    common, union = intersections(boxes, found.boxes_xyxy)
    at_true, at_found = np.nonzero((common >= HIT_IOU * union) & (common > 0))
    pairs = match(at_true, at_found, counts[at_true])
    partner = np.full(len(boxes), -1)  # index of the predicted cell
    partner[at_true[pairs]] = at_found[pairs]
    matched = np.zeros(len(found.numbers), np.bool_)
    matched[at_found[pairs]] = True
    others = match(at_true, at_found, ~counts[at_true] & ~matched[at_found])
    left_out = found.at_border & ~matched
    left_out[at_found[others]] = True
    invented = ~matched & ~left_out
    hit = partner >= 0

    merging = _merging(boxes, counts, partner, found) & ~left_out
    fragments = np.flatnonzero(invented & ~merging)
    owner = _owner((found.boxes_xyxy[fragments, :2] + found.boxes_xyxy[fragments, 2:]) / 2, boxes, counts)
    owner = owner[owner >= 0]
    near, both = intersections(boxes[wanted], boxes[wanted])
    np.fill_diagonal(near, 0)
    overlapping = np.zeros(len(boxes), np.bool_)
    overlapping[wanted] = (near > OVERLAPPING_IOU * both).any(axis=1)
    overlapping &= counts
    return MarkScore(
        n_true=int(counts.sum()),
        n_predicted=int((~left_out).sum()),
        hits=int(hit.sum()),
        merges=int(merging.sum()),
        pieces=len(owner),
        overlapping=(int(overlapping.sum()), int((overlapping & hit).sum())),
        left_out=(int((~counts).sum()), int(left_out.sum())),
        by_class=_by_class(true.classes, counts, hit, owner),
    )


def _merging(boxes: Floats, counts: Bools, partner: Ints, found: _Found) -> Bools:
    """Whether each predicted cell covers more than half of two boxes that count and that no other cell matches."""
    height, width = found.labels.shape
    held = np.zeros(len(found.numbers), np.int64)
    for index in np.flatnonzero(counts):
        left, top = np.floor(boxes[index, :2]).astype(int)
        right, bottom = np.ceil(boxes[index, 2:]).astype(int)
        inside = found.labels[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
        numbers, pixels = np.unique(inside[inside > 0], return_counts=True)
        box_area = (boxes[index, 2] - boxes[index, 0]) * (boxes[index, 3] - boxes[index, 1])
        holder = np.searchsorted(found.numbers, numbers[2 * pixels > box_area])
        if partner[index] >= 0:
            holder = holder[holder == partner[index]]
        held[holder] += 1
    return np.asarray(held >= 2, np.bool_)


def _owner(centres_xy: Floats, boxes: Floats, counts: Bools) -> Ints:
    """Index of the counting box around each centre, with the smallest elliptic distance if several; -1 if none."""
    away = np.abs(centres_xy[:, None] - (boxes[None, :, :2] + boxes[None, :, 2:]) / 2)
    away = away / ((boxes[None, :, 2:] - boxes[None, :, :2]) / 2)  # 1 at the sides of the box
    distance = np.where((away <= 1).all(axis=2) & counts, (away**2).sum(axis=2), np.inf)
    if not distance.size:
        return np.full(len(centres_xy), -1)
    return np.where(np.isfinite(distance.min(axis=1)), distance.argmin(axis=1), -1)


def _score_points(true: Points, wanted: Bools, found: _Found, unmarked_hw: Bools | None) -> MarkScore:
    height, width = found.labels.shape
    x, y = _pixels(true, (height, width))
    number = found.labels[y, x]
    cell = np.where(number > 0, np.searchsorted(found.numbers, number), -1)  # index of the cell under each point
    under = cell >= 0
    points_in = np.bincount(cell[under], minlength=len(found.numbers))
    wanted_in = np.bincount(cell[under & wanted], minlength=len(found.numbers))
    left_out = found.at_border | ((points_in > 0) & (wanted_in == 0))
    if unmarked_hw is not None:
        size = int(found.numbers.max(initial=0)) + 1
        common = np.bincount(found.labels[unmarked_hw], minlength=size)[found.numbers]
        left_out |= (points_in == 0) & (2 * common > found.area)
    whole = found.area[~found.at_border] if (~found.at_border).any() else found.area
    near = float(np.sqrt(4 / np.pi * np.median(whole))) / 2 if len(whole) else 0.0
    to_border = np.minimum(true.points_xy, np.array([width, height]) - true.points_xy).min(axis=1, initial=np.inf)
    counts = wanted & (under | (to_border > near))
    counts[under] &= ~found.at_border[cell[under]]
    hit = counts & under
    hit[under] &= points_in[cell[under]] == 1
    return MarkScore(
        n_true=int(counts.sum()),
        n_predicted=int((~left_out).sum()),
        hits=int(hit.sum()),
        merges=int(((points_in >= 2) & ~left_out).sum()),
        pieces=0,
        overlapping=(0, 0),
        left_out=(int((~counts).sum()), int(left_out.sum())),
        by_class=_by_class(true.classes, counts, hit, np.zeros(0, np.int64)),
    )


def _by_class(classes: Sequence[str], counts: Bools, hit: Bools, owner: Ints) -> dict[str, ClassScore]:
    names = np.array(classes, dtype=object)
    return {
        name: ClassScore(int((is_it := names == name)[counts].sum()), int(hit[is_it].sum()), int(is_it[owner].sum()))
        for name in sorted({name for name, it_counts in zip(classes, counts, strict=True) if name and it_counts})
    }


def pool_marks(scores: Sequence[MarkScore]) -> dict[str, Any]:
    """Metrics of one or more images under the names of ``metrics.json``. ``by_class``: ``n``, ``found``, ``recall``,
    ``pieces`` of each class."""
    n_true, n_predicted = sum(s.n_true for s in scores), sum(s.n_predicted for s in scores)
    hits = sum(s.hits for s in scores)
    n_overlapping, hits_overlapping = (sum(s.overlapping[i] for s in scores) for i in (0, 1))
    errors = np.array([s.n_predicted - s.n_true for s in scores], np.float64)
    by_class = {}
    for name in sorted({name for s in scores for name in s.by_class}):
        rows = [s.by_class[name] for s in scores if name in s.by_class]
        n, found = sum(row.n_true for row in rows), sum(row.hits for row in rows)
        by_class[name] = {"n": n, "found": found, "recall": found / n, "pieces": sum(row.pieces for row in rows)}
    return {
        "f1": 2 * hits / (n_true + n_predicted) if n_true + n_predicted else 1.0,
        "precision": _share(hits, n_predicted, n_true),
        "recall": _share(hits, n_true, n_predicted),
        "recall_overlapping": _share(hits_overlapping, n_overlapping, 0),
        "recall_apart": _share(hits - hits_overlapping, n_true - n_overlapping, 0),
        "count_mae": float(np.abs(errors).mean()),
        "count_bias": float(errors.mean()),
        "merges": sum(s.merges for s in scores),
        "pieces": sum(s.pieces for s in scores),
        "n_images": len(scores),
        "n_true": n_true,
        "n_predicted": n_predicted,
        "n_overlapping": n_overlapping,
        "n_left_out_true": sum(s.left_out[0] for s in scores),
        "n_left_out_predicted": sum(s.left_out[1] for s in scores),
        "by_class": by_class,
    }


def _share(part: int, whole: int, other_side: int) -> float:
    return part / whole if whole else float(other_side == 0)
