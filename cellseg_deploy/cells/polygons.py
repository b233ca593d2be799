"""Label image -> polygons of every cell along the edges of its pixels.

Coordinates are those of ImageJ, QuPath and COCO: a pixel is a unit square, its *corners* have integer coordinates, and
the image's top left corner is (0, 0). So the pixel of column 7 and row 3 covers 7..8 x 3..4, the polygon of a cell
encloses exactly its pixels, and its area *is* the number of its pixels. (Tables of cells have centroids of pixel
centres, which are integers there: half a pixel less in x and y.)

    labels         polygon of cell 1
    . 1 1 .        (1,0) (3,0) (3,1) (2,1) (2,2) (1,2)     area 3
    . 1 . .

A contour through pixel centres, which most libraries return, is half a pixel too small all around: 2 % of the area of
a cell of 90 px. So contours are traced in an image enlarged twice and moved to the nearest pixel corner: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Ints, paint, pieces, row_runs
from cellseg_deploy.cells.measure import boxes

Ring = Ints
"""Corners (n, 2) of a closed line in order, x and y in px; the first is not repeated at the end. Steps are along rows
and columns in turn."""


@dataclass(frozen=True)
class CellPolygons:
    """Polygons of one cell: usually one, several if the label is in several 4-connected pieces.

    A polygon is a tuple of rings, the outer ring first, followed by its holes. With y upwards, outer rings run
    counterclockwise and holes clockwise, as in GeoJSON (RFC 7946, 3.1.6): ``ring_area`` is positive for outer rings
    and negative for holes, and the sum over all rings is the cell's area in pixels.
    """

    label: int
    polygons: tuple[tuple[Ring, ...], ...]

    @property
    def is_simple(self) -> bool:
        """Whether the cell is one polygon without a hole."""
        return len(self.polygons) == 1 and len(self.polygons[0]) == 1


def cell_polygons(labels: npt.NDArray[np.integer[Any]]) -> list[CellPolygons]:
    """Polygons of all cells of ``labels`` (h, w), 0 = background, in order of label; numbers may have gaps.

    Every ring is simple, and the polygons are valid by OGC's rules. Raises ``UsageError`` for anything that is not a
    label image. Needs 4 bytes per pixel of the image.
    """
    runs = row_runs(labels)
    piece = pieces(runs)
    label_of_piece = runs.label[np.unique(piece, return_index=True)[1]]
    # Each 4-connected piece is traced separately: two pieces that meet only at a corner would share a ring that crosses
    # itself. This way a piece has one outer ring, and every hole is simple.
    numbered = paint(runs, piece + 1)
    piece_boxes = boxes(numbered, np.arange(1, len(label_of_piece) + 1)).tolist()
    rings_of_piece = _rings(
        [
            _contours(numbered[top : top + height, left : left + width] == number, left, top)
            for number, (left, top, width, height) in enumerate(piece_boxes, start=1)
        ]
    )
    polygons: dict[int, list[tuple[Ring, ...]]] = {int(label): [] for label in np.unique(label_of_piece)}
    for label, rings in zip(label_of_piece.tolist(), rings_of_piece, strict=True):
        polygons[label].append(rings)
    return [CellPolygons(label, tuple(parts)) for label, parts in polygons.items()]


def ring_area(ring: Ring) -> int:
    """Signed area in px (shoelace formula), positive where the ring runs counterclockwise with y upwards."""
    x, y = ring[:, 0], ring[:, 1]
    return int(x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1]) // 2


def _contours(mask: npt.NDArray[np.bool_], left: int, top: int) -> list[Ints]:
    """Contours of the single 4-connected piece in ``mask`` (h, w), enlarged twice, the outer contour first.

    Each (n, 2), x and y in the enlarged image; the corner of ``mask`` is at ``left``, ``top`` of the original.
    """
    import cv2

    doubled = np.ascontiguousarray(mask.view(np.uint8).repeat(2, axis=0).repeat(2, axis=1))
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(2 * left, 2 * top))
    parents = np.asarray(hierarchy).reshape(-1, 4)[:, 3]
    return [np.asarray(contours[index]).reshape(-1, 2) for index in np.argsort(parents >= 0, kind="stable")]


def _rings(contours_of_piece: list[list[Ints]]) -> list[tuple[Ring, ...]]:
    """Contours of the enlarged image -> rings of the original; all at once, since a ring has only a few dozen points.

    Pixel k of the original became 2k and 2k + 1 in the enlarged image: 2k maps to the pixel's near edge k, 2k + 1 to
    its far edge k + 1.
    """
    contours = [contour for contours in contours_of_piece for contour in contours]
    if not contours:
        return []
    size = np.array([len(contour) for contour in contours])
    corners = (np.concatenate(contours).astype(np.int64) + 1) // 2
    is_new = (corners != corners[_neighbours(size)[0]]).any(axis=1)
    corners, size = corners[is_new], np.add.reduceat(is_new, np.cumsum(size) - size)
    before, after = _neighbours(size)
    turns = (corners[:, 0] == corners[before, 0]) != (corners[after, 0] == corners[:, 0])
    corners, size = corners[turns], np.add.reduceat(turns, np.cumsum(size) - size)
    rings = iter(np.split(corners, np.cumsum(size)[:-1]))
    return [
        tuple(_normal(next(rings), is_hole=index > 0) for index in range(len(contours)))
        for contours in contours_of_piece
    ]


def _neighbours(size: Ints) -> tuple[Ints, Ints]:
    """Index of the points before and after each point of consecutive closed rings of ``size`` points."""
    stop = np.cumsum(size)
    before, after = np.arange(-1, stop[-1] - 1), np.arange(1, stop[-1] + 1)
    before[stop - size], after[stop - 1] = stop - 1, stop - size
    return before, after


def _normal(ring: Ring, *, is_hole: bool) -> Ring:
    """Return ``ring`` in its proper direction, starting at the topmost, then leftmost corner."""
    first = int(np.lexsort((ring[:, 0], ring[:, 1]))[0])
    ring = np.concatenate([ring[first:], ring[:first]])
    return ring if (ring_area(ring) < 0) == is_hole else np.concatenate([ring[:1], ring[:0:-1]])
