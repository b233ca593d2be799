"""Coverage of an image, square by square: its longer side is cut into eight; squares differ by at most one pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Ints
from cellseg_deploy.cells.measure import CellTable

SQUARES = 8


@dataclass(frozen=True)
class Grid:
    """Figures per square, each (rows, columns). ``x``, ``y``: borders in px, (columns + 1,), (rows + 1,).

    ``field_px``: pixels of the field of view. ``covered_px``: pixels of cells.
    ``cells``, ``counted``: cells whose centroid lies in the square.
    """

    x: Ints
    y: Ints
    covered_px: Ints
    cells: Ints
    counted: Ints
    field_px: Ints

    @property
    def share(self) -> npt.NDArray[np.float64]:
        """Covered share of the field in each square, 0 to 1; NaN for squares outside the field."""
        nothing = np.full(self.field_px.shape, np.nan)
        return np.asarray(np.divide(self.covered_px, self.field_px, out=nothing, where=self.field_px > 0))


def grid(
    labels: npt.NDArray[np.int32],
    table: CellTable,
    counted: npt.NDArray[np.bool_],
    field: npt.NDArray[np.bool_] | None = None,
) -> Grid:
    """Return the squares of ``labels`` (h, w). ``table`` has one row per cell; ``counted`` (n,): whether it counts.
    ``field`` (h, w): the field of view, None for all.

    Summed over the squares, the figures are the image's covered pixels and cells.
    """
    height, width = labels.shape
    side = max(height, width) / SQUARES
    y, x = (_borders(length, min(length, max(1, round(length / side)))) for length in (height, width))
    field_px = np.outer(np.diff(y), np.diff(x)) if field is None else _pixels(field, y, x)
    centroids = [table.columns[f"centroid_{axis}_px"] for axis in "yx"]
    # Centroids average pixel centres, half a pixel from any border, so a centroid cannot lie on the outer border.
    at = [
        np.searchsorted(borders, values + 0.5, side="right") - 1
        for borders, values in zip((y, x), centroids, strict=True)
    ]
    n_cells, n_counted = np.zeros((2, len(y) - 1, len(x) - 1), np.int64)
    np.add.at(n_cells, tuple(at), 1)
    np.add.at(n_counted, tuple(at), counted.astype(np.int64))
    return Grid(x, y, _pixels(labels > 0, y, x), n_cells, n_counted, field_px)


def _pixels(mask: npt.NDArray[np.bool_], y: Ints, x: Ints) -> Ints:
    rows = np.add.reduceat(mask, y[:-1], axis=0, dtype=np.int64)
    return np.asarray(np.add.reduceat(rows, x[:-1], axis=1), np.int64)


def _borders(length: int, parts: int) -> Ints:
    return np.arange(parts + 1, dtype=np.int64) * length // parts
