"""How an image is covered, square by square: its longer side is cut into eight; squares differ by a pixel at most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.measure import CellTable
from cellseg_deploy.runs import Ints

SQUARES = 8


@dataclass(frozen=True)
class Grid:
    """Figures of the squares, each (rows, columns). ``x``, ``y``: their borders in px, (columns + 1,), (rows + 1,).

    ``covered_px``: pixels of cells. ``cells``, ``counted``: cells whose centroid lies in the square.
    """

    x: Ints
    y: Ints
    covered_px: Ints
    cells: Ints
    counted: Ints

    @property
    def share(self) -> npt.NDArray[np.float64]:
        """Covered share of each square, 0 to 1."""
        return np.asarray(self.covered_px / np.outer(np.diff(self.y), np.diff(self.x)))


def grid(labels: npt.NDArray[np.int32], table: CellTable, counted: npt.NDArray[np.bool_]) -> Grid:
    """The squares of ``labels`` (h, w), whose cells are the rows of ``table`` and are ``counted`` (n,) or not.

    Their sums over the image are its covered pixels and its cells.
    """
    height, width = labels.shape
    side = max(height, width) / SQUARES
    y, x = (_borders(length, min(length, max(1, round(length / side)))) for length in (height, width))
    rows_covered = np.add.reduceat(labels > 0, y[:-1], axis=0, dtype=np.int64)
    centroids = [table.columns[f"centroid_{axis}_px"] for axis in "yx"]
    # Centroids are of pixel centres, which lie half a pixel from the borders: none can lie on one from outside.
    at = [
        np.searchsorted(borders, values + 0.5, side="right") - 1
        for borders, values in zip((y, x), centroids, strict=True)
    ]
    n_cells, n_counted = np.zeros((2, len(y) - 1, len(x) - 1), np.int64)
    np.add.at(n_cells, tuple(at), 1)
    np.add.at(n_counted, tuple(at), counted.astype(np.int64))
    return Grid(x, y, np.add.reduceat(rows_covered, x[:-1], axis=1), n_cells, n_counted)


def _borders(length: int, parts: int) -> Ints:
    return np.arange(parts + 1, dtype=np.int64) * length // parts
