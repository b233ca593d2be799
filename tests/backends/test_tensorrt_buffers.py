"""Batches, calls and buffer sizes of an engine: arithmetic with the expected numbers written out."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_spec

from cellseg_deploy.backends.tensorrt_buffers import BatchProfile, Call, plan_buffers, plan_calls
from cellseg_deploy.errors import UsageError


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 5, 4), (-1, 1, 1)])
def test_batch_sizes_must_rise(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="min <= opt <= max"):
        BatchProfile(*sizes)


def test_shapes_of_a_profile() -> None:
    shapes = BatchProfile(1, 4, 8).input_shapes(make_spec())
    assert shapes == ((1, 56, 56, 3), (4, 56, 56, 3), (8, 56, 56, 3))


@pytest.mark.parametrize(
    ("n", "profile", "expected"),
    [
        (1, (1, 8, 8), [Call(0, 1, 1)]),
        (8, (1, 8, 8), [Call(0, 8, 8)]),
        (21, (1, 8, 8), [Call(0, 8, 8), Call(8, 16, 8), Call(16, 21, 5)]),
        (21, (8, 8, 8), [Call(0, 8, 8), Call(8, 16, 8), Call(16, 21, 8)]),
        (9, (4, 8, 8), [Call(0, 8, 8), Call(8, 9, 4)]),
    ],
)
def test_calls(n: int, profile: tuple[int, int, int], expected: list[Call]) -> None:
    assert list(plan_calls(n, BatchProfile(*profile))) == expected


@pytest.mark.parametrize("profile", [BatchProfile(1, 1, 1), BatchProfile(2, 3, 5), BatchProfile(7, 7, 7)])
def test_each_tile_runs_once_and_each_batch_fits(profile: BatchProfile) -> None:
    for n in range(1, 40):
        calls = list(plan_calls(n, profile))
        assert [i for call in calls for i in range(call.start, call.stop)] == list(range(n))
        assert all(profile.min <= call.batch <= profile.max and call.n <= call.batch for call in calls)


def test_buffers() -> None:
    plan = plan_buffers(make_spec(variant="boundary"), 8)
    assert plan.tiles.shape == (8, 56, 56, 3)
    assert plan.tiles.nbytes == 8 * 9408
    assert plan.tiles.nbytes_of(3) == 3 * 9408
    assert plan.probabilities.shape == (8, 2, 56, 56)
    assert plan.probabilities.nbytes == 8 * 2 * 56 * 56 * 4
    assert plan.probabilities.dtype == np.float32
    assert plan.probabilities.shape_of(3) == (3, 2, 56, 56)
    assert plan.nbytes == plan.tiles.nbytes + plan.probabilities.nbytes
