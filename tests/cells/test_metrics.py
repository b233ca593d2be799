"""Metrics against cases worked out by hand and against stored values of other people's code."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from cellseg_deploy.cells.metrics import MAP_THRESHOLDS, ImageScore, overlap_table, pool, score_image
from cellseg_deploy.errors import UsageError

Labels = npt.NDArray[np.int32]

KEYS = [
    *("dice", "iou", "f1", "precision", "recall", "map", "pq_strict"),
    *("count_mae", "count_bias", "count_mape"),
    *("f1_apart", "precision_apart", "recall_apart", "count_mae_apart", "count_bias_apart", "count_mape_apart"),
    *("f1_inner", "precision_inner", "recall_inner", "map_inner"),
    *("count_mae_inner", "count_bias_inner", "count_mape_inner", "dice_inner"),
    *("merges", "splits", "n_images", "n_true", "n_predicted", "n_clumps", "n_border"),
]


def image(*boxes: tuple[int, int, int, int], hw: tuple[int, int] = (40, 60)) -> Labels:
    """Rectangles (top, left, height, width), numbered from 1."""
    labels = np.zeros(hw, np.int32)
    for number, (top, left, height, width) in enumerate(boxes, start=1):
        labels[top : top + height, left : left + width] = number
    return labels


def score(true: Labels, predicted: Labels, min_area_px: int = 0) -> ImageScore:
    return score_image(true, predicted, min_area_px=min_area_px)


def test_keys_are_those_of_the_report() -> None:
    assert list(pool([score(image(), image())])) == KEYS


def test_identical_labels_are_perfect() -> None:
    labels = image((0, 0, 10, 10), (20, 20, 10, 20))
    metrics = pool([score(labels, labels)])
    assert [metrics[key] for key in KEYS] == (
        [1] * 7 + [0] * 3 + [1] * 3 + [0] * 3 + [1] * 4 + [0] * 3 + [1] + [0] * 2 + [1, 2, 2, 0, 1]
    )


def test_shifted_square_by_hand() -> None:
    """10 x 10, shifted by 2: 80 px in common of 120, IoU 2/3, Dice 0.8. Matches at 0.50, 0.55, 0.60, 0.65."""
    metrics = pool([score(image((0, 0, 10, 10)), image((0, 2, 10, 10)))])
    assert metrics["dice"] == 0.8
    assert metrics["iou"] == 80 / 120
    assert metrics["f1"] == 1
    assert metrics["map"] == 4 / 10
    assert metrics["pq_strict"] == 80 / 120


def test_shifted_disc_against_the_lens_formula() -> None:
    """Two discs of radius 30, centres 12 apart: the lens has area 2 r^2 acos(d/2r) - d/2 sqrt(4 r^2 - d^2)."""
    rows, columns = np.ogrid[:80, :100]
    true, predicted = (((rows - 40) ** 2 + (columns - x) ** 2 <= 900).astype(np.int32) for x in (40, 52))
    lens = 2 * 900 * math.acos(12 / 60) - 6 * math.sqrt(3600 - 144)
    expected = lens / (2 * math.pi * 900 - lens)
    metrics = pool([score(true, predicted)])
    assert metrics["iou"] == pytest.approx(expected, abs=0.005)
    assert metrics["map"] == sum(t <= expected for t in MAP_THRESHOLDS) / 10


@pytest.mark.parametrize(
    ("common", "union", "threshold", "matches"),
    [(3, 5, 0.6, 1), (11, 20, 0.55, 1), (7, 10, 0.7, 1), (59_999, 100_000, 0.6, 0), (9, 10, 0.9, 1), (1, 2, 0.5, 1)],
)
def test_iou_is_compared_exactly(common: int, union: int, threshold: float, matches: int) -> None:
    """IoU exactly on a threshold passes, whatever the float; one pixel in 100,000 less does not."""
    true = np.zeros((1, union), np.int32)
    true[0, :common] = 1
    whole = np.ones((1, union), np.int32)
    assert score_image(true, whole, min_area_px=0, thresholds=(threshold,)).true_positives == (matches,)


def test_thresholds_may_come_from_arange() -> None:
    """np.arange(0.5, 1, 0.05) holds 0.6000000000000001 and its like; they mean the decimals all the same."""
    computed = tuple(np.arange(0.5, 1, 0.05).tolist())
    assert computed != MAP_THRESHOLDS
    true = np.zeros((1, 20), np.int32)
    for index, common in enumerate(range(10, 20)):  # IoU 10/20, 11/20, ...
        true[0, :common] = 1
        result = score_image(true, np.ones((1, 20), np.int32), min_area_px=0, thresholds=computed)
        assert result.true_positives == (1,) * (index + 1) + (0,) * (9 - index)
        assert result.matches_at(MAP_THRESHOLDS[index]) == 1


def test_two_equal_cells_merged_into_one() -> None:
    """IoU is exactly 0.5 with either: one match, so F1 = 2/3; strictly above 0.5 there is none."""
    true, merged = image((0, 0, 10, 10), (0, 10, 10, 10)), image((0, 0, 10, 20))
    metrics = pool([score(true, merged)])
    assert metrics["f1"] == 2 / 3
    assert (metrics["precision"], metrics["recall"]) == (1, 0.5)
    assert metrics["pq_strict"] == 0
    assert metrics["dice"] == 1
    assert (metrics["merges"], metrics["splits"]) == (1, 0)
    assert metrics["count_bias"] == -1
    assert metrics["count_mape"] == 0.5
    swapped = pool([score(merged, true)])
    assert (swapped["f1"], swapped["merges"], swapped["splits"]) == (2 / 3, 0, 1)


def test_two_halves_cannot_both_match() -> None:
    """At 0.5 both halves qualify; the other true cell is matched by its own: 2 of 2 true, 2 of 3 predicted."""
    true = image((0, 0, 10, 20), (20, 0, 10, 10))
    predicted = image((0, 0, 10, 10), (0, 10, 10, 10), (20, 0, 10, 10))
    assert score(true, predicted).matches_at(0.5) == 2


def test_maximum_matching_below_a_half_needs_an_augmenting_path() -> None:
    """Rows of 12: true A 0-7, B 8-15; predicted a 4-11, b 0-3. A may take a or b, B only a: 2 matches, not 1."""
    true = np.repeat(np.array([[1] * 8 + [2] * 8], np.int32), 4, axis=0)
    predicted = np.repeat(np.array([[2] * 4 + [1] * 8 + [0] * 4], np.int32), 4, axis=0)
    assert score_image(true, predicted, min_area_px=0, thresholds=(0.3,)).true_positives == (2,)


def test_both_empty_is_perfect() -> None:
    metrics = pool([score(image(), image())])
    assert [metrics[key] for key in KEYS[:7]] == [1] * 7
    assert (metrics["count_mae"], metrics["n_images"], metrics["n_true"], metrics["n_predicted"]) == (0, 1, 0, 0)
    assert math.isnan(metrics["count_mape"])


@pytest.mark.parametrize("swap", [False, True])
def test_cells_on_one_side_only_are_all_wrong(swap: bool) -> None:
    cells, empty = image((0, 0, 10, 10), (20, 20, 10, 10)), image()
    metrics = pool([score(cells, empty) if swap else score(empty, cells)])
    assert [metrics[key] for key in KEYS[:7]] == [0] * 7
    assert metrics["count_bias"] == (-2 if swap else 2)


def test_no_background_pixel() -> None:
    full = image((0, 0, 40, 30), (0, 30, 40, 30))
    metrics = pool([score(full, full)])
    assert [metrics[key] for key in KEYS[:7]] == [1] * 7
    assert metrics["n_true"] == 2


def test_specks_are_no_cells_but_their_pixels_count() -> None:
    """A true speck of 9 px is dropped before matching, a predicted one too; Dice sees both."""
    true = image((0, 0, 10, 10), (20, 20, 3, 3))
    predicted = image((0, 0, 10, 10), (30, 40, 3, 3))
    metrics = pool([score(true, predicted, min_area_px=10)])
    assert (metrics["f1"], metrics["n_true"], metrics["n_predicted"]) == (1, 1, 1)
    assert metrics["dice"] == 200 / 218
    assert pool([score(true, predicted, min_area_px=9)])["f1"] == 0.5


def test_merges_and_splits_need_more_than_half_of_each() -> None:
    """A predicted cell over one whole cell and exactly half of another is no merge; one pixel more is."""
    true = image((0, 0, 10, 10), (0, 10, 10, 10))
    half = image((0, 0, 10, 15))
    assert score(true, half).merges == 0
    half[0, 15] = 1
    assert score(true, half).merges == 1


def test_pooling_sums_before_dividing() -> None:
    """An image with 1 of 1 right and one with 0 of 3: pooled recall 1/4, not the mean 1/2."""
    right = score(image((0, 0, 10, 10)), image((0, 0, 10, 10)))
    wrong = score(image((0, 0, 5, 5), (10, 0, 5, 5), (20, 0, 5, 5)), image((30, 50, 5, 5)))
    empty = score(image(), image((0, 0, 5, 5)))
    metrics = pool([right, wrong, empty])
    assert metrics["recall"] == 1 / 4
    assert metrics["precision"] == 1 / 3
    assert metrics["f1"] == 2 / (4 + 3)
    assert metrics["count_mae"] == (0 + 2 + 1) / 3
    assert metrics["count_bias"] == (0 - 2 + 1) / 3
    assert metrics["count_mape"] == (0 + 2 / 3) / 2
    assert metrics["dice"] == 2 * 100 / (100 + 100 + 75 + 25 + 25)


def test_numbering_does_not_matter() -> None:
    true, predicted = synthetic_pair(3)
    table = np.random.default_rng(0).permutation(1000)[: predicted.max() + 1] * 2_000_003 + 5
    table[0] = 0
    for renumbered in (table[predicted], predicted.astype(np.uint16)):
        assert score_image(true, renumbered, min_area_px=0) == score(true, predicted)


def test_overlap_table_by_hand() -> None:
    true = np.array([[0, 7, 7, 7], [0, 0, 9, 9]], np.uint16)
    predicted = np.array([[4, 4, 4, 0], [0, 0, 0, 5]], np.int32)
    table = overlap_table(true, predicted)
    assert table.true_area.tolist() == [3, 2]
    assert table.predicted_area.tolist() == [3, 1]
    entries = zip(table.true_index.tolist(), table.predicted_index.tolist(), table.common_px.tolist(), strict=True)
    assert sorted(entries) == [(0, 0, 2), (1, 1, 1)]


def disc(shape: tuple[int, int], y: float, x: float, radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    inside: npt.NDArray[np.bool_] = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return inside


def synthetic_pair(seed: int, n_cells: int = 30, shape: tuple[int, int] = (180, 240)) -> tuple[Labels, Labels]:
    """Truth and a prediction with shifts, misses, inventions, merges and splits; every step from one seed."""
    rng = np.random.default_rng(seed)
    true, predicted = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number in range(1, n_cells + 1):
        y, x, radius = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(6, 16)
        fate, shift_y, shift_x, grow = rng.uniform(), rng.normal(0, 2.5), rng.normal(0, 2.5), rng.normal(1, 0.12)
        true[disc(shape, y, x, radius)] = number
        if fate < 0.1:
            continue
        found = disc(shape, y + shift_y, x + shift_x, radius * grow)
        predicted[found] = number
        if fate > 0.9:
            found[:, : int(max(x, 0))] = False
            predicted[found] = number + 100
        if 0.8 < fate < 0.9:
            predicted[predicted == max(number - 1, 1)] = number
        if 0.7 < fate < 0.8:
            predicted[disc(shape, shape[0] - y, shape[1] - x, 7)] = number + 200
    return true, predicted


# stardist.matching.matching_dataset(true, predicted, thresh=t, by_image=False) of stardist 0.9.2 (numpy 2.4.6) on
# synthetic_pair(0) ... synthetic_pair(5): t, tp, fp, fn, precision, recall, f1, accuracy.
STARDIST = [
    (0.3, 144, 47, 35, 0.7539267015706806, 0.8044692737430168, 0.7783783783783784, 0.6371681415929203),
    (0.5, 97, 94, 82, 0.5078534031413613, 0.5418994413407822, 0.5243243243243243, 0.3553113553113553),
    (0.6, 76, 115, 103, 0.39790575916230364, 0.4245810055865922, 0.41081081081081083, 0.2585034013605442),
    (0.75, 34, 157, 145, 0.17801047120418848, 0.18994413407821228, 0.1837837837837838, 0.10119047619047619),
    (0.9, 3, 188, 176, 0.015706806282722512, 0.01675977653631285, 0.016216216216216217, 0.008174386920980926),
]
# The same by image at 0.5, stardist.matching.matching: tp, fp, fn.
STARDIST_BY_IMAGE = [(13, 17, 17), (19, 17, 11), (13, 18, 17), (16, 10, 14), (14, 21, 16), (22, 11, 7)]
# torchmetrics 1.9.0 PanopticQuality(things={1}, stuffs={0}) updated with the six images, class 1. It finds 96 matches:
# one pair has IoU exactly 0.5. Its IoU are single precision.
TORCHMETRICS_PQ = 0.3629519998312353


@pytest.mark.parametrize(("threshold", "tp", "fp", "fn", "precision", "recall", "f1", "accuracy"), STARDIST)
def test_same_as_stardist(
    *, threshold: float, tp: int, fp: int, fn: int, precision: float, recall: float, f1: float, accuracy: float
) -> None:
    scores = [score_image(*synthetic_pair(seed), min_area_px=0, thresholds=(threshold,)) for seed in range(6)]
    n_true, n_predicted = sum(s.n_true for s in scores), sum(s.n_predicted for s in scores)
    matches = sum(s.matches_at(threshold) for s in scores)
    assert (matches, n_predicted - matches, n_true - matches) == (tp, fp, fn)
    if threshold == 0.5:
        metrics = pool(scores)
        assert metrics["precision"] == pytest.approx(precision, abs=1e-12)
        assert metrics["recall"] == pytest.approx(recall, abs=1e-12)
        assert metrics["f1"] == pytest.approx(f1, abs=1e-12)
        assert metrics["map"] == pytest.approx(accuracy, abs=1e-12)  # the mean over this one threshold


@pytest.mark.parametrize("seed", range(6))
def test_same_as_stardist_by_image(seed: int) -> None:
    result = score(*synthetic_pair(seed))
    matches = result.matches_at(0.5)
    assert (matches, result.n_predicted - matches, result.n_true - matches) == STARDIST_BY_IMAGE[seed]


def test_strict_pq_is_that_of_torchmetrics() -> None:
    scores = [score(*synthetic_pair(seed)) for seed in range(6)]
    assert sum(s.strict_matches for s in scores) == 96
    assert pool(scores)["pq_strict"] == pytest.approx(TORCHMETRICS_PQ, abs=1e-7)


def test_wrong_input_is_refused() -> None:
    labels = image((0, 0, 10, 10))
    with pytest.raises(UsageError, match="one size"):
        score(labels, labels[:, :-1])
    with pytest.raises(UsageError, match="two-dimensional integer"):
        score_image(labels.astype(np.float32), labels)
    with pytest.raises(UsageError, match="positive"):
        score(labels, -labels)
    with pytest.raises(UsageError, match="thresholds"):
        score_image(labels, labels, thresholds=(0.0,))
    with pytest.raises(UsageError, match="thresholds"):
        score_image(labels, labels, thresholds=())
    with pytest.raises(UsageError, match="min_area_px"):
        score_image(labels, labels, min_area_px=-1)
    with pytest.raises(UsageError, match="nothing to pool"):
        pool([])
    at_nine_tenths = score_image(labels, labels, thresholds=(0.9,))
    assert at_nine_tenths.f1_at(0.9) == 1
    with pytest.raises(UsageError, match=r"not scored at IoU 0\.5"):
        pool([at_nine_tenths])
    with pytest.raises(UsageError, match="use the same thresholds for all"):
        pool([score(labels, labels), at_nine_tenths])
