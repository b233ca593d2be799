"""What is said of images: sizes, neighbours, scale bars, and when it warns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import make_spec
from test_metrics_apart import image

from cellseg_deploy import data_report
from cellseg_deploy.data_report import find_scale_bar, look_at, near_another, summarise, warnings
from cellseg_deploy.measure import boxes

GREY = np.full((100, 160, 3), 200, np.uint8)


def grid(side: int, name: str = "a", step: int = 40) -> data_report.ImageFacts:
    squares = [[(top, left, side, side)] for top in range(5, 90 - side, step) for left in range(5, 150 - side, step)]
    return look_at(name, GREY, image(*squares), min_area_px=5)


@pytest.mark.parametrize(("gap", "near"), [(9, True), (10, False)])
def test_ten_pixels_from_centre_to_centre(gap: int, near: bool) -> None:
    """With nine empty columns between them the nearest pixel centres are ten px apart."""
    labels = image([(40, 40, 10, 10)], [(40, 50 + gap, 10, 10)], [(0, 0, 5, 5)])
    numbers = np.arange(1, 4)
    assert near_another(labels, numbers, boxes(labels, numbers), 10).tolist() == [near, near, False]


def test_facts_of_an_image() -> None:
    photo = GREY.copy()
    labels = image([(20, 20, 10, 10)], [(0, 60, 10, 10)], [(50, 50, 2, 2)])
    photo[labels > 0] = 100
    facts = look_at("a", photo, labels, min_area_px=5)
    assert (facts.n_cells, facts.crowded, facts.areas_px.tolist()) == (2, 0, [100])  # speck and cut cell have no size
    assert facts.median_diameter_px == pytest.approx(math.sqrt(400 / math.pi))
    assert facts.covered == 200 / 16000
    assert facts.contrast == pytest.approx(100, abs=0.1)
    empty = look_at("b", GREY, image(), min_area_px=5)
    assert (empty.n_cells, empty.median_diameter_px, empty.brightness) == (0, None, 200)
    pooled = summarise([facts, empty])
    assert (pooled.n_cells, pooled.cells_per_image, pooled.crowded_share) == (2, 1, 0)
    assert pooled.sizes == {"160x100": 2}
    nothing = summarise([empty])
    assert (nothing.median_diameter_px, nothing.crowded_share, nothing.area_quantiles_px) == (None, None, None)


@pytest.mark.parametrize("grey", [0, 255])
def test_a_drawn_bar_is_seen(grey: int) -> None:
    photo = GREY.copy()
    photo[90:93, 110:150] = grey
    assert find_scale_bar(photo) == (110, 90, 40, 3)


@pytest.mark.parametrize(
    ("window", "why"),
    [
        (np.s_[0:3, 0:160], "a saturated edge"),
        (np.s_[50:70, 50:70], "a square"),
        (np.s_[50:52, 50:54], "too short"),
        (np.s_[20:80, 20:23], "upright"),
    ],
)
def test_what_is_no_bar(window: tuple[slice, slice], why: str) -> None:
    photo = GREY.copy()
    photo[window] = 0
    assert find_scale_bar(photo) is None, why


def test_warnings_say_what_differs() -> None:
    spec = make_spec(image_scale=0.5, cell_diameter_px=10 * math.sqrt(4 / math.pi) / 2)
    same = [grid(10, step=15)]
    assert warnings(same, summarise(same), spec) == []
    large = [grid(14, step=18)]
    (told,) = warnings(large, summarise(large), spec)
    assert "1.40 times" in told
    assert "--cell-diameter 16" in told
    mixed = [*same, grid(10, "b", step=15), grid(20, "c", step=30)]
    (told,) = warnings(mixed, summarise(mixed), spec)
    assert "cells of c differ" in told
    few = [grid(10, step=60)]
    assert "uncertain" in warnings(few, summarise(few), spec)[0]
    none = [look_at("n", GREY, image(), min_area_px=5)]
    assert "no whole cell" in warnings(none, summarise(none), spec)[0]
    barred = GREY.copy()
    barred[95:97, 100:150] = 0
    labels = image(*[[(top, left, 10, 10)] for top in range(5, 80, 15) for left in range(5, 140, 15)])
    with_bar = [look_at("bar", barred, labels, min_area_px=5)]
    assert "scale bar" in warnings(with_bar, summarise(with_bar), spec)[0]
