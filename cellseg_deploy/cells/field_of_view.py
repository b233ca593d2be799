"""The part of a picture that shows the specimen, without eyepiece surround, frame, letterbox and information band.

An area is left out if it touches a corner of the picture, is much darker than the field or of one exact colour, and
lies outside the convex hull of the rest. So dark cells at the border stay (the field around them would not be convex),
and so do all of a fluorescence image (its median is as dark as its background) and an empty field of normal colour.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.instances import VISIBLE_AREA_REL, BorderCells
from cellseg_deploy.cells.label_runs import bands
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import InstanceParams

Field = Literal["auto", "full"]
FIELDS: tuple[Field, ...] = ("auto", "full")
Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]

MAX_AREA = 25.0
"""Multiple of the model's cell area above which an object in a picture with surround is not a cell."""
_LOOKED_AT_PX = 400  # longest side
_MIN_SIDE_PX = 32
_DARK, _DARKEST_FIELD = 0.3, 80  # share of the field's brightness; its least median brightness
_FLAT = 12  # grey levels by which pixels of one colour differ: JPEG rings next to an edge
_EXACT, _MOSTLY = 2, 0.7  # away from edges they hardly differ; an evenly lit background does
_MIN_PART, _MIN_OUTSIDE, _MIN_FIELD = 0.004, 0.03, 0.15  # share of the picture; a dark last row is not a surround
_MAX_IN_HULL, _MAX_IN_HULL_STRAIGHT = 0.15, 0.04  # share of an area left out; a round body in a corner has 0.36
_MAX_CORNERS, _STRAIGHT = 8, 0.99
_RIM = 1.5  # small pixels cut off inside the outermost one kept: they show both
_REACH_PX = 3  # a cell this close to the field's edge touches it


def check_field(field: str) -> None:
    """Raise ``UsageError`` if ``field`` is unknown."""
    if field not in FIELDS:
        raise UsageError(f"field must be one of {', '.join(FIELDS)}, got {field!r}")


def find_field(image_hwc: npt.NDArray[np.uint8]) -> Mask | None:
    """Find the field of view of ``image_hwc``, uint8 RGB (h, w, 3): bool (h, w), convex; None if it is all of it."""
    import cv2

    height, width = image_hwc.shape[:2]
    small = small_picture(image_hwc)
    if small is None:
        return None
    size = small.shape[1], small.shape[0]
    outside = np.zeros(small.shape[:2], np.bool_)
    brightness = np.asarray(cv2.max(cv2.max(small[..., 0], small[..., 1]), small[..., 2]))
    dark_below = _DARK * max(float(np.quantile(brightness, 0.85)), _DARKEST_FIELD)
    outside |= _left_out(brightness < dark_below, straight=False)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        if not outside[y, x]:
            colour = small[y, x].astype(np.float64)
            alike = np.asarray(cv2.inRange(small, tuple(colour - _FLAT), tuple(colour + _FLAT))) > 0
            found = _left_out(alike | outside, straight=True)
            if _is_one_colour(small[found & ~outside]):
                outside |= found
    if outside.mean() < _MIN_OUTSIDE:
        return None
    hull = _hull(_largest(~outside))
    inside = np.asarray(cv2.erode(_drawn(hull, small.shape[:2]), np.ones((3, 3), np.uint8))) > 0
    if not _MIN_FIELD <= inside.mean() <= 1 - _MIN_OUTSIDE or float(np.median(brightness[inside])) < _DARKEST_FIELD:
        return None
    # Outer edges of the small pixels at the picture's own border, centres elsewhere, in pixels of the image.
    small_last, last = np.array(size) - 1, np.array([width, height]) - 1
    corners = cv2.approxPolyDP(hull.reshape(-1, 1, 2), 0.5, closed=True).reshape(-1, 2)
    full = np.where(corners == 0, 0, np.where(corners == small_last, last, (corners + 0.5) * (last + 1) / size))
    polygon = np.array([(0, 0), (last[0], 0), last, (0, last[1])], np.float64)
    rim = _RIM * width / size[0]
    for start, end, normal, offset in zip(full, np.roll(full, -1, axis=0), *_sides(full), strict=True):
        if not ((start == end) & ((start == 0) | (start == last))).any():  # the picture's border has no rim
            polygon = _cut(polygon, normal, offset - rim)
    return _drawn(np.rint(polygon).astype(np.int32), (height, width)) > 0


