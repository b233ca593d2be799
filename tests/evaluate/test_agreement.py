"""Agreement against the worked example of Bland and Altman 1986, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cellseg_deploy.errors import UsageError
from cellseg_deploy.evaluate.agreement import Estimate, agree, limits_of

# Peak expiratory flow, l/min, first measurements of 17 subjects: Lancet i (1986) 307-310, table I.
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def near(one: Estimate) -> list[float]:
    return [round(one.value, 1), round(one.low, 1), round(one.high, 1)]


def test_the_peak_flow_example_of_bland_and_altman() -> None:
    """The paper: -2.1, sd 38.8; bias -22.0 to 17.8. Its limits are 2 sd wide and their error sqrt(3 / n) sd, rounded
    as -79.7 (-114.3 to -45.1) and 75.5 (40.9 to 110.1); ours are 1.96 sd wide, with the error of the paper of 1999."""
    found = agree(MINI, WRIGHT)
    limits = found.difference
    assert (limits.n, round(limits.sd, 1)) == (17, 38.8)
    assert near(limits.bias) == [-2.1, -22.0, 17.8]
    assert near(limits.lower) == [-78.1, -112.9, -43.3]
    assert near(limits.upper) == [73.9, 39.1, 108.6]
    assert limits.bias.value - 2 * limits.sd == pytest.approx(-79.7, abs=0.1)
    assert limits.lower.low == pytest.approx(-78.1 - 34.6, abs=0.2)  # the paper's half width: 2.12 * 16.3
    assert found.mae == pytest.approx(np.mean([abs(w - m) for w, m in zip(WRIGHT, MINI, strict=True)]))


def test_the_ratio_is_that_of_the_logarithms() -> None:
    found = agree([10, 100, 0, 7], [20, 200, 3, 0])
    assert found.ratio.n == 2
    assert found.ratio.sd == pytest.approx(0)
    assert [one.value for one in (found.ratio.bias, found.ratio.lower, found.ratio.upper)] == [pytest.approx(2)] * 3
    spread = agree([10, 10], [5, 20]).ratio
    assert spread.bias.value == pytest.approx(1)
    assert spread.upper.value == pytest.approx(math.exp(1.96 * math.log(4) / math.sqrt(2)))
    assert spread.lower.value * spread.upper.value == pytest.approx(1)


def test_errors_by_hand() -> None:
    found = agree([10, 0, 20], [12, 1, 15])
    assert (found.n_images, found.true, found.found) == (3, 30, 28)
    assert found.mae == pytest.approx(8 / 3)
    assert found.difference.bias.value == pytest.approx(-2 / 3)
    assert found.mape == pytest.approx((0.2 + 0.25) / 2)


def test_errors_by_thirds_of_the_count() -> None:
    found = agree([9, 1, 2, 8, 5, 4], [6, 1, 3, 8, 5, 5])
    thirds = [(third.least, third.most, third.n, third.bias, third.mae) for third in found.by_density]
    assert thirds == [(1, 2, 2, 0.5, 0.5), (4, 5, 2, 0.5, 0.5), (8, 9, 2, -1.5, 1.5)]
    assert found.by_density[2].mape == pytest.approx(1 / 6)


def test_images_of_one_count_stay_together() -> None:
    assert [(t.least, t.most, t.n) for t in agree([3] * 5, [3] * 5).by_density] == [(3, 3, 5)]
    assert sum(t.n for t in agree([0, 0, 0, 0, 9], [1, 0, 0, 0, 9]).by_density) == 5


def test_too_few_images_are_undefined() -> None:
    one = agree([4], [5])
    assert one.difference.bias.value == 1
    assert all(math.isnan(v) for v in (one.difference.sd, one.difference.bias.low, one.difference.upper.value))
    assert math.isnan(agree([0], [0]).mape)
    assert math.isnan(limits_of(np.array([])).bias.value)


@pytest.mark.parametrize(("true", "found"), [([], []), ([1, 2], [1]), ([-1], [1])])
def test_what_is_no_pair_of_counts_is_refused(true: list[int], found: list[int]) -> None:
    with pytest.raises(UsageError, match="count"):
        agree(true, found)
