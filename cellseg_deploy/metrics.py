"""Do the labels agree with the truth? Dice, IoU, matched cells, F1, AP, count error, merges and splits.

Definitions
    *Match*: a true and a predicted cell may be matched if their IoU >= t; each takes part in at most one match, and
    the number of matches is the largest possible. TP = matches, FP and FN = unmatched predicted and true cells.
    ``f1``, ``precision``, ``recall``: at t = 0.5. ``map``: mean over t = 0.50:0.05:0.95 of TP / (TP + FP + FN); this is
    what Cellpose calls average precision and StarDist accuracy, not COCO's ranked AP.
    ``pq_strict``: panoptic quality, sum of matched IoU / (TP + FP/2 + FN/2), with IoU > 0.5
    (Kirillov et al., Panoptic Segmentation, CVPR 2019). Two equal cells merged into one lie exactly at IoU 0.5: a
    match for ``f1``, none for ``pq_strict``.
    ``merges``: predicted cells that hold more than half the area of each of two or more true cells; ``splits``: true
    cells that hold more than half of each of two or more predicted ones.
    ``dice``, ``iou``: of the two foreground masks over all pixels, specks included.
    ``count_bias``: mean of predicted - true cells an image; ``count_mae``: of its absolute value; ``count_mape``:
    mean of |predicted - true| / true as a fraction, over the images that have a true cell (NaN if none has).

Pooling: pixels, TP, FP and FN are summed over images before a ratio is formed, as stardist's
``matching_dataset(by_image=False)`` does; the count errors are means over images.

Where nothing is there to be divided: an empty field that was found empty is perfect (1.0, StarDist says 0); with
cells on one side only, every ratio is 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.runs import Ints, check_labels

MAP_THRESHOLDS: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
F1_THRESHOLD = 0.5
MIN_AREA_PX = 200
"""Objects below this area, in px of the mask as it is, are specks: neither true nor predicted cells."""


@dataclass(frozen=True)
class ImageScore:
    """Sums of one image from which every metric follows, alone or pooled.

    ``true_positives[i]``: matches at IoU >= ``thresholds[i]``. ``strict_matches``, ``strict_iou``: number and summed
    IoU of the pairs with IoU > 0.5. ``*_px``: foreground pixels of truth, prediction and both.
    """

    n_true: int
    n_predicted: int
    thresholds: tuple[float, ...]
    true_positives: tuple[int, ...]
    strict_matches: int
    strict_iou: float
    merges: int
    splits: int
    true_px: int
    predicted_px: int
    common_px: int

    def matches_at(self, threshold: float) -> int:
        """True positives at ``threshold``; raises ``UsageError`` if the image was not scored there."""
        for known, matches in zip(self.thresholds, self.true_positives, strict=True):
            if abs(known - threshold) < 1e-9:
                return matches
        raise UsageError(f"not scored at IoU {threshold:g}, only at {', '.join(f'{t:g}' for t in self.thresholds)}")

    def f1_at(self, threshold: float) -> float:
        """F1 = 2 TP / (true + predicted cells) at ``threshold``, 1.0 for an empty image found empty."""
        return _ratio(2 * self.matches_at(threshold), self.n_true + self.n_predicted)


def score_image(
    true: npt.NDArray[np.integer[Any]],
    predicted: npt.NDArray[np.integer[Any]],
    *,
    min_area_px: int = MIN_AREA_PX,
    thresholds: Sequence[float] = MAP_THRESHOLDS,
) -> ImageScore:
    """Compare two label images (h, w) of any integer type; numbers may have gaps.

    ``min_area_px``: smaller objects count as background on either side, except in ``dice`` and ``iou``.
    ``thresholds``: IoU levels in (0, 1]. Raises ``UsageError`` if shapes differ or a value cannot be meant.
    """
    _check(true, predicted, min_area_px, thresholds)
    overlap = overlap_table(true, predicted)
    kept_true = overlap.true_area >= min_area_px
    kept_predicted = overlap.predicted_area >= min_area_px
    kept = kept_true[overlap.true_index] & kept_predicted[overlap.predicted_index]
    true_index, predicted_index = overlap.true_index[kept], overlap.predicted_index[kept]
    common = overlap.common_px[kept]
    true_area, predicted_area = overlap.true_area[true_index], overlap.predicted_area[predicted_index]
    union = true_area + predicted_area - common

    strict = 2 * common > union
    holds_true = predicted_index[2 * common > true_area]
    holds_predicted = true_index[2 * common > predicted_area]
    return ImageScore(
        n_true=int(kept_true.sum()),
        n_predicted=int(kept_predicted.sum()),
        thresholds=tuple(float(t) for t in thresholds),
        true_positives=tuple(
            _count_matches(true_index, predicted_index, _at_least(common, union, float(t))) for t in thresholds
        ),
        strict_matches=int(strict.sum()),
        strict_iou=float((common[strict] / union[strict]).sum()),
        merges=int((np.bincount(holds_true) >= 2).sum()),
        splits=int((np.bincount(holds_predicted) >= 2).sum()),
        true_px=int(overlap.true_area.sum()),
        predicted_px=int(overlap.predicted_area.sum()),
        common_px=int(overlap.common_px.sum()),
    )


def pool(scores: Sequence[ImageScore]) -> dict[str, float]:
    """Metrics of one or many images under the names of ``metrics.json``; see the module's definitions.

    Counts (``merges``, ``splits``, ``n_*``) are ints. Raises ``UsageError`` if there is no score, or if IoU 0.5 was
    not among the thresholds, or the thresholds differ between images.
    """
    if not scores:
        raise UsageError("no image was scored; there is nothing to pool")
    thresholds = scores[0].thresholds
    if any(score.thresholds != thresholds for score in scores):
        raise UsageError("images were scored at different IoU thresholds; score them all alike")
    n_true = sum(score.n_true for score in scores)
    n_predicted = sum(score.n_predicted for score in scores)
    matches = sum(score.matches_at(F1_THRESHOLD) for score in scores)
    matches_by_threshold = [sum(level) for level in zip(*(score.true_positives for score in scores), strict=True)]
    strict_iou = sum(score.strict_iou for score in scores)
    common_px = sum(score.common_px for score in scores)
    both_px = sum(score.true_px + score.predicted_px for score in scores)
    error = np.array([score.n_predicted - score.n_true for score in scores], np.float64)
    cells = np.array([score.n_true for score in scores], np.float64)
    has_cells = cells > 0
    return {
        "dice": _ratio(2 * common_px, both_px),
        "iou": _ratio(common_px, both_px - common_px),
        "f1": _ratio(2 * matches, n_true + n_predicted),
        "precision": _share(matches, n_predicted, n_true),
        "recall": _share(matches, n_true, n_predicted),
        "map": float(np.mean([_ratio(tp, n_true + n_predicted - tp) for tp in matches_by_threshold])),
        # TP + FP/2 + FN/2 = (true + predicted) / 2, whatever the number of matches.
        "pq_strict": _ratio(2 * strict_iou, n_true + n_predicted),
        "count_mae": float(np.abs(error).mean()),
        "count_bias": float(error.mean()),
        "count_mape": float((np.abs(error[has_cells]) / cells[has_cells]).mean()) if has_cells.any() else float("nan"),
        "merges": sum(score.merges for score in scores),
        "splits": sum(score.splits for score in scores),
        "n_images": len(scores),
        "n_true": n_true,
        "n_predicted": n_predicted,
    }


@dataclass(frozen=True)
class OverlapTable:
    """Which true and predicted objects share pixels: the contingency table without its zeros.

    ``true_area``, ``predicted_area``: int64, px of each object, by index (order of its number). Entry i: objects
    ``true_index[i]`` and ``predicted_index[i]`` have ``common_px[i]`` > 0 pixels in common.
    """

    true_area: Ints
    predicted_area: Ints
    true_index: Ints
    predicted_index: Ints
    common_px: Ints


def overlap_table(true: npt.NDArray[np.integer[Any]], predicted: npt.NDArray[np.integer[Any]]) -> OverlapTable:
    """Count the pixels that each true and predicted object have alone and together (exact integers)."""
    flat_true, flat_predicted = true.reshape(-1), predicted.reshape(-1)
    # Stretches over which neither number changes: far fewer than pixels, so the sort below is cheap.
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
    # The background, where there is any, sorts first; its row and column are no objects.
    no_true, no_predicted = int(0 in true_label[:1]), int(0 in predicted_label[:1])
    objects = (true_index >= no_true) & (predicted_index >= no_predicted)
    return OverlapTable(
        true_area=_sum_by(true_at, length, len(true_label))[no_true:],
        predicted_area=_sum_by(predicted_at, length, len(predicted_label))[no_predicted:],
        true_index=true_index[objects] - no_true,
        predicted_index=predicted_index[objects] - no_predicted,
        common_px=common[objects],
    )


def _sum_by(index: Ints, amount: Ints, n: int) -> Ints:
    """Sum of ``amount`` by ``index`` (exact: bincount's doubles hold integers up to 2^53)."""
    return np.bincount(index, weights=amount, minlength=n).astype(np.int64)


def _at_least(common: Ints, union: Ints, threshold: float) -> npt.NDArray[np.bool_]:
    """IoU >= ``threshold``, compared as whole numbers so that 3/5 passes 0.6, which 0.6 * 5 <= 3 in floats may not.

    The decimal that was meant is the fraction of small denominator next to the float.
    """
    exact = Fraction(threshold).limit_denominator(10_000)
    passes: npt.NDArray[np.bool_] = common * exact.denominator >= union * exact.numerator
    return passes


def _count_matches(true_index: Ints, predicted_index: Ints, may_match: npt.NDArray[np.bool_]) -> int:
    """Size of the largest one-to-one matching among the allowed pairs.

    Above IoU 0.5 a cell has at most one partner. At 0.5 two halves of a cell can both qualify, below it anything can:
    a real maximum matching (Hopcroft-Karp) is needed, and it is cheap.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    rows, columns = true_index[may_match], predicted_index[may_match]
    if not len(rows):
        return 0
    graph = coo_matrix((np.ones(len(rows), np.bool_), (rows, columns))).tocsr()
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def _ratio(part: float, whole: float) -> float:
    """``part / whole``; 1.0 where there is nothing at all, because nothing was missed and nothing invented."""
    return float(part / whole) if whole else 1.0


def _share(part: int, whole: int, other_side: int) -> float:
    """``part / whole``, for a ratio that looks at one side only: 0.0 if just that side is empty, 1.0 if both are."""
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
