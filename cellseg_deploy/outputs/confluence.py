"""Where the field is covered and how densely: a map with the share in each square, and the same figures as a table.

The squares are those of ``field_grid``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellseg_deploy.outputs import picture_file, tables
from cellseg_deploy.outputs.overlay import dimmed, to_viewing_size, with_caption, write_centred
from cellseg_deploy.outputs.palette import COUNTED_RGB
from cellseg_deploy.outputs.segmented import SegmentedImage

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


def encode_map(image: SegmentedImage, suffix: str = picture_file.JPG) -> bytes:
    """Encode ``draw(image)`` as a picture file."""
    return picture_file.encode(draw(image), suffix)


def encode_table(image: SegmentedImage) -> bytes:
    """Encode the figures as a CSV file, one row per square, row by row from the top left."""
    figures = image.grid
    share = figures.share
    rows = [
        (
            *(row, column, figures.x[column], figures.y[row]),
            *(figures.x[column + 1] - figures.x[column], figures.y[row + 1] - figures.y[row]),
            *(figures.covered_px[row, column], _known(share[row, column])),
            *(figures.cells[row, column], figures.counted[row, column]),
        )
        for row in range(len(figures.y) - 1)
        for column in range(len(figures.x) - 1)
    ]
    return tables.csv_rows([COLUMNS, *rows])


def draw(image: SegmentedImage) -> npt.NDArray[np.uint8]:
    """Draw an RGB picture: the image with covered area tinted, each square's percentage, and the total in a corner."""
    import cv2

    figures = image.grid
    shown = image.pixels_hwc if image.field is None else dimmed(image.pixels_hwc, image.field)
    pixels, labels = to_viewing_size(shown, image.labels)
    picture, covered = pixels.copy(), labels > 0
    tinted = cv2.addWeighted(picture, 1 - _TINT, np.full_like(picture, COUNTED_RGB), _TINT, 0)
    picture[covered] = np.asarray(tinted)[covered]
    y, x = (borders * size // borders[-1] for borders, size in zip((figures.y, figures.x), labels.shape, strict=True))
    picture[y[1:-1]] = picture[:, x[1:-1]] = _LINE_RGB
    scale = max(0.4, min(picture.shape[:2]) / 1000)
    for (row, column), share in np.ndenumerate(figures.share):
        if np.isnan(share):  # outside the field
            continue
        centre = ((x[column] + x[column + 1]) / 2, (y[row] + y[row + 1]) / 2)
        write_centred(picture, f"{100 * share:.0f} %", centre, scale)
    return with_caption(picture, f"confluence {100 * figures.covered_px.sum() / image.field_px:.1f} %")


def _known(share: np.float64) -> np.float64 | None:
    """Return None, an empty table cell, for a square outside the field."""
    return None if np.isnan(share) else share
