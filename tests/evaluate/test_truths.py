"""Masks that were read once are what they were read as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from cellseg_deploy.cells.ignored import IGNORED
from cellseg_deploy.errors import DataError
from cellseg_deploy.evaluate.truths import Truths
from cellseg_deploy.images.find import Pair
from cellseg_deploy.images.read import read_labels


def pair(folder: Path, name: str, labels: np.ndarray) -> Pair:
    path = folder / f"{name}.tif"
    tifffile.imwrite(path, labels)
    return Pair(name, path, path)


def test_labels_are_those_of_the_file_and_ignored_pixels_no_object(tmp_path: Path) -> None:
    cells = np.zeros((30, 40), np.uint16)
    cells[2:5, 3:9], cells[10:12, 20:30], cells[20:, :] = 7, 2, IGNORED
    pairs = [pair(tmp_path, "cells", cells), pair(tmp_path, "none", np.zeros((7, 5), np.uint8))]
    truths = Truths(pairs, "auto")
    assert sorted(truths.areas) == [18, 20]
    for one in pairs:
        expected = read_labels(one.mask, keep_ignored=True)
        for labels in (truths.labels_of(one), truths.labels_of(one)):
            assert labels.dtype == np.int32
            assert np.array_equal(labels, expected)
            labels[:] = 1  # its own array
    assert (truths.labels_of(pairs[0]) == IGNORED).sum() == 400


def test_a_bad_mask_is_named(tmp_path: Path) -> None:
    good = pair(tmp_path, "good", np.zeros((4, 4), np.uint8))
    bad = pair(tmp_path, "bad", np.full((4, 4), 0.5, np.float32))
    with pytest.raises(DataError, match=r"bad\.tif"):
        Truths([good, bad], "auto")
