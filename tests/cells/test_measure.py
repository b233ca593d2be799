"""The table of cells against values worked out by hand and against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image

from cellseg_deploy.cells.measure import COLUMNS, CellTable, measure
from cellseg_deploy.errors import UsageError


def blobs(seed: int, hw: tuple[int, int] = (150, 210), n_cells: int = 25) -> npt.NDArray[np.int32]:
    """Tilted ellipses that cover each other and leave the image, some with holes; numbers with gaps."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: hw[0], : hw[1]]
    labels = np.zeros(hw, np.int32)
    for number in range(1, n_cells + 1):
        y, x, angle = rows - rng.uniform(0, hw[0]), columns - rng.uniform(0, hw[1]), rng.uniform(0, math.pi)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        distance = (along / rng.uniform(4, 22)) ** 2 + (across / rng.uniform(3, 12)) ** 2
        labels[distance <= 1] = 3 * number
        labels[distance <= rng.choice([0, 0.1])] = 0
    return labels


def only_row(table: CellTable) -> dict[str, int | float | bool]:
    assert len(table) == 1
    return {name: column[0].item() for name, column in table.columns.items()}


def test_rectangle_by_hand() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[10:16, 20:30] = 5  # 6 rows, 10 columns
    row = only_row(measure(labels))
    assert list(row) == list(COLUMNS)
    assert (row["label"], row["area_px"], row["touches_border"]) == (5, 60, False)
    assert (row["centroid_x_px"], row["centroid_y_px"]) == (24.5, 12.5)
    assert [row[f"bbox_{side}_px"] for side in ("left", "top", "width", "height")] == [20, 10, 10, 6]
    assert row["equivalent_diameter_px"] == pytest.approx(math.sqrt(240 / math.pi))
    # Variance of n points 1 apart is (n^2 - 1) / 12.
    assert row["major_axis_px"] == pytest.approx(4 * math.sqrt(99 / 12))
    assert row["minor_axis_px"] == pytest.approx(4 * math.sqrt(35 / 12))
    assert row["eccentricity"] == pytest.approx(math.sqrt(1 - 35 / 99))
    assert row["solidity"] == 1


@pytest.mark.parametrize("radius", [20, 45, 90])
def test_disc(radius: int) -> None:
    rows, columns = np.ogrid[: 2 * radius + 5, : 2 * radius + 5]
    disc = ((rows - radius - 2) ** 2 + (columns - radius - 2) ** 2 <= radius**2).astype(np.int32)
    row = only_row(measure(disc))
    assert row["perimeter_px"] == pytest.approx(2 * math.pi * radius, rel=0.02)
    assert row["circularity"] == pytest.approx(1, abs=0.035)
    assert row["solidity"] == 1
    assert row["eccentricity"] == 0
    assert row["major_axis_px"] == pytest.approx(2 * radius, rel=0.01)


def test_single_pixel_line_and_l_shape() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[1, 1] = 1
    labels[4, 2:7] = 2
    labels[6:9, 0], labels[8, 1:3] = 3, 3
    table = measure(labels)
    assert table.columns["area_px"].tolist() == [1, 5, 5]
    assert table.columns["eccentricity"][:2].tolist() == [0, 1]
    # The hull of the L's centres holds (0,0) (0,1) (0,2) (1,1) (1,2) (2,2): six, of which five are its own.
    assert table.columns["solidity"].tolist() == [1, 1, 5 / 6]


@pytest.mark.parametrize(
    ("row", "column", "touches"), [(0, 5, True), (9, 5, True), (5, 0, True), (5, 11, True), (1, 1, False)]
)
def test_touches_border(row: int, column: int, touches: bool) -> None:
    labels = np.zeros((10, 12), np.int32)
    labels[row, column] = 1
    assert only_row(measure(labels))["touches_border"] is touches


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scikit_image(seed: int) -> None:
    labels = blobs(seed)
    table = measure(labels).columns
    regions = regionprops(labels)
    assert table["label"].tolist() == [region.label for region in regions]
    for ours, theirs in [
        ("area_px", [r.area for r in regions]),
        ("centroid_y_px", [r.centroid[0] for r in regions]),
        ("centroid_x_px", [r.centroid[1] for r in regions]),
        ("bbox_top_px", [r.bbox[0] for r in regions]),
        ("bbox_left_px", [r.bbox[1] for r in regions]),
        ("bbox_height_px", [r.bbox[2] - r.bbox[0] for r in regions]),
        ("bbox_width_px", [r.bbox[3] - r.bbox[1] for r in regions]),
        ("equivalent_diameter_px", [r.equivalent_diameter_area for r in regions]),
        ("major_axis_px", [r.axis_major_length for r in regions]),
        ("minor_axis_px", [r.axis_minor_length for r in regions]),
        ("eccentricity", [r.eccentricity for r in regions]),
        ("perimeter_px", [r.perimeter_crofton for r in regions]),
        ("solidity", [r.area / convex_hull_image(r.image, offset_coordinates=False).sum() for r in regions]),
    ]:
        np.testing.assert_allclose(table[ours], theirs, rtol=1e-7, atol=1e-6, err_msg=ours)


def test_position_and_numbering_do_not_change_a_shape() -> None:
    labels = blobs(9)
    moved = np.zeros((400, 3000), np.int32)
    moved[200:350, 2700:2910] = labels
    here, there = measure(np.pad(labels, 1)).columns, measure(moved * 7).columns
    for name in ("area_px", "perimeter_px", "solidity", "major_axis_px", "eccentricity"):
        np.testing.assert_array_equal(here[name], there[name])
    np.testing.assert_array_equal(here["label"] * 7, there["label"])


def test_no_cell_gives_an_empty_table_of_the_same_types() -> None:
    empty, full = measure(np.zeros((5, 5), np.int32)), measure(np.ones((5, 5), np.uint16))
    assert (len(empty), len(full)) == (0, 1)
    assert list(empty.columns) == list(full.columns) == list(COLUMNS)
    assert [c.dtype for c in empty.columns.values()] == [c.dtype for c in full.columns.values()]
    assert all(len(column) == 0 for column in empty.columns.values())


def test_a_mask_is_refused() -> None:
    with pytest.raises(UsageError, match="connected components"):
        measure(np.ones((5, 5), np.bool_))
