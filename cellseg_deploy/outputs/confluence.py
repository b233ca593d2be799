"""Where the field is covered and how densely: a map with the share in every square, and the same figures as a table.

The longer side is cut into eight; squares of one image differ by a pixel at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.outputs import jpeg, tables
from cellseg_deploy.outputs.overlay import to_viewing_size, with_caption, write_centred
from cellseg_deploy.outputs.palette import COUNTED_RGB
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.runs import Ints

SQUARES = 8
COLUMNS = (
    "row",
    "column",
    "left_px",
    "top_px",
    "width_px",
    "height_px",
    "covered_px",
    "confluence",
    "cells",
    "counted",
)
_TINT = 0.35  # share of the colour over covered pixels
_LINE_RGB = (255, 255, 255)


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


def grid(image: SegmentedImage) -> Grid:
    """The squares of one image; their sums over the image are its covered pixels and its cells."""
    height, width = image.labels.shape
    side = max(height, width) / SQUARES
    y, x = (_borders(length, min(length, max(1, round(length / side)))) for length in (height, width))
    rows_covered = np.add.reduceat(image.labels > 0, y[:-1], axis=0, dtype=np.int64)
    centroids = [image.table.columns[f"centroid_{axis}_px"] for axis in "yx"]
    # Centroids are of pixel centres, which lie half a pixel from the borders: none can lie on one from outside.
    at = [
        np.searchsorted(borders, values + 0.5, side="right") - 1
        for borders, values in zip((y, x), centroids, strict=True)
    ]
    cells, counted = np.zeros((2, len(y) - 1, len(x) - 1), np.int64)
    np.add.at(cells, tuple(at), 1)
    np.add.at(counted, tuple(at), image.counted.astype(np.int64))
    return Grid(x, y, np.add.reduceat(rows_covered, x[:-1], axis=1), cells, counted)


def encode_map(image: SegmentedImage) -> bytes:
    """JPEG file of ``draw(image)``."""
    return jpeg.encode(draw(image))


def encode_table(image: SegmentedImage) -> bytes:
    """CSV file of the figures, a row a square, row by row from the top left."""
    figures = grid(image)
    share = figures.share
    rows = [
        (
            *(row, column, figures.x[column], figures.y[row]),
            *(figures.x[column + 1] - figures.x[column], figures.y[row + 1] - figures.y[row]),
            *(figures.covered_px[row, column], share[row, column]),
            *(figures.cells[row, column], figures.counted[row, column]),
        )
        for row in range(len(figures.y) - 1)
        for column in range(len(figures.x) - 1)
    ]
    return tables.csv_rows([COLUMNS, *rows])


def draw(image: SegmentedImage) -> npt.NDArray[np.uint8]:
    """RGB picture: the image, its covered area tinted, every square's percentage, and that of all in a corner."""
    import cv2

    figures = grid(image)
    pixels, labels = to_viewing_size(image.pixels_hwc, image.labels)
    picture, covered = pixels.copy(), labels > 0
    tinted = cv2.addWeighted(picture, 1 - _TINT, np.full_like(picture, COUNTED_RGB), _TINT, 0)
    picture[covered] = np.asarray(tinted)[covered]
    y, x = (borders * size // borders[-1] for borders, size in zip((figures.y, figures.x), labels.shape, strict=True))
    picture[y[1:-1]] = picture[:, x[1:-1]] = _LINE_RGB
    scale = max(0.4, min(picture.shape[:2]) / 1000)
    for (row, column), share in np.ndenumerate(figures.share):
        centre = ((x[column] + x[column + 1]) / 2, (y[row] + y[row + 1]) / 2)
        write_centred(picture, f"{100 * share:.0f} %", centre, scale)
    return with_caption(picture, f"confluence {100 * figures.covered_px.sum() / image.labels.size:.1f} %")


def _borders(length: int, parts: int) -> Ints:
    return np.arange(parts + 1, dtype=np.int64) * length // parts
