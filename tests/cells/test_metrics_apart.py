"""Figures apart from clumps, and which cells at the border count: cases worked out by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cellseg_deploy.cells.count_rules import COUNT_RULES, CountRule, counted
from cellseg_deploy.cells.metrics import pool, score_image
from cellseg_deploy.errors import UsageError

Labels = npt.NDArray[np.int32]
HW = (100, 160)


def image(*shapes: list[tuple[int, int, int, int]]) -> Labels:
    """Each cell a list of boxes (top, left, height, width), numbered from 1."""
    labels = np.zeros(HW, np.int32)
    for number, boxes in enumerate(shapes, start=1):
        for top, left, height, width in boxes:
            labels[top : top + height, left : left + width] = number
    return labels


SINGLE = [[(5, left, 10, 10)] for left in (5, 25, 45)]
DUMBBELL = [(40, 10, 10, 10), (44, 20, 2, 4), (40, 24, 10, 10)]  # 208 px, hull far larger
HALVES = [[(40, 10, 10, 10)], [(40, 24, 10, 10)]]


def figures(true: Labels, predicted: Labels, **settings: object) -> dict[str, float]:
    return pool([score_image(true, predicted, min_area_px=0, **settings)])  # type: ignore[arg-type]


def test_who_parts_a_clump_is_not_punished() -> None:
    result = figures(image(*SINGLE, DUMBBELL), image(*SINGLE, *HALVES))
    assert (result["n_clumps"], result["f1"]) == (1, pytest.approx(2 * 3 / (4 + 5)))
    assert (result["f1_apart"], result["count_mae_apart"], result["count_mape_apart"]) == (1, 0, 0)
    assert (result["count_mae"], result["n_true"], result["n_predicted"]) == (1, 4, 5)


def test_who_leaves_a_clump_whole_is_not_rewarded() -> None:
    true = image(*SINGLE, DUMBBELL)
    result = figures(true, image(*SINGLE[:2], DUMBBELL))
    assert result["f1"] == pytest.approx(2 * 3 / (4 + 3))
    assert result["f1_apart"] == pytest.approx(2 * 2 / (3 + 2))
    assert (result["precision_apart"], result["recall_apart"]) == (1, pytest.approx(2 / 3))
    assert (result["count_bias_apart"], result["count_mape_apart"]) == (-1, pytest.approx(1 / 3))


def test_a_prediction_half_in_a_clump_is_still_judged() -> None:
    """Ten rows in the clump, ten below it: exactly half is not most of it."""
    half, most = [(40, 10, 20, 10)], [(40, 10, 19, 10)]
    true = image(*SINGLE, DUMBBELL)
    assert figures(true, image(*SINGLE, half))["precision_apart"] == 3 / 4
    assert figures(true, image(*SINGLE, most))["precision_apart"] == 1


def test_large_alone_or_odd_alone_is_no_clump() -> None:
    large = [(40, 10, 20, 20)]  # four times the median, but convex
    odd = [(40, 60, 4, 10), (44, 60, 6, 4)]  # an L of 64 px, solidity below 0.93
    assert figures(image(*SINGLE, large, odd), image())["n_clumps"] == 0
    bar = [(70, 10, 5, 26), (75, 10, 1, 1)]  # 131 px: above 1.3 times the median of 100, and convex but for one pixel
    assert figures(image(*SINGLE, bar), image())["n_clumps"] == 0
    assert figures(image(*SINGLE, [(70, 10, 13, 10), (74, 20, 1, 4)]), image())["n_clumps"] == 1  # 134 px with a tail
    assert figures(image(*SINGLE, [(70, 10, 12, 10), (74, 20, 1, 10)]), image())["n_clumps"] == 0  # 130 px: not above


def test_specks_do_not_lower_the_median() -> None:
    specks = [[(90, left, 1, 1)] for left in range(0, 80, 4)]
    small_and_odd = [(40, 60, 4, 10), (44, 60, 6, 4)]
    true = image(*SINGLE, small_and_odd, DUMBBELL, *specks)
    score = score_image(true, true, min_area_px=50)
    assert (score.n_true, score.apart.n_true, score.apart.n_predicted[0]) == (5, 4, 4)
    assert pool([score])["n_clumps"] == 1


def test_an_empty_image_and_one_with_nothing_but_clumps_apart() -> None:
    nothing = figures(image(), image())
    assert (nothing["f1_apart"], nothing["count_mae_apart"], nothing["n_clumps"]) == (1, 0, 0)
    assert np.isnan(nothing["count_mape_apart"])


BORDER = image(
    [(0, 40, 10, 10)],  # top
    [(90, 40, 10, 10)],  # bottom
    [(40, 0, 10, 10)],  # left
    [(40, 150, 10, 10)],  # right
    [(0, 0, 10, 10)],  # top left
    [(0, 150, 10, 10)],  # top right
    [(40, 40, 10, 10)],  # inside
    [(60, 1, 10, 10)],  # one pixel from the left
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("half", [1] * 8), ("all", [1] * 8), ("exclude-border", [0] * 6 + [1, 1]), ("frame", [1, 0, 0, 1, 0, 1, 1, 1])],
)
def test_which_cells_count(rule: CountRule, expected: list[int]) -> None:
    from cellseg_deploy.cells.measure import boxes, measure

    table = measure(BORDER)
    assert counted(table.boxes, HW, rule, areas_px=table.columns["area_px"]).tolist() == [
        bool(value) for value in expected
    ]
    assert np.array_equal(boxes(BORDER, np.arange(1, 9)), table.boxes)


@pytest.mark.parametrize("rule", COUNT_RULES)
def test_no_cell_is_no_trouble(rule: CountRule) -> None:
    assert counted(np.zeros((0, 4), np.int64), HW, rule, areas_px=np.zeros(0, np.int64)).shape == (0,)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="exclude-border"):
        counted(np.zeros((0, 4), np.int64), HW, "some")  # type: ignore[arg-type]


def test_the_frame_counts_each_cell_of_tiled_fields_once() -> None:
    """Discs scattered over a slide that four fields tile; with ``all`` those on the seams count more than once."""
    rng = np.random.default_rng(4)
    slide = np.zeros((200, 200), np.int32)
    y, x = np.mgrid[:200, :200]
    centres = [(cx, cy) for cx in range(12, 200, 22) for cy in range(12, 200, 22)]
    for number, (cx, cy) in enumerate(centres, start=1):
        dx, dy, radius = *rng.integers(-1, 2, size=2), rng.integers(5, 10)
        slide[(x - cx - dx) ** 2 + (y - cy - dy) ** 2 <= radius**2] = number
    from cellseg_deploy.cells.measure import measure

    totals = dict.fromkeys(COUNT_RULES, 0)
    for top in (0, 100):
        for left in (0, 100):
            field = slide[top : top + 100, left : left + 100]
            for rule in COUNT_RULES:
                table = measure(field)
                totals[rule] += int(counted(table.boxes, (100, 100), rule, areas_px=table.columns["area_px"]).sum())
    inside = len(centres)  # no disc touches the slide's own edge
    assert totals["frame"] == inside
    assert totals["exclude-border"] < inside < totals["all"]


def test_the_rule_changes_count_errors_and_nothing_else() -> None:
    predicted = np.where(BORDER == 3, 0, BORDER)  # the cell at the left is not found
    by_rule = {rule: figures(BORDER, predicted, count_rule=rule) for rule in COUNT_RULES}
    assert [by_rule[rule]["count_mae"] for rule in COUNT_RULES] == [1, 1, 0, 0]
    assert [by_rule[rule]["count_mae_apart"] for rule in COUNT_RULES] == [1, 1, 0, 0]
    assert len({by_rule[rule]["f1"] for rule in COUNT_RULES}) == 1
    assert len({by_rule[rule]["n_true"] for rule in COUNT_RULES}) == 1
    top_missing = np.where(BORDER == 1, 0, BORDER)
    assert figures(BORDER, top_missing, count_rule="frame")["count_bias"] == -1
