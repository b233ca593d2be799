"""Figures without border objects: cases worked out by hand, images of 40 x 60 px."""

from __future__ import annotations

import numpy as np
import pytest
from test_metrics import Labels, image

from cellseg_deploy.cells.metrics import pool, score_image

INNER = (10, 10, 10, 10)
LEFT = (10, 0, 10, 8)


def figures(true: Labels, predicted: Labels, min_area_px: int = 0, **settings: object) -> dict[str, float]:
    return pool([score_image(true, predicted, min_area_px=min_area_px, **settings)])  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", [(0, 30, 5, 10), (35, 30, 5, 10), (15, 0, 10, 5), (15, 55, 10, 5)])
def test_a_border_cell_missed_or_invented_counts_neither_way(edge: tuple[int, int, int, int]) -> None:
    inner, both = image((15, 30, 10, 10)), image((15, 30, 10, 10), edge)
    for true, predicted, n_border in ((both, inner, 1), (inner, both, 0)):
        result = figures(true, predicted)
        assert result["f1"] == 2 / 3
        assert [result[f"{name}_inner"] for name in ("f1", "precision", "recall", "map", "dice")] == [1] * 5
        assert (result["count_mae_inner"], result["n_border"]) == (0, n_border)


def test_one_pixel_from_the_border_is_inner() -> None:
    true = image((1, 1, 38, 58))
    result = figures(true, image())
    assert (result["n_border"], result["recall_inner"], result["dice_inner"]) == (0, 0, 0)


def test_what_lies_mostly_in_a_true_border_cell_counts_neither_way() -> None:
    """The border cell has columns 0 to 9; of the ten found, first 6 and then 5 lie in it: half is not most."""
    true = image((10, 0, 10, 10))
    assert figures(true, image((10, 4, 10, 10)))["precision_inner"] == 1
    assert figures(true, image((10, 5, 10, 10)))["precision_inner"] == 0


def test_a_true_speck_at_the_border_covers_what_was_found_in_it() -> None:
    true = image((10, 0, 10, 6))  # 60 px: a speck; found, without touching the border: 80 px, 50 of them in the speck
    result = figures(true, image((10, 1, 10, 8)), min_area_px=70)
    assert (result["n_true"], result["n_border"], result["precision"], result["precision_inner"]) == (0, 0, 0, 1)


def test_a_border_cell_matched_to_an_inner_true_one_is_a_match() -> None:
    """True columns 1 to 10, found 0 to 10: IoU 10/11, a match up to 0.90. Above, the found one counts neither way."""
    result = figures(image((10, 1, 10, 10)), image((10, 0, 10, 11)))
    assert [result[f"{name}_inner"] for name in ("f1", "precision", "recall", "count_mae")] == [1, 1, 1, 0]
    assert result["map_inner"] == 9 / 10
    assert result["dice_inner"] == 1  # every pixel lies in the border object: none is left to disagree on
    assert figures(image((10, 1, 10, 10)), image())["recall_inner"] == 0


def test_of_two_partners_the_inner_one_is_taken() -> None:
    """True: rows 1 to 20. Found: rows 0 to 10 and rows 11 to 20; at IoU 0.3 either would do."""
    predicted = image((0, 20, 11, 10), (11, 20, 10, 10))
    score = score_image(image((1, 20, 20, 10)), predicted, min_area_px=0, thresholds=(0.3,))
    assert (score.inner.true_positives, score.inner.n_predicted) == ((1,), (1,))


def test_dice_leaves_out_the_pixels_of_border_objects_of_either_side() -> None:
    """True: 100 px inner, 80 px at the border. Found: the inner one shifted by 2, and a border object of 11 px."""
    true = image(INNER, LEFT)
    predicted = image((10, 12, 10, 10))
    predicted[15, 0:11] = 2  # 11 px, 1 of them in the inner true cell (column 10)
    result = figures(true, predicted)
    assert result["dice_inner"] == 2 * 80 / (99 + 100)
    spill = predicted.copy()
    spill[10:20, 6:8] = 1  # 20 px more, all in the true border cell: they are left out
    assert figures(true, spill)["dice_inner"] == 2 * 80 / (99 + 100)


def test_nothing_inner_is_perfect_and_pooling_sums() -> None:
    border = image(LEFT)
    nothing = figures(border, border)
    assert (nothing["f1_inner"], nothing["dice_inner"], nothing["n_border"]) == (1, 1, 1)
    assert np.isnan(nothing["count_mape_inner"])
    scores = [score_image(t, p, min_area_px=0) for t, p in ((border, border), (image(INNER), image()))]
    pooled = pool([*scores, score_image(image(INNER), image(INNER), min_area_px=0)])
    assert (pooled["recall_inner"], pooled["n_border"], pooled["count_mae_inner"]) == (1 / 2, 1, 1 / 3)


def test_the_count_rule_has_no_say() -> None:
    true, predicted = image(INNER, LEFT), image(INNER, (0, 30, 5, 5))
    results = [figures(true, predicted, count_rule=rule) for rule in ("all", "frame", "exclude-border")]
    assert {result["count_bias_inner"] for result in results} == {0}
