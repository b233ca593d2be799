"""Agreement of labels with the ground truth: Dice, IoU, matched cells, F1, AP, count error, merges and splits.

Definitions
    *Match*: a true and a predicted cell may be matched if their IoU >= t; each takes part in at most one match, and
    the number of matches is the largest possible. TP = matches, FP and FN = unmatched predicted and true cells.
    ``f1``, ``precision``, ``recall``: at t = 0.5. ``map``: mean over t = 0.50:0.05:0.95 of TP / (TP + FP + FN); this is
    what Cellpose calls average precision and StarDist accuracy, not COCO's ranked AP.
    ``pq_strict``: panoptic quality, sum of matched IoU / (TP + FP/2 + FN/2), with IoU > 0.5
    (Kirillov et al., Panoptic Segmentation, CVPR 2019). Two equal cells merged into one have an IoU of exactly 0.5: a
    match for ``f1``, but not for ``pq_strict``.
    ``merges``: predicted cells that contain more than half the area of each of two or more true cells; ``splits``: true
    cells that contain more than half of each of two or more predicted cells.
    ``dice``, ``iou``: of the two foreground masks over all pixels, specks included.
    ``count_bias``: mean over images of predicted - true cells, with cells at the border subject to the count rule;
    ``count_mae``: mean of its absolute value; ``count_mape``: mean of |predicted - true| / true as a fraction, over
    the images that have a true cell (NaN if none has).

Masks without instances merge overlapping cells into one component, so splitting them correctly would be penalised.
The same numbers are therefore also reported without such components, under names that end in ``_apart``:
    A true component *looks like several cells* if its area is above ``CLUMP_AREA`` = 1.3 times the median of the
    image's true components (without specks) and its solidity (see ``measure``) is below ``CLUMP_SOLIDITY`` = 0.93.
    Such components count neither way, and neither do predicted cells with more than half of their area in one.
    ``f1_apart``, ``precision_apart``, ``recall_apart``, ``count_*_apart``: as above, for the remaining cells,
    matched among themselves. ``n_clumps``: true components left out. The rule uses the ground truth only, so it is the
    same for every model; if the ground truth has instances, the rule leaves out the few large cells of odd shape.

Ground truths differ in what they draw of a cell that the image border cuts: all of it, none, or only large pieces.
The same numbers are therefore also reported without border objects on either side, under names that end in ``_inner``:
    A *border object*, speck or cell, has a pixel in the outermost row or column of the image. True border cells count
    neither way. Nor does a predicted cell that is a border object or has more than half of its area in one true
    border object, unless it is matched to an inner true cell: then it is a TP like any other.
    ``f1_inner``, ``precision_inner``, ``recall_inner``, ``map_inner``, ``count_*_inner``: as above, with
    TP = the largest matching of the inner true cells to all predicted ones, found = inner predicted cells + the other
    predicted cells matched (as few of these as possible; at IoU 0.5 for the counts). The count rule is not applied.
    ``dice_inner``: Dice over the pixels that lie in no border object of either side. ``n_border``: true cells left out.

Pooling: pixels, TP, FP and FN are summed over images before a ratio is formed, as stardist's
``matching_dataset(by_image=False)`` does; the count errors are means over images.

Division by zero: an empty field predicted as empty is perfect (1.0; StarDist returns 0); with cells on one side only,
every ratio is 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.count_rules import CountRule, counted
from cellseg_deploy.cells.field_of_view import edges
from cellseg_deploy.cells.ignored import set_aside
from cellseg_deploy.cells.label_runs import Ints, check_labels
from cellseg_deploy.cells.measure import boxes, solidities
from cellseg_deploy.errors import UsageError

Flags = npt.NDArray[np.bool_]
MAP_THRESHOLDS: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
F1_THRESHOLD = 0.5
CLUMP_AREA, CLUMP_SOLIDITY = 1.3, 0.93
MIN_AREA_PX = 200
"""Objects below this area, in px of the original mask, are specks: neither true nor predicted cells."""


@dataclass(frozen=True)
class CellSums:
    """Sums over some of an image's cells: all of them, those outside clumps, or the inner ones.

    Per threshold, ``true_positives``: matches; ``n_predicted``: predicted cells that count. ``counted``: true and
    predicted cells that pass the count rule, None where it is not applied.
    """

    n_true: int
    n_predicted: tuple[int, ...]
    true_positives: tuple[int, ...]
    counted: tuple[int, int] | None

    def counts(self, level: int) -> tuple[int, int]:
        """True and predicted cells for the count errors; ``level``: index of the threshold 0.5."""
        return self.counted or (self.n_true, self.n_predicted[level])


@dataclass(frozen=True)
class ForegroundSums:
    """Foreground pixels of ground truth, prediction and their intersection."""

    true_px: int
    predicted_px: int
    common_px: int


@dataclass(frozen=True)
class ImageScore:
    """Sums of one image from which every metric follows, alone or pooled.

    ``whole``: all cells; ``apart``: without true components that look like several cells and the cells predicted in
    them; ``inner``: without border objects. ``foreground``, ``inner_foreground``: over all pixels, and over those not
    in a border object. ``strict_matches``, ``strict_iou``: number and summed IoU of the pairs with IoU > 0.5.
    """

    thresholds: tuple[float, ...]
    whole: CellSums
    apart: CellSums
    inner: CellSums
    foreground: ForegroundSums
    inner_foreground: ForegroundSums
    strict_matches: int
    strict_iou: float
    merges: int
    splits: int

    @property
    def n_true(self) -> int:
        """True cells."""
        return self.whole.n_true

    @property
    def n_predicted(self) -> int:
        """Predicted cells."""
        return self.whole.n_predicted[0]

    @property
    def true_positives(self) -> tuple[int, ...]:
        """Matches at IoU >= each of ``thresholds``."""
        return self.whole.true_positives

    def matches_at(self, threshold: float) -> int:
        """True positives at ``threshold``; raises ``UsageError`` if the image was not scored there."""
        return self.true_positives[level_of(threshold, self.thresholds)]

    def f1_at(self, threshold: float) -> float:
        """F1 = 2 TP / (true + predicted cells) at ``threshold``, 1.0 for an empty image found empty."""
        return _ratio(2 * self.matches_at(threshold), self.n_true + self.n_predicted)


def level_of(threshold: float, thresholds: Sequence[float]) -> int:
    """Index of ``threshold`` in ``thresholds``. Raises ``UsageError`` if it is not one of them."""
    for level, known in enumerate(thresholds):
        if abs(known - threshold) < 1e-9:
            return level
    raise UsageError(f"not scored at IoU {threshold:g}, only at {', '.join(f'{t:g}' for t in thresholds)}")


def score_image(
    true: npt.NDArray[np.integer[Any]],
    predicted: npt.NDArray[np.integer[Any]],
    *,
    min_area_px: int = MIN_AREA_PX,
    thresholds: Sequence[float] = MAP_THRESHOLDS,
    count_rule: CountRule = "all",
    field: Flags | None = None,
) -> ImageScore:
    """Compare two label images (h, w) of any integer type; numbers may have gaps.

    ``min_area_px``: smaller objects count as background on either side, except in ``dice`` and ``iou``.
    ``thresholds``: IoU levels in (0, 1]. ``count_rule``: which cells at the image border enter the count errors (and
    nothing else), see ``count_rules``; ``field``: bool (h, w), the field of view, whose edge the rule treats as border,
    None for the whole image. Pixels of ``true`` with the value 65535 are foreground of unknown instance: nothing counts
    there (``ignored.set_aside``). Raises ``UsageError`` if shapes differ or a value is invalid.
    """
    _check(true, predicted, min_area_px, thresholds)
    true, predicted = set_aside(true, predicted)
    overlap = overlap_table(true, predicted)
    kept_true = overlap.true_area >= min_area_px
    kept_predicted = overlap.predicted_area >= min_area_px
    kept = kept_true[overlap.true_index] & kept_predicted[overlap.predicted_index]
    true_index, predicted_index = overlap.true_index[kept], overlap.predicted_index[kept]
    common = overlap.common_px[kept]
    true_area, predicted_area = overlap.true_area[true_index], overlap.predicted_area[predicted_index]
    union = true_area + predicted_area - common

    clumps = kept_true & looks_like_several(true, overlap, kept_true)
    swallowed = in_clumps(overlap, clumps)
    image_hw = (true.shape[0], true.shape[1])
    true_boxes, predicted_boxes = boxes(true, overlap.true_number), boxes(predicted, overlap.predicted_number)
    border_true = ~counted(true_boxes, image_hw, "exclude-border")
    border_predicted = ~counted(predicted_boxes, image_hw, "exclude-border")

    def let_in(labels: npt.NDArray[np.integer[Any]], number: Ints, box: Ints, area: Ints, kept: Flags) -> Flags:
        """Whether each cell is ``kept`` (n,) and passes the count rule; specks must not influence the typical cell."""
        at_edge = None if field is None else edges(labels, field, int(labels.max(initial=0)))[number - 1][kept]
        result = np.zeros_like(kept)
        result[kept] = counted(box[kept], image_hw, count_rule, at_edge, areas_px=area[kept])
        return result

    counted_true = let_in(true, overlap.true_number, true_boxes, overlap.true_area, kept_true)
    counted_predicted = let_in(
        predicted, overlap.predicted_number, predicted_boxes, overlap.predicted_area, kept_predicted
    )
    doubtful = border_predicted | in_clumps(overlap, border_true)

    nearby = [at_least(common, union, float(t)) for t in thresholds]
    strict = 2 * common > union
    choices = [bool((near & ~strict).any()) for near in nearby]  # above IoU 0.5 a cell has at most one partner

    def matches(true_cells: Flags, predicted_cells: Flags) -> tuple[int, ...]:
        among = true_cells[true_index] & predicted_cells[predicted_index]
        return tuple(
            len(match(true_index, predicted_index, near & among)) if several else int((near & among).sum())
            for near, several in zip(nearby, choices, strict=True)
        )

    def sums(true_cells: Flags, predicted_cells: Flags) -> CellSums:
        return CellSums(
            n_true=int(true_cells.sum()),
            n_predicted=(int(predicted_cells.sum()),) * len(nearby),
            true_positives=matches(true_cells, predicted_cells),
            counted=(
                int((true_cells & counted_true).sum()),
                int((predicted_cells & counted_predicted).sum()),
            ),
        )

    inner_true = kept_true & ~border_true
    inner = sums(inner_true, kept_predicted & ~doubtful)
    # Growing a matching along augmenting paths keeps matched cells matched: the growth comes from the other cells.
    positives = matches(inner_true, kept_predicted)
    found = tuple(
        n + more - fewer for n, more, fewer in zip(inner.n_predicted, positives, inner.true_positives, strict=True)
    )
    holds_true = predicted_index[2 * common > true_area]
    holds_predicted = true_index[2 * common > predicted_area]
    return ImageScore(
        thresholds=tuple(float(t) for t in thresholds),
        whole=sums(kept_true, kept_predicted),
        apart=sums(kept_true & ~clumps, kept_predicted & ~swallowed),
        inner=CellSums(inner.n_true, found, positives, counted=None),
        foreground=_foreground(overlap, np.zeros_like(border_true), np.zeros_like(border_predicted)),
        inner_foreground=_foreground(overlap, border_true, border_predicted),
        strict_matches=int(strict.sum()),
        strict_iou=float((common[strict] / union[strict]).sum()),
        merges=int((np.bincount(holds_true) >= 2).sum()),
        splits=int((np.bincount(holds_predicted) >= 2).sum()),
    )


def _foreground(overlap: OverlapTable, without_true: Flags, without_predicted: Flags) -> ForegroundSums:
    """Foreground sums over pixels outside the objects ``without_true`` (n_true,) and ``without_predicted``."""
    out_true, out_predicted = without_true[overlap.true_index], without_predicted[overlap.predicted_index]
    common = overlap.common_px
    return ForegroundSums(
        true_px=int(overlap.true_area[~without_true].sum() - common[~out_true & out_predicted].sum()),
        predicted_px=int(overlap.predicted_area[~without_predicted].sum() - common[out_true & ~out_predicted].sum()),
        common_px=int(common[~out_true & ~out_predicted].sum()),
    )


def looks_like_several(
    true: npt.NDArray[np.integer[Any]], overlap: OverlapTable, kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Whether each object of ``true`` looks like several cells, bool (n_true,) in the order of ``overlap``.

    ``kept``: whether each is a cell and not a speck; only these form the median and are examined.
    """
    result = np.zeros(len(kept), np.bool_)
    if kept.any():
        large = np.flatnonzero(kept & (overlap.true_area > CLUMP_AREA * np.median(overlap.true_area[kept])))
        result[large] = solidities(true, overlap.true_number[large]) < CLUMP_SOLIDITY
    return result


