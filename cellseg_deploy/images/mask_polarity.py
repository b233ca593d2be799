"""Detection of masks saved as their own negative: the background looks like one huge cell, the cells like its holes.

A component (or a label) that touches all four sides is the background of nearly every mask. It is refused if the area
it leaves free is shaped like cells: compact, nearly convex pieces (area over area of the convex hull; the 90 masks of
BBBC041Seg and 41 of DSB 2018 have a mean of 0.74 and more, weighted by area). The gaps of a confluent layer are slits,
or lie between round cells and curve inwards (three touching discs leave 0.37), so such a layer is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import pieces, row_runs

MARGIN = 0.01
"""Share of a side that an empty frame may take."""
MIN_PIECE_PX = 20
"""Smaller pieces have no meaningful shape."""
CELL_SOLIDITY = 0.6
"""Between gaps of round cells (below 0.5) and cells, single or in chains (0.74 and more)."""
MIN_ASPECT = 0.15
"""Pieces with a smaller ratio of width to length are slits."""


@dataclass(frozen=True)
class Frame:
    """A component that touches all four sides: its ``share`` of the image, the number of ``pieces`` it leaves free, and
    ``is_background``: whether these pieces are shaped like cells."""

    share: float
    pieces: int
    is_background: bool


def frame_of(labels: npt.NDArray[np.int32]) -> Frame | None:
    """Find the label of ``labels`` (h, w) that touches all four sides, in one piece; None if none does.

    Empty rows and columns at the sides, up to ``MARGIN``, are ignored: some programs draw a frame.
    """
    labels = labels[within_margin(labels)]
    sides = [np.unique(side) for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1])]
    common = [int(label) for label in sides[0] if label and all(label in side for side in sides[1:])]
    for label in common:
        piece_labels = labels == label
        if _one_piece_touches_all_sides(piece_labels):
            n_pieces, solidity = _shape(~piece_labels)
            return Frame(float(piece_labels.mean()), n_pieces, n_pieces > 0 and solidity >= CELL_SOLIDITY)
    return None


def within_margin(values: npt.NDArray[Any]) -> tuple[slice, slice]:
    """Rows and columns of ``values`` (h, w) without those at the sides that contain only 0, if these are few."""
    inner = []
    for length, used in ((values.shape[0], values.any(axis=1)), (values.shape[1], values.any(axis=0))):
        most = max(1, round(MARGIN * length))
        at = np.flatnonzero(used)
        first, last = (int(at[0]), int(at[-1])) if len(at) else (0, length - 1)
        inner.append(slice(first if first <= most else 0, last + 1 if length - 1 - last <= most else length))
    return inner[0], inner[1]


def _one_piece_touches_all_sides(mask: npt.NDArray[np.bool_]) -> bool:
    runs = row_runs(mask.astype(np.int32))
    piece = pieces(runs)
    height, width = mask.shape
    touching = [
        set(piece[where].tolist())
        for where in (runs.row == 0, runs.row == height - 1, runs.start == 0, runs.stop == width)
    ]
    return bool(set.intersection(*touching))


def _shape(free: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Number of 8-connected pieces of ``free`` (h, w) and their mean solidity weighted by area; slits count as 0."""
    import cv2

    plane = free.astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
    if len(stats) < 2 or stats[1:, cv2.CC_STAT_AREA].max() < MIN_PIECE_PX:
        return 0, 0.0
    contours, _ = cv2.findContours(plane, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas, solidities = [], []
    for contour in contours:
        # By Pick's theorem, in pixels: the contour runs through their centres.
        area = cv2.contourArea(contour) + cv2.arcLength(contour, True) / 2 + 1
        if area < MIN_PIECE_PX:
            continue
        hull = cv2.convexHull(contour)
        width, height = (side + 1 for side in cv2.minAreaRect(contour)[1])
        is_slit = min(width, height) < MIN_ASPECT * max(width, height)
        areas.append(area)
        solidities.append(0.0 if is_slit else area / (cv2.contourArea(hull) + cv2.arcLength(hull, True) / 2 + 1))
    return len(areas), float(np.average(solidities, weights=areas)) if areas else 0.0
