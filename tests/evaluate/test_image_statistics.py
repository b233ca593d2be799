"""What is said of images: sizes, neighbours, scale bars, pixel sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_metrics_apart import image

from cellseg_deploy.cells.measure import boxes
from cellseg_deploy.evaluate import image_statistics
from cellseg_deploy.evaluate.image_statistics import find_scale_bar, look_at, near_another, summarise
from cellseg_deploy.images.resolution import Resolution
from cellseg_deploy.samples import SmearParams, make_smear

GREY = np.full((100, 160, 3), 200, np.uint8)


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
    assert facts.colours["stain_red"] == pytest.approx(math.log10(201 / 101), abs=1e-4)
    assert facts.crowded_share == 0
    empty = look_at("b", GREY, image(), min_area_px=5)
    assert (empty.n_cells, empty.median_diameter_px, empty.crowded_share) == (0, None, None)
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


def test_pixel_sizes_are_pooled_where_they_agree() -> None:
    def named(*sizes: float | None) -> image_statistics.DataFacts:
        given = [() if um is None else (Resolution("OME", (um, um)),) for um in sizes]
        return summarise([look_at("a", GREY, image(), min_area_px=5, resolution=tags) for tags in given])

    assert named(0.1, 0.1005).um_per_px == 0.1
    assert named(0.1, 0.2).um_per_px is None
    assert named(0.1, None).um_per_px is None
    assert named(350.0).um_per_px is None  # of a screen
    assert named(0.1, 0.2, 0.1).resolutions == {"OME 0.1 µm/px": 2, "OME 0.2 µm/px": 1}


def test_a_surround_is_neither_background_nor_a_negative() -> None:
    picture = make_smear(SmearParams(size_hw=(300, 400), n_cells=12, cell_diameter_px=50), 3)
    y, x = np.ogrid[:300, :400]
    outside = np.hypot(y - 150, x - 200) > 130
    black = np.where(outside[..., None], 0, picture.image_hwc).astype(np.uint8)
    labels = np.where(outside, 0, picture.labels_hw)
    plain, found = (look_at("a", pixels, labels, min_area_px=5) for pixels in (picture.image_hwc, black))
    assert found.negative == ""
    assert found.colours["field_lightness"] == pytest.approx(plain.colours["field_lightness"], abs=3)