def small_picture(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    """``image_hwc``, uint8 RGB (h, w, 3), with its longest side reduced to 400 px; None if it is only a strip then."""
    import cv2

    height, width = image_hwc.shape[:2]
    factor = min(1.0, _LOOKED_AT_PX / max(height, width))
    size = (round(width * factor), round(height * factor))
    if min(size) < _MIN_SIDE_PX:
        return None
    step = max(1, max(height, width) // (2 * _LOOKED_AT_PX))  # averages of every pixel take four times as long
    coarse = cv2.resize(image_hwc, (-(-width // step), -(-height // step)), interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_AREA), np.uint8)


def without_surround(image_hwc: npt.NDArray[np.uint8], field: Mask) -> npt.NDArray[np.uint8]:
    """Fill ``image_hwc`` (h, w, 3) outside ``field`` (h, w), a convex area, with the field's mirror image, so that its
    edge cuts cells as a picture's border does. Where the mirror image ends, the colour of an empty field is used."""
    import cv2

    height, width = field.shape
    step = max(1, *(side // _LOOKED_AT_PX for side in field.shape))
    colour = np.quantile(image_hwc[::step, ::step][field[::step, ::step]], 0.8, axis=0).astype(np.uint8)
    corners = cv2.approxPolyDP(_hull(field).reshape(-1, 1, 2), 1.0, closed=True).reshape(-1, 2).astype(np.float64)
    normals, offsets = _sides(corners)
    # The nearest side is found on a coarse grid, its distance at every pixel.
    grid_y, grid_x = np.mgrid[step // 2 : height + step : step, step // 2 : width + step : step]
    nearest, farthest = np.zeros(grid_y.shape, np.int64), np.full(grid_y.shape, -np.inf)
    for side, (normal, offset) in enumerate(zip(normals, offsets, strict=True)):
        distance = normal[0] * grid_x + normal[1] * grid_y - offset
        nearest[distance > farthest] = side
        np.maximum(farthest, distance, out=farthest)
    filled = image_hwc.copy()
    for rows in bands((height, width), at_least=1):
        y, x = np.nonzero(~field[rows])
        filled[rows][y, x] = colour
        side = nearest[(y + rows.start) // step, x // step]
        twice = 2 * (normals[side, 0] * x + normals[side, 1] * (y + rows.start) - offsets[side])
        from_x = np.rint(x - twice * normals[side, 0]).astype(np.int64)
        from_y = np.rint(y + rows.start - twice * normals[side, 1]).astype(np.int64)
        within = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        within[within] = field[from_y[within], from_x[within]]
        filled[rows][y[within], x[within]] = image_hwc[from_y[within], from_x[within]]
    return filled


def inside_field(
    labels: npt.NDArray[np.int32], field: Mask, *, min_edge_area_rel: float, max_area_px: float
) -> npt.NDArray[np.int32]:
    """Crop ``labels`` (h, w), int32, to ``field`` (h, w), renumbered 1..n in the same order.

    A cell is removed if the edge leaves less than ``min_edge_area_rel`` of the median area, or if it is larger than
    ``max_area_px`` and so is not a cell.
    """
    kept_px = np.where(field, labels, 0)
    after = np.bincount(kept_px.reshape(-1), minlength=labels.max() + 1)
    kept = (after > 0) & (after <= max_area_px)
    kept[0] = False
    at_edge = np.zeros_like(kept)
    at_edge[1:] = edges(kept_px, field, int(labels.max())).any(axis=1)
    whole = after[kept & ~at_edge]
    if len(whole):
        kept &= ~at_edge | (after >= min_edge_area_rel * float(np.median(whole)))
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return np.asarray(numbers[kept_px], np.int32)


def least_edge_area_rel(params: InstanceParams, border_cells: BorderCells) -> float:
    """Share of the median cell below which a cell at the edge of the field of view is dropped."""
    rel = params.min_border_area_rel
    return rel if border_cells == "model" else min(rel, VISIBLE_AREA_REL)


def edges(labels: npt.NDArray[np.integer[Any]], field: Mask, count: int) -> Mask:
    """Whether the field's edge lies at the left, top, right or bottom of each cell, bool (count, 4).

    ``labels`` (h, w), 1..count. Everything beyond the picture is outside ``field`` (h, w).
    """
    found = np.zeros((count + 1, 4), np.bool_)
    framed: Mask = np.pad(field, _REACH_PX)
    height, width = field.shape
    for side, (dy, dx) in enumerate(((0, -1), (-1, 0), (0, 1), (1, 0))):
        near = np.zeros_like(field)
        for step in range(1, _REACH_PX + 1):
            top, left = _REACH_PX + dy * step, _REACH_PX + dx * step
            inner = framed[top : top + height, left : left + width]
            near |= ~inner
            if step == 1:
                first = ~inner
        # At the picture's own border a cell touches with its last pixel, as everywhere else.
        y, x = np.ogrid[:height, :width]
        beyond = ((y < _REACH_PX) & (dy < 0)) | ((y >= height - _REACH_PX) & (dy > 0))
        beyond = beyond | ((x < _REACH_PX) & (dx < 0)) | ((x >= width - _REACH_PX) & (dx > 0))
        near = np.where(beyond, first, near)
        found[np.unique(labels[near]), side] = True
    return found[1:]


def note(field: Mask) -> Note:
    """Note for the user on a picture of which ``field`` (h, w) is only a part."""
    return Note(
        f"the field of view is {field.mean():.0%} of the picture; the rest (surround, frame or band) is "
        "excluded from cells, confluence and density: check the overlay; `field='full'` uses the whole picture",
        "field of view",
    )


def _left_out(candidates: Mask, *, straight: bool) -> Mask:
    """Return the parts of ``candidates`` (h, w) that touch a corner and leave a convex rest.

    ``straight``: the rest must have straight edges, because overexposed background has one colour too.
    """
    import cv2

    result = np.zeros_like(candidates)
    count, parts = cv2.connectedComponents(candidates.astype(np.uint8), connectivity=4)
    at_corners = [int(parts[y, x]) for y in (0, -1) for x in (0, -1) if candidates[y, x]]
    numbers = [n for n in dict.fromkeys(at_corners) if np.count_nonzero(parts == n) >= _MIN_PART * parts.size]
    if not numbers:
        return result
    chosen = np.zeros(count, np.bool_)
    chosen[numbers] = True
    together = chosen[parts]
    if together.all():
        return result
    # Regions that the parts enclose or cut off, such as letters of a band, are not field.
    hull = _hull(_largest(~together))
    inside = _drawn(hull, parts.shape) > 0
    most = _MAX_IN_HULL_STRAIGHT if straight else _MAX_IN_HULL
    for number in numbers:
        part = parts == number
        if np.count_nonzero(part & inside) <= most * np.count_nonzero(part):
            result |= part
    if straight and result.any():
        polygon = cv2.approxPolyDP(hull.astype(np.int32).reshape(-1, 1, 2), 2.0, closed=True).reshape(-1, 2)
        covered = np.count_nonzero(_drawn(polygon, parts.shape)) / max(1, int(np.count_nonzero(inside)))
        if len(polygon) > _MAX_CORNERS or covered < _STRAIGHT:
            return np.zeros_like(result)
    return result


def _is_one_colour(pixels: npt.NDArray[np.uint8]) -> bool:
    """Whether most ``pixels`` (n, 3) have one colour, as in a drawn frame but not in a photographed background."""
    if not len(pixels):
        return False
    away = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1)
    return bool((away <= _EXACT).mean() >= _MOSTLY)


def _largest(mask: Mask) -> Mask:
    import cv2

    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    areas = np.bincount(parts[mask])
    return np.asarray(parts == int(np.argmax(areas)))


def _hull(mask: Mask) -> npt.NDArray[np.int32]:
    import cv2

    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return np.asarray(cv2.convexHull(np.concatenate(contours)).reshape(-1, 2), np.int32)


def _sides(corners: Points) -> tuple[Points, npt.NDArray[np.float64]]:
    """Outward normals (n, 2) of the sides of a convex polygon, each from a corner (n, 2) to the next, and the offset of
    each side from the origin along its normal (n,)."""
    along = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([along[:, 1], -along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    normals *= np.sign(np.sum(normals * (corners - corners.mean(axis=0)), axis=1, keepdims=True))
    return normals, np.sum(normals * corners, axis=1)


def _cut(polygon: Points, normal: npt.NDArray[np.float64], offset: float) -> Points:
    """The part of a convex ``polygon`` (n, 2) below ``offset`` along ``normal`` (Sutherland and Hodgman)."""
    height = polygon @ normal - offset
    kept = list[npt.NDArray[np.float64]]()
    for start, end, low, high in zip(polygon, np.roll(polygon, -1, axis=0), height, np.roll(height, -1), strict=True):
        if low <= 0:
            kept.append(start)
        if low * high < 0:
            kept.append(start + (end - start) * low / (low - high))
    return np.array(kept).reshape(-1, 2)


def _drawn(polygon: npt.NDArray[np.int32], hw: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    import cv2

    mask = np.zeros(hw[:2], np.uint8)
    return np.asarray(cv2.fillConvexPoly(mask, np.ascontiguousarray(polygon), 1), np.uint8)
