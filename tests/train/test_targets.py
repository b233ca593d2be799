"""Targets and gap weights on arrays small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.errors import UsageError
from cellseg_train.targets import (
    boundary_target,
    distance_target,
    foreground_target,
    gap_weights,
    surface_distance,
)


def labels(text: str) -> np.ndarray:
    rows = [[0 if sign == "." else int(sign) for sign in line.strip()] for line in text.split()]
    return np.array(rows, np.int32)


def test_touching_cells_are_parted_on_both_sides_of_the_contact():
    touching = labels("....... .112222 .112222 .112222 .......")
    expected = labels("....... .1..111 .1..111 .1..111 .......")
    assert np.array_equal(foreground_target(touching), expected)


def test_contact_above_and_below_is_found_too():
    stacked = labels("111 111 222 222")
    assert np.array_equal(foreground_target(stacked), labels("111 ... ... 111"))


def test_cells_with_a_gap_keep_all_their_pixels():
    apart = labels("11.22 11.22")
    assert np.array_equal(foreground_target(apart), (apart > 0).astype(np.uint8))


def test_boundary_band_has_its_width_half_on_each_side():
    half = np.zeros((9, 20), np.int32)
    half[:, 10:] = 1
    band = boundary_target(half, 4)
    assert np.flatnonzero(band[4]).tolist() == [8, 9, 10, 11]
    assert np.flatnonzero(boundary_target(half, 2)[4]).tolist() == [9, 10]


def test_boundary_runs_between_two_touching_cells():
    two = np.ones((9, 20), np.int32)
    two[:, 10:] = 2
    assert np.flatnonzero(boundary_target(two, 2)[4]).tolist() == [9, 10]


@pytest.mark.parametrize("width", [0, 1, 3])
def test_boundary_width_must_be_even(width):
    with pytest.raises(UsageError, match="even"):
        boundary_target(np.zeros((4, 4), np.int32), width)


def two_cells(gap: int) -> np.ndarray:
    image = np.zeros((21, 60), np.int32)
    image[:, 5:30] = 1
    image[:, 30 + gap : 55] = 2
    return image


def test_gap_weight_on_the_middle_line_is_ronnebergers():
    instances = two_cells(gap=5)
    weight = gap_weights(foreground_target(instances), instances, weight=6.0, sigma_px=3.0)
    # The middle of a gap of 5 px lies 3 px from the next cell pixel on either side: d1 + d2 = 6.
    assert weight[10, 32] == pytest.approx(6 * np.exp(-(6**2) / (2 * 3**2)), rel=0.01)
    assert weight[10, 32] > 0.5


def test_narrow_gaps_weigh_more_than_wide_ones_and_cells_nothing():
    peaks = []
    for gap in (1, 3, 5, 9):
        instances = two_cells(gap)
        foreground = foreground_target(instances)
        weight = gap_weights(foreground, instances, 6.0, 3.0)
        assert not weight[foreground == 1].any()
        peaks.append(weight.max())
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.1 * peaks[0]


def test_background_outside_of_gaps_is_not_weighted():
    instances = two_cells(gap=3)
    weight = gap_weights(foreground_target(instances), instances, 6.0, 3.0)
    assert not weight[:, :5].any()
    assert not weight[:, 55:].any()


def test_gap_weight_of_empty_full_and_switched_off():
    nothing, everything = np.zeros((5, 5), np.int32), np.ones((5, 5), np.int32)
    for instances in (nothing, everything):
        assert not gap_weights(foreground_target(instances), instances, 6.0, 3.0).any()
    assert not gap_weights(foreground_target(two_cells(3)), two_cells(3), 0.0, 3.0).any()


def test_distance_rises_from_the_edge_to_one_in_the_middle_of_each_cell():
    two = np.zeros((15, 30), np.int32)
    two[3:12, 2:11] = 5  # 9 px wide: the middle pixel is 5 px from the outside
    two[5:10, 15:20] = 9  # 5 px wide: 3 px
    depth = distance_target(foreground_target(two), two)
    np.testing.assert_allclose(depth[7, 1:12], np.array([0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0]) / 5, rtol=1e-6)
    np.testing.assert_allclose(depth[7, 14:21], np.array([0, 1, 2, 3, 2, 1, 0]) / 3, rtol=1e-6)
    assert (depth[two == 0] == 0).all()


def test_touching_cells_have_a_valley_between_their_middles():
    two = np.ones((11, 22), np.int32)
    two[:, 11:] = 2
    depth = distance_target(foreground_target(two), two)
    assert depth[5, 10] == depth[5, 11] == 0
    assert depth[5, 0] == depth[5, 21] == 1  # the tile's border is no edge


def test_distance_of_nothing_and_of_one_cell_that_fills_the_tile():
    nothing, everything = np.zeros((4, 5), np.int32), np.ones((4, 5), np.int32)
    assert not distance_target(foreground_target(nothing), nothing).any()
    assert (distance_target(foreground_target(everything), everything) == 1).all()


def test_surface_distance_is_signed_clipped_and_symmetric_about_the_edge():
    mask = np.zeros((5, 20), np.uint8)
    mask[:, 8:12] = 1
    row = surface_distance(mask, 4.0)[2]
    np.testing.assert_allclose(row[8:12], [-0.125, -0.375, -0.375, -0.125])
    np.testing.assert_allclose(row[3:8], [1, 0.875, 0.625, 0.375, 0.125])
    assert (surface_distance(np.zeros((3, 3), np.uint8), 4.0) == 1).all()
    assert (surface_distance(np.ones((3, 3), np.uint8), 4.0) == -1).all()
