"""Edits by hand: what each changes, what it refuses, and that no pixel is lost."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.cells import edits
from cellseg_deploy.cells.polygons import cell_polygons
from cellseg_deploy.errors import UsageError


def blank() -> np.ndarray:
    """Cells 1 and 2 touch, cell 3 lies apart."""
    labels = np.zeros((40, 60), np.int32)
    labels[5:20, 5:20] = 1
    labels[5:20, 20:30] = 2
    labels[30:38, 40:50] = 3
    return labels


def after(labels: np.ndarray, patch: edits.Patch) -> np.ndarray:
    before, changed = labels.copy(), labels.copy()
    patch.apply(changed)
    assert (labels == before).all()  # planning changes nothing
    undone = changed.copy()
    patch.revert(undone)
    assert (undone == before).all()
    return changed


def test_delete_removes_these_cells_and_no_other() -> None:
    labels = blank()
    changed = after(labels, edits.delete(labels, [1, 3]))
    assert (changed == np.where(labels == 2, 2, 0)).all()


def test_merge_keeps_the_number_of_the_largest() -> None:
    labels = blank()
    changed = after(labels, edits.merge(labels, [2, 1]))
    assert (changed == np.where(labels == 2, 1, labels)).all()


def test_merge_says_which_cell_is_apart() -> None:
    with pytest.raises(UsageError, match="3 touches none of the others"):
        edits.merge(blank(), [1, 2, 3])


def test_merge_takes_cells_that_meet_at_a_corner() -> None:
    labels = np.zeros((8, 8), np.int32)
    labels[:4, :4], labels[4:, 4:] = 1, 2
    assert set(np.unique(after(labels, edits.merge(labels, [1, 2])))) == {0, 1}


@pytest.mark.parametrize(
    "line", [[[3, 12], [22, 12]], [[12.5, 0], [12.5, 30]], [[4, 4], [21, 21]], [[3, 7], [12, 15], [22, 7]]]
)
def test_split_gives_two_cells_and_loses_no_pixel(line) -> None:
    labels = blank()
    changed = after(labels, edits.split(labels, 1, line, 9))
    assert set(np.unique(changed[labels == 1])) == {1, 9}
    assert np.count_nonzero(changed == 1) >= np.count_nonzero(changed == 9)
    assert (changed[labels != 1] == labels[labels != 1]).all()


@pytest.mark.parametrize("line", [[[0, 0], [3, 3]], [[3, 12], [12, 12]], [[5, 5], [6, 5]]])
def test_a_line_that_does_not_cross_the_cell_is_refused(line) -> None:
    with pytest.raises(UsageError, match="does not cross cell 1"):
        edits.split(blank(), 1, line, 9)


def test_a_cell_in_two_pieces_is_split_only_where_the_line_crosses() -> None:
    labels = np.zeros((30, 60), np.int32)
    labels[5:15, 5:25] = labels[5:10, 40:50] = 1
    with pytest.raises(UsageError, match="does not cross"):
        edits.split(labels, 1, [[30, 0], [30, 29]], 2)
    changed = after(labels, edits.split(labels, 1, [[15, 0], [15, 29]], 2))
    assert set(np.unique(changed)) >= {0, 1, 2}


def test_draw_takes_the_background_only_and_what_an_outline_says_exactly() -> None:
    labels = blank()
    changed = after(labels, edits.draw(labels, [[15, 2], [35, 2], [35, 25], [15, 25]], 4))
    expected = np.zeros_like(labels)
    expected[2:25, 15:35] = 4
    assert (changed == np.where(labels == 0, expected, labels)).all()
    (ring,) = (cell.polygons[0][0] for cell in cell_polygons(labels) if cell.label == 3)
    drawn = edits.draw(np.where(labels == 3, 0, labels).astype(np.int32), ring.tolist(), 3)
    assert (after(np.where(labels == 3, 0, labels).astype(np.int32), drawn) == labels).all()


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        ([[1, 1], [2, 2]], "three points"),
        ([[100, 100], [120, 100], [120, 120]], "outside of the picture"),
        ([[6, 6], [18, 6], [18, 18], [6, 18]], "0 free pixels"),
        ([["a", 1], [2, 2], [3, 3]], "pairs of numbers"),
        ([[float("nan"), 1], [2, 2], [3, 3]], "pairs of numbers"),
    ],
)
def test_an_outline_that_makes_no_cell_is_refused(outline, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        edits.draw(blank(), outline, 4)


def test_a_cell_that_is_gone_is_named() -> None:
    with pytest.raises(UsageError, match="no cell 7"):
        edits.delete(blank(), [1, 7])
