"""Foreground of unknown instance in a truth: what lies there counts neither way."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.cells.metrics import pool, score_image


def test_what_lies_mostly_there_counts_neither_way():
    true = np.zeros((60, 120), np.int32)
    true[10:40, 10:40] = 7
    true[10:40, 60:100] = IGNORED
    predicted = np.zeros_like(true)
    predicted[10:40, 10:40] = 1
    predicted[10:40, 62:98] = 2
    predicted[42:58, 10:40] = 3  # invented
    metrics = pool([score_image(true, predicted)])
    assert (metrics["n_true"], metrics["n_predicted"]) == (1, 2)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["dice"] == pytest.approx(2 * 900 / (900 + 900 + 480))


def test_a_cell_that_reaches_into_it_is_judged_by_the_rest():
    true = np.zeros((60, 120), np.int32)
    true[10:40, 10:40] = 1
    true[10:40, 40:60] = IGNORED
    predicted = np.zeros_like(true)
    predicted[10:40, 10:50] = 1
    assert pool([score_image(true, predicted)])["map"] == 1
