"""Shapes drawn by people to a label image.

A pixel belongs to a polygon if its centre lies inside, by the even-odd rule: holes are rings like any other, and a
polygon along pixel corners (``cells.polygons``) becomes exactly its pixels again. An edge that runs through a centre
gives the pixel to one of the two sides, so polygons that share an edge share no pixel. (cv2.fillPoly also paints the
pixels under the line: 2.9 % more area for a disc of 90 px; rasterio would bring GDAL. 0.13 ms for such a disc.)

Where shapes overlap, a pixel belongs to the smaller one, of two equal ones to the first: so the order in the file does
not matter, and no cell disappears below a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]
_FARTHEST_PX = 1e7
_GRID = 0.02  # px within which a corner lies on the grid: YOLO files have six decimals of the side
_FEWEST_OF_TRACE = 8  # corners; drawn ones may happen to have three edges in such directions
_FEWEST_TRACED, _FEWEST_CORNERS = 2, 24  # shapes, and their corners together: an octagon drawn by hand is no trace


@dataclass(frozen=True)
class MaskCrop:
    """``mask``, bool (h, w): part of an image of size ``image_hw``, whose first pixel is at ``top``, ``left``."""

    top: int
    left: int
    mask: Mask
    image_hw: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """One cell. ``polygons``: its pieces, each with its rings, outer rings and holes in any order, float64 (n, 2), x
    and y in px with (0, 0) the image's corner. ``place``: file and item, for messages. Or ``mask``: its pixels, see
    ``of_mask``."""

    place: str
    polygons: tuple[tuple[Floats, ...], ...] = ()
    class_name: str = ""
    mask: MaskCrop | None = None

    @classmethod
    def of_mask(cls, place: str, mask: Mask, class_name: str = "") -> Shape:
        """Return the shape of the pixels ``mask``, bool (h, w) over the whole image; keeps the part around them."""
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return cls(place, class_name=class_name, mask=MaskCrop(0, 0, np.zeros((0, 0), np.bool_), mask.shape))
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
        return cls(place, class_name=class_name, mask=MaskCrop(int(rows[0]), int(columns[0]), part, mask.shape))


@dataclass(frozen=True)
class Painted:
    """``labels``: int32 (h, w), 0 background, i the i-th of the shapes that have a pixel. ``classes``: their names, ""
    where unknown. ``overlapping``: shapes that lie by more than half under or over others. ``lost``: shapes
    without a pixel of their own: smaller than a pixel, drawn twice, or hidden by smaller ones. ``traced``: shapes whose
    outline runs through pixel centres, see ``are_traced``."""

    labels: Labels
    classes: tuple[str, ...]
    overlapping: int = 0
    lost: int = 0
    traced: int = 0


def paint_shapes(shapes: Sequence[Shape], image_hw: tuple[int, int], image: str) -> Painted:
    """Paint ``shapes`` into a label image (h, w); parts outside of it are cut off. ``image``: its name, for messages.

    Raises ``DataError`` for a shape that lies outside the image, or has coordinates that are not finite.
    """
    height, width = image_hw
    traced = are_traced(shapes)
    crops = [_crop(shape, image_hw, image, traced=traced) for shape in shapes]
    cover = np.zeros(image_hw, np.uint8)
    for top, left, mask in crops:
        part = cover[top : top + mask.shape[0], left : left + mask.shape[1]]
        part[mask & (part < 2)] += 1
    areas = [int(np.count_nonzero(mask)) for _, _, mask in crops]
    overlapping = 0
    owner = np.zeros((height, width), np.int32)
    # Painted last stays visible: the largest first, and of equal ones the first of the file last.
    for index in sorted(range(len(shapes)), key=lambda index: (-areas[index], -index)):
        top, left, mask = crops[index]
        place = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        overlapping += int(2 * np.count_nonzero(cover[place][mask] > 1) > areas[index])
        owner[place][mask] = index + 1
    there = np.unique(owner)
    there = there[there > 0]
    table = np.zeros(len(shapes) + 1, np.int32)
    table[there] = np.arange(1, len(there) + 1)
    classes = tuple(shapes[number - 1].class_name for number in there.tolist())
    n_traced = sum(bool(shape.polygons) for shape in shapes) if traced else 0
    return Painted(table[owner], classes, overlapping, len(shapes) - len(there), n_traced)


def are_traced(shapes: Sequence[Shape]) -> bool:
    """Whether all outlines of an image run through pixel centres, see ``is_trace``.

    One shape alone cannot tell: small cells and simplified outlines have such edges by chance, small traces too few
    corners. So several must be traces, and all others lie on the same grid.
    """
    polygons = [polygon for shape in shapes for polygon in shape.polygons]
    if not all(map(_on_grid, polygons)):
        return False
    corners = [sum(map(len, rings)) for rings in polygons if is_trace(rings)]
    return len(corners) >= _FEWEST_TRACED and sum(corners) >= _FEWEST_CORNERS


def _crop(shape: Shape, image_hw: tuple[int, int], image: str, *, traced: bool) -> tuple[int, int, Mask]:
    """Top, left and mask of the part of the image around ``shape``."""
    height, width = image_hw
    if shape.mask is not None:
        if shape.mask.image_hw != (height, width):
            said = f"{shape.mask.image_hw[1]} x {shape.mask.image_hw[0]} px"
            raise DataError(f"{shape.place}: mask of an image of {said}, but {image} is {width} x {height}")
        return shape.mask.top, shape.mask.left, shape.mask.mask
    rings = [ring for polygon in shape.polygons for ring in polygon]
    corners = np.concatenate(rings) if rings else np.zeros((0, 2))
    if not len(corners) or not (np.abs(corners) < _FARTHEST_PX).all():
        raise DataError(f"{shape.place}: an outline without corners, or with coordinates that are no pixels")
    low, high = corners.min(axis=0), corners.max(axis=0)
    if (high < 0).any() or (low > (width, height)).any():
        raise DataError(
            f"{shape.place}: outline from {low[0]:g}, {low[1]:g} to {high[0]:g}, {high[1]:g} lies outside {image}, "
            f"which is {width} x {height} px; is it of this image, at its full size?"
        )
    left, top = (int(value) for value in np.clip(np.floor(low), 0, (width, height)))
    right, bottom = (int(value) for value in np.clip(np.floor(high + _GRID) + 1, 0, (width, height)))
    mask = np.zeros((bottom - top, right - left), np.bool_)
    for polygon in shape.polygons:
        rings = [ring - (left, top) for ring in polygon]
        mask |= fill_trace(rings, mask.shape) if traced else fill(rings, mask.shape)
    return top, left, mask


def is_trace(rings: Sequence[Floats]) -> bool:
    """Whether ``rings`` (n, 2) run through the centres of a cell's border pixels, as ``cv2.findContours`` finds them.

    Programs that make outlines from masks with it (Cellpose's ROIs, Ultralytics' YOLO files, many that write COCO) lose
    half a pixel all around, whatever the format says about polygons. Such outlines have corners on the grid of pixels,
    at whole numbers or halves, and edges in its eight directions, diagonals too; outlines along the edges of pixels
    have no diagonals, and most drawn ones other edges.
    """
    if sum(map(len, rings)) < _FEWEST_OF_TRACE or not _on_grid(rings):
        return False
    steps = [np.abs(np.rint(ring) - np.roll(np.rint(ring), -1, axis=0)) for ring in rings]
    return any(bool(((step[:, 0] > 0) & (step[:, 0] == step[:, 1])).any()) for step in steps)


def _on_grid(rings: Sequence[Floats]) -> bool:
    """Whether the corners of ``rings`` (n, 2) lie on a grid of whole or half pixels, and their edges run in its eight
    directions."""
    for ring in rings:
        at = ring - rings[0][0]
        half = 2 * rings[0][0]
        if (np.abs(at - np.rint(at)) > _GRID).any() or (np.abs(half - np.rint(half)) > 2 * _GRID).any():
            return False
        across, down = np.abs(np.rint(at) - np.roll(np.rint(at), -1, axis=0)).T
        if ((across != down) & (across > 0) & (down > 0)).any():
            return False
    return True


def fill_trace(rings: Sequence[Floats], image_hw: tuple[int, ...]) -> Mask:
    """Pixels, bool (h, w), inside or on ``rings`` of an ``is_trace``, which run through the centres of pixels."""
    import cv2

    mask = np.zeros(image_hw, np.uint8)
    cv2.fillPoly(mask, [np.floor(ring + _GRID).astype(np.int32) for ring in rings], (1,))
    return mask > 0


def fill(rings: Sequence[Floats], image_hw: tuple[int, int]) -> Mask:
    """Pixels, bool (h, w), whose centre lies inside the closed ``rings`` (n, 2) by the even-odd rule.

    Scan lines: an edge toggles every pixel right of where it crosses the centre line of a row.
    """
    height, width = image_hw
    toggles = np.zeros((height, width + 1), np.int32)
    for ring in rings:
        following = np.roll(ring, -1, axis=0)
        is_down = (ring[:, 1] <= following[:, 1])[:, None]
        (x0, y0), (x1, y1) = np.where(is_down, ring, following).T, np.where(is_down, following, ring).T
        first = np.clip(np.ceil(y0 - 0.5), 0, height).astype(np.int64)  # rows with y0 <= row + 0.5 < y1
        rows_of_edge = np.maximum(np.clip(np.ceil(y1 - 0.5), 0, height).astype(np.int64) - first, 0)
        edge = np.repeat(np.arange(len(ring)), rows_of_edge)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(rows_of_edge) - rows_of_edge, rows_of_edge) + first[edge]
        slope = (x1 - x0)[edge] / (y1 - y0)[edge]
        crossing = x0[edge] + (row + 0.5 - y0[edge]) * slope
        np.add.at(toggles, (row, np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)), 1)
    return np.asarray(np.cumsum(toggles, axis=1)[:, :width] % 2 == 1)
