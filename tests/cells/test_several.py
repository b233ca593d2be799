"""Cells that look like several: large and dented."""

from __future__ import annotations

import numpy as np
import pytest
from segmented_images import segmented

from cellseg_deploy.cells.several import looks_like_several
from cellseg_deploy.outputs import encoders, overlay
from cellseg_deploy.outputs.palette import SEVERAL_RGB


@pytest.mark.parametrize(
    ("area", "solidity", "is_cut", "expected"),
    [(150, 0.969, False, True), (149, 0.9, False, False), (150, 0.97, False, False), (300, 0.8, True, False)],
)
def test_a_whole_cell_that_is_large_and_dented(area: int, solidity: float, is_cut: bool, expected: bool) -> None:
    areas = np.array([100] * 9 + [area])
    found = looks_like_several(areas, np.array([0.9] * 9 + [solidity]), np.array([False] * 9 + [is_cut]))
    assert found.tolist() == [False] * 9 + [expected]


def test_few_cells_do_not_say_what_is_large() -> None:
    areas = np.array([100] * 6 + [300])
    assert not looks_like_several(areas, np.full(7, 0.5), np.zeros(7, np.bool_)).any()


def test_a_white_cell_is_not_compared_with_red_ones() -> None:
    areas = np.array([100] * 9 + [200] + [400] * 9 + [700])
    solidities = np.array([0.9] * 20)
    whole = np.zeros(20, np.bool_)
    names = np.array(["red"] * 10 + ["white"] * 10)
    assert np.flatnonzero(looks_like_several(areas, solidities, whole, names)).tolist() == [9, 19]
    two_white = looks_like_several(areas[:12], solidities[:12], whole[:12], names[:12])
    assert np.flatnonzero(two_white).tolist() == [9]


def test_overlays_mark_them() -> None:
    labels = np.zeros((400, 400), np.int32)
    for number in range(9):
        labels[20 + 40 * number : 40 + 40 * number, 20:40] = number + 1
    labels[100:120, 200:280] = labels[100:180, 200:220] = 10  # an angle
    image = segmented(labels)
    assert image.several.tolist() == [False] * 9 + [True]
    picture = overlay.draw(image.pixels_hwc, labels, several=image.several)
    assert tuple(picture[100, 240]) == SEVERAL_RGB
    assert tuple(picture[340, 30]) == overlay.OUTLINE_RGB
    with_flag = overlay.encode(image.pixels_hwc, labels, image.field, image.counted, several=image.several)
    assert encoders.overlay(image) == with_flag
