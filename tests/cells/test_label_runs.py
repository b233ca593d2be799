"""Runs of a label image: the ground on which metrics, measuring and renumbering stand."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.measure import label as skimage_label

from cellseg_deploy.cells.label_runs import largest_pieces, paint, pieces, renumber, row_runs
from cellseg_deploy.errors import UsageError


def test_runs_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1, 1, 0, 2, 2], [0, 1, 1, 0, 3, 3, 3, 3]], np.uint8)
    runs = row_runs(labels)
    assert runs.label.tolist() == [1, 2, 1, 3]
    assert runs.row.tolist() == [0, 0, 1, 1]
    assert runs.start.tolist() == [2, 6, 1, 4]
    assert runs.stop.tolist() == [5, 8, 3, 8]
    np.testing.assert_array_equal(paint(runs, runs.label), labels)


def test_a_run_ends_with_its_row() -> None:
    assert len(row_runs(np.ones((3, 4), np.int32))) == 3


@pytest.mark.parametrize("hw", [(1, 1), (1, 9), (9, 1), (37, 53)])
def test_pieces_are_scikit_images_components(hw: tuple[int, int]) -> None:
    labels = np.random.default_rng(1).integers(0, 4, hw).astype(np.int32)
    runs = row_runs(labels)
    ours = paint(runs, pieces(runs) + 1)
    theirs = skimage_label(labels, background=0, connectivity=1)
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(ours)) == len(np.unique(theirs))


def test_only_the_largest_piece_of_a_label_stays() -> None:
    labels = np.array(
        [
            [1, 0, 2, 2, 0, 3],
            [0, 1, 1, 2, 0, 0],
            [2, 0, 0, 0, 3, 0],
        ],
        np.int32,
    )
    runs = largest_pieces(row_runs(labels))
    expected = [[0, 0, 2, 2, 0, 3], [0, 1, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert paint(runs, runs.label).tolist() == expected  # of 3's equal pieces the first


def test_renumber_in_raster_order() -> None:
    labels = np.array([[0, 9, 9], [4, 4, 9], [0, 2, 4]], np.int64) * 1_000_000_000_000
    assert renumber(labels).tolist() == [[0, 1, 1], [2, 2, 1], [0, 3, 2]]
    assert renumber(labels).dtype == np.int32


@pytest.mark.parametrize("hw", [(0, 0), (0, 5), (5, 0), (3, 4)])
def test_nothing_there(hw: tuple[int, int]) -> None:
    empty = np.zeros(hw, np.int32)
    runs = largest_pieces(row_runs(empty))
    assert len(runs) == len(pieces(runs)) == 0
    np.testing.assert_array_equal(renumber(empty), empty)


def test_what_is_no_label_image_is_refused() -> None:
    with pytest.raises(UsageError, match="two-dimensional integer"):
        row_runs(np.zeros((2, 2), np.float32))
    with pytest.raises(UsageError, match="two-dimensional integer"):
        row_runs(np.zeros((2, 2, 1), np.int32))
    with pytest.raises(UsageError, match="found -1"):
        row_runs(np.full((2, 2), -1))