def in_clumps(overlap: OverlapTable, clumps: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether each predicted object has more than half of its area in one object of ``clumps``, bool (n_predicted,).

    ``clumps``: bool (n_true,), clumps or other true objects that are left out.
    """
    result = np.zeros(len(overlap.predicted_area), np.bool_)
    mostly = 2 * overlap.common_px > overlap.predicted_area[overlap.predicted_index]
    result[overlap.predicted_index[mostly & clumps[overlap.true_index]]] = True
    return result


def pool(scores: Sequence[ImageScore]) -> dict[str, float]:
    """Metrics of one or more images under the names of ``metrics.json``; see the module's definitions.

    Counts (``merges``, ``splits``, ``n_*``) are ints. Raises ``UsageError`` if there are no scores, IoU 0.5 is not
    among the thresholds, or the thresholds differ between images.
    """
    if not scores:
        raise UsageError("no image was scored; there is nothing to pool")
    thresholds = scores[0].thresholds
    if any(score.thresholds != thresholds for score in scores):
        raise UsageError("images were scored at different IoU thresholds; use the same thresholds for all")
    n_true = sum(score.n_true for score in scores)
    n_predicted = sum(score.n_predicted for score in scores)
    strict_iou = sum(score.strict_iou for score in scores)
    whole, apart, inner = (
        _found(cells, thresholds)
        for cells in (
            [score.whole for score in scores],
            [score.apart for score in scores],
            [score.inner for score in scores],
        )
    )
    inner |= {"dice": _dice_iou([score.inner_foreground for score in scores])[0]}
    dice, iou = _dice_iou([score.foreground for score in scores])
    del apart["map"]
    errors = [f"count_{name}" for name in ("mae", "bias", "mape")]
    return {
        "dice": dice,
        "iou": iou,
        **{name: value for name, value in whole.items() if name not in errors},
        # TP + FP/2 + FN/2 = (true + predicted) / 2, whatever the number of matches.
        "pq_strict": _ratio(2 * strict_iou, n_true + n_predicted),
        **{name: whole[name] for name in errors},
        **{f"{name}_apart": value for name, value in apart.items()},
        **{f"{name}_inner": value for name, value in inner.items()},
        "merges": sum(score.merges for score in scores),
        "splits": sum(score.splits for score in scores),
        "n_images": len(scores),
        "n_true": n_true,
        "n_predicted": n_predicted,
        "n_clumps": n_true - sum(score.apart.n_true for score in scores),
        "n_border": n_true - sum(score.inner.n_true for score in scores),
    }


def _found(cells: Sequence[CellSums], thresholds: Sequence[float]) -> dict[str, float]:
    """F1, precision, recall and mean AP of the cells of some images, and their count errors."""
    n_true = sum(image.n_true for image in cells)
    n_predicted = [sum(level) for level in zip(*(image.n_predicted for image in cells), strict=True)]
    positives = [sum(level) for level in zip(*(image.true_positives for image in cells), strict=True)]
    at = level_of(F1_THRESHOLD, thresholds)
    return {
        "f1": _ratio(2 * positives[at], n_true + n_predicted[at]),
        "precision": _share(positives[at], n_predicted[at], n_true),
        "recall": _share(positives[at], n_true, n_predicted[at]),
        "map": float(np.mean([_ratio(tp, n_true + n - tp) for tp, n in zip(positives, n_predicted, strict=True)])),
        **_count_errors([image.counts(at) for image in cells]),
    }


def _dice_iou(images: Sequence[ForegroundSums]) -> tuple[float, float]:
    common = sum(image.common_px for image in images)
    both = sum(image.true_px + image.predicted_px for image in images)
    return _ratio(2 * common, both), _ratio(common, both - common)


def _count_errors(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Mean count errors over images. ``counts``: (true, predicted) cells per image."""
    cells, found = np.array(counts, np.float64).T
    error, has_cells = found - cells, cells > 0
    return {
        "count_mae": float(np.abs(error).mean()),
        "count_bias": float(error.mean()),
        "count_mape": float((np.abs(error[has_cells]) / cells[has_cells]).mean()) if has_cells.any() else float("nan"),
    }


@dataclass(frozen=True)
class OverlapTable:
    """Pixels shared by true and predicted objects: the contingency table without its zeros.

    ``true_area``, ``predicted_area``: int64, px of each object, in order of number; the numbers themselves are in
    ``true_number`` and ``predicted_number``. Entry i: objects ``true_index[i]`` and ``predicted_index[i]`` have
    ``common_px[i]`` > 0 pixels in common.
    """

    true_number: Ints
    predicted_number: Ints
    true_area: Ints
    predicted_area: Ints
    true_index: Ints
    predicted_index: Ints
    common_px: Ints


def overlap_table(true: npt.NDArray[np.integer[Any]], predicted: npt.NDArray[np.integer[Any]]) -> OverlapTable:
    """Count the pixels of each true object, each predicted object and each overlap (exact integers)."""
    flat_true, flat_predicted = true.reshape(-1), predicted.reshape(-1)
    # Stretches in which neither number changes are far fewer than pixels, so the sort below is cheap.
    changes = flat_true[1:] != flat_true[:-1]
    changes |= flat_predicted[1:] != flat_predicted[:-1]
    start = np.concatenate([np.zeros(min(true.size, 1), np.int64), np.flatnonzero(changes) + 1])
    length = np.diff(start, append=true.size)
    true_label, true_at = np.unique(flat_true[start], return_inverse=True)
    predicted_label, predicted_at = np.unique(flat_predicted[start], return_inverse=True)
    for side, label in (("true", true_label), ("predicted", predicted_label)):
        if label.size and label[0] < 0:
            raise UsageError(f"{side} labels must be 0 (background) or positive, found {label[0]}")
    pair, pair_at = np.unique(true_at * np.int64(len(predicted_label)) + predicted_at, return_inverse=True)
    common = _sum_by(pair_at, length, len(pair))
    true_index, predicted_index = np.divmod(pair, max(len(predicted_label), 1))
    # The background, if there is any, sorts first; its row and column are not objects.
    no_true, no_predicted = int(0 in true_label[:1]), int(0 in predicted_label[:1])
    objects = (true_index >= no_true) & (predicted_index >= no_predicted)
    return OverlapTable(
        true_number=true_label[no_true:].astype(np.int64),
        predicted_number=predicted_label[no_predicted:].astype(np.int64),
        true_area=_sum_by(true_at, length, len(true_label))[no_true:],
        predicted_area=_sum_by(predicted_at, length, len(predicted_label))[no_predicted:],
        true_index=true_index[objects] - no_true,
        predicted_index=predicted_index[objects] - no_predicted,
        common_px=common[objects],
    )


def _sum_by(index: Ints, amount: Ints, n: int) -> Ints:
    """Sum of ``amount`` by ``index`` (exact: bincount's doubles hold integers up to 2^53)."""
    return np.bincount(index, weights=amount, minlength=n).astype(np.int64)


def at_least(common: Ints, union: Ints, threshold: float) -> npt.NDArray[np.bool_]:
    """Whether IoU >= ``threshold``, compared in integers so that 3/5 passes 0.6, which 0.6 * 5 <= 3 in floats may not.

    The intended decimal is the nearest fraction with a small denominator.
    """
    exact = Fraction(threshold).limit_denominator(10_000)
    passes: npt.NDArray[np.bool_] = common * exact.denominator >= union * exact.numerator
    return passes


def match(true_index: Ints, predicted_index: Ints, may_match: npt.NDArray[np.bool_]) -> Ints:
    """Find a maximum one-to-one matching among the pairs that ``may_match``: positions in the three arrays, ascending.

    Above IoU 0.5 a cell has at most one partner. At 0.5 both halves of a cell can qualify, and below it there is no
    limit, so a true maximum matching (Hopcroft-Karp) is needed; it is cheap.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    allowed = np.flatnonzero(may_match)
    rows, columns = true_index[allowed], predicted_index[allowed]
    if not len(rows):
        return allowed
    graph = coo_matrix((np.ones(len(rows), np.bool_), (rows, columns))).tocsr()
    partner = maximum_bipartite_matching(graph, perm_type="column")
    return np.asarray(allowed[partner[rows] == columns], np.int64)


def _ratio(part: float, whole: float) -> float:
    """``part / whole``; 1.0 if ``whole`` is 0, because there are no false negatives and no false positives."""
    return float(part / whole) if whole else 1.0


def _share(part: int, whole: int, other_side: int) -> float:
    """``part / whole`` for a ratio over one side: 0.0 if only that side is empty, 1.0 if both are."""
    return float(part / whole) if whole else float(other_side == 0)


def _check(true: npt.NDArray[Any], predicted: npt.NDArray[Any], min_area_px: int, thresholds: Sequence[float]) -> None:
    check_labels(true)
    check_labels(predicted)
    if true.shape != predicted.shape:
        raise UsageError(f"true labels are {true.shape}, predicted labels {predicted.shape}; they must be of one size")
    if not min_area_px >= 0:
        raise UsageError(f"min_area_px must be 0 or more, got {min_area_px}")
    wrong = [t for t in thresholds if not 0 < t <= 1]
    if wrong or not thresholds:
        raise UsageError(f"IoU thresholds must lie in (0, 1], got {list(thresholds)}")
