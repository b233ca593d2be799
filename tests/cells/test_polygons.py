"""Polygons along pixel edges: exact areas, valid rings, holes and pieces."""

from __future__ import annotations

import numpy as np
import pytest
from segmented_images import odd_labels

from cellseg_deploy.cells.polygons import CellPolygons, cell_polygons, ring_area
from cellseg_deploy.errors import UsageError

shapely = pytest.importorskip("shapely")


def area(cell: CellPolygons) -> int:
    return sum(ring_area(ring) for polygon in cell.polygons for ring in polygon)


def test_the_drawing_of_the_docstring() -> None:
    (cell,) = cell_polygons(np.array([[0, 1, 1, 0], [0, 1, 0, 0]]))
    assert cell.label == 1
    assert cell.is_simple
    assert {tuple(corner) for corner in cell.polygons[0][0].tolist()} == {
        (1, 0),
        (3, 0),
        (3, 1),
        (2, 1),
        (2, 2),
        (1, 2),
    }
    assert cell.polygons[0][0][0].tolist() == [1, 0]
    assert area(cell) == 3


def test_a_pixel_is_a_square_of_four_corners_wherever_it_lies() -> None:
    labels = np.zeros((3, 4), np.uint8)
    labels[2, 3] = 9
    (cell,) = cell_polygons(labels)
    assert cell.label == 9
    assert sorted(cell.polygons[0][0].tolist()) == [[3, 2], [3, 3], [4, 2], [4, 3]]


def test_holes_pieces_and_corners() -> None:
    cells = {cell.label: cell for cell in cell_polygons(odd_labels())}
    assert {label: [len(polygon) for polygon in cell.polygons] for label, cell in cells.items()} == {
        1: [2],  # one polygon with a hole
        2: [1],
        3: [1, 1],  # two polygons
        4: [3],
        5: [1],
    }
    assert [cells[n].is_simple for n in range(1, 6)] == [False, True, False, False, True]


def check(labels: np.ndarray) -> None:
    cells = cell_polygons(labels)
    assert [cell.label for cell in cells] == sorted(set(labels.ravel().tolist()) - {0})
    for cell in cells:
        for outer, *holes in cell.polygons:
            assert ring_area(outer) > 0
            assert all(ring_area(hole) < 0 for hole in holes)
            for ring in (outer, *holes):
                steps = np.diff(ring, axis=0, append=ring[:1])
                along_x = steps[:, 0] != 0
                assert (along_x != (steps[:, 1] != 0)).all()  # along rows or columns
                assert (along_x != np.roll(along_x, 1)).all()  # in turn: no corner too many
        shape = shapely.MultiPolygon([(outer, holes) for outer, *holes in cell.polygons])
        assert shape.is_valid, shapely.is_valid_reason(shape)
        inside = labels == cell.label
        assert shape.area == area(cell) == inside.sum()
        y, x = np.indices(labels.shape) + 0.5
        assert np.array_equal(shapely.contains_xy(shape, x, y), inside)


def test_any_labels_give_valid_polygons_that_hold_their_own_pixels() -> None:
    check(odd_labels())
    random = np.random.default_rng(0)
    for _ in range(300):
        check(random.integers(0, random.integers(2, 5), random.integers(1, 12, 2)))


def test_no_cells_no_polygons_and_no_masks() -> None:
    assert cell_polygons(np.zeros((5, 5), np.int32)) == []
    with pytest.raises(UsageError, match="label image"):
        cell_polygons(np.zeros((5, 5), np.bool_))
