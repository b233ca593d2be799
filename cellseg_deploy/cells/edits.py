"""Edits of a label image by hand: delete, merge, split by a line, draw.

Each function takes ``labels`` (h, w) int32, 0 = background, and returns a ``Patch``, the rectangle that changes; it
leaves ``labels`` as they are. Cells keep their numbers; a new cell gets ``number``, which the caller has not used
before. Points are x and y in px with integers at the pixels' corners, as in ``polygons``. An edit that cannot be made
raises ``UsageError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.errors import UsageError

Points = Sequence[Sequence[float]]
SMALLEST_PX = 4
"""Smaller cells cannot be drawn, and smaller pieces do not become cells when a cell is split."""


@dataclass(frozen=True)
class Patch:
    """A rectangle of a label image: its first row and column, and its labels before and after, (h, w) each.

    It holds all pixels of the cells that change.
    """

    top: int
    left: int
    before: Labels
    after: Labels

    def apply(self, labels: Labels) -> None:
        """Make the edit in ``labels``."""
        labels[self._place] = self.after

    def revert(self, labels: Labels) -> None:
        """Undo the edit in ``labels``."""
        labels[self._place] = self.before

    @property
    def numbers(self) -> list[int]:
        """Numbers of the cells that gain or lose pixels, ascending."""
        differ = self.before != self.after
        found = np.union1d(self.before[differ], self.after[differ])
        return [number for number in found.tolist() if number > 0]

    @property
    def _place(self) -> tuple[slice, slice]:
        height, width = self.after.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def delete(labels: Labels, numbers: Sequence[int]) -> Patch:
    """Remove the cells ``numbers``."""
    place = _place_of(labels, numbers)
    crop = labels[place]
    return _patch(labels, place, np.where(np.isin(crop, numbers), 0, crop).astype(np.int32))


def merge(labels: Labels, numbers: Sequence[int]) -> Patch:
    """Make one cell of the cells ``numbers``, which must touch each other; it keeps the number of the largest."""
    numbers = sorted(set(numbers))
    if len(numbers) < 2:
        raise UsageError(f"merging needs two cells or more, got {len(numbers)}; select them with Shift and a click")
    place = _place_of(labels, numbers)
    crop = labels[place]
    apart = [number for number in numbers if not _touching(crop, numbers)[number]]
    if apart:
        raise UsageError(
            f"cells {', '.join(map(str, numbers))} are not one cell: {', '.join(map(str, apart))} touches none of the "
            "others; draw over the gap first, or select cells that touch"
        )
    kept = max(numbers, key=lambda number: int(np.count_nonzero(crop == number)))
    return _patch(labels, place, np.where(np.isin(crop, numbers), kept, crop).astype(np.int32))


def split(labels: Labels, cell: int, line: Points, number: int) -> Patch:
    """Cut ``cell`` along the polyline ``line``: the largest part keeps its number, others are ``number``, ``+ 1``, ...

    The line's own pixels go to the nearest part, and crumbs to a neighbour, so no pixel is lost.
    """
    import cv2
    from scipy import ndimage

    if len(line) < 2:
        raise UsageError(f"splitting needs a line of two points or more, got {len(line)}")
    place = _place_of(labels, [cell])
    crop = labels[place]
    inside = crop == cell
    shift = np.array([place[1].start, place[0].start])
    corners = np.floor(_points(line) - shift).astype(np.int32)
    cut = np.zeros(crop.shape, np.uint8)
    cv2.polylines(cut, [corners.reshape(-1, 1, 2)], isClosed=False, color=1, thickness=1, lineType=cv2.LINE_8)
    rest = inside & (cut == 0)
    pieces, n_pieces = ndimage.label(rest)
    _, n_before = ndimage.label(inside)
    areas = np.bincount(pieces.ravel(), minlength=n_pieces + 1)
    areas[0] = 0
    smallest = max(SMALLEST_PX, round(0.01 * float(np.count_nonzero(inside))))
    large = [piece for piece in np.argsort(-areas, kind="stable").tolist() if areas[piece] >= smallest]
    if not (inside & (cut > 0)).any() or len(large) <= n_before or len(large) < 2:
        raise UsageError(f"the line does not cross cell {cell}: begin and end it outside of the cell")
    part_of = np.zeros(n_pieces + 1, np.int32)
    part_of[large] = np.arange(1, len(large) + 1)
    parts = part_of[pieces]
    nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    parts = np.where(inside, parts[tuple(nearest)], 0)
    by_area = np.argsort(-np.bincount(parts.ravel())[1:], kind="stable") + 1
    new = np.zeros(len(large) + 1, np.int32)
    new[by_area] = [cell, *range(number, number + len(large) - 1)]
    return _patch(labels, place, np.where(inside, new[parts], crop).astype(np.int32))


def draw(labels: Labels, outline: Points, number: int) -> Patch:
    """Add the cell ``number``: the background inside the polygon ``outline``; pixels of other cells stay theirs.

    A pixel is inside if its centre is. Of several pieces only the largest is kept.
    """
    from scipy import ndimage
    from skimage.draw import polygon

    if len(outline) < 3:
        raise UsageError(f"drawing needs an outline of three points or more, got {len(outline)}")
    points = _points(outline)
    rows, columns = polygon(points[:, 1] - 0.5, points[:, 0] - 0.5, labels.shape)
    if not len(rows):
        raise UsageError("the outline lies outside of the picture, or encloses no pixel")
    place = slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)
    crop = labels[place]
    mask = np.zeros(crop.shape, np.bool_)
    mask[rows - place[0].start, columns - place[1].start] = True
    pieces, _ = ndimage.label(mask & (crop == 0))
    areas = np.bincount(pieces.ravel())
    areas[0] = 0
    largest = int(areas.argmax())
    if areas[largest] < SMALLEST_PX:
        raise UsageError(
            f"the outline encloses {int(areas[largest])} free pixels; expected {SMALLEST_PX} or more that belong to no "
            "other cell"
        )
    return _patch(labels, place, np.where(pieces == largest, number, crop).astype(np.int32))


def replace_all(labels: Labels, new: Labels) -> Patch:
    """Replace all labels by ``new`` (h, w)."""
    if labels.shape != new.shape:
        raise UsageError(f"labels of {new.shape} cannot replace labels of {labels.shape}")
    return Patch(0, 0, labels.copy(), new.astype(np.int32))


def _patch(labels: Labels, place: tuple[slice, slice], after: Labels) -> Patch:
    return Patch(place[0].start, place[1].start, labels[place].copy(), after)


def _place_of(labels: Labels, numbers: Sequence[int]) -> tuple[slice, slice]:
    """Return the rectangle around the cells ``numbers``; ``UsageError`` if one is missing."""
    import cv2

    if not numbers:
        raise UsageError("no cell is selected")
    boxes = {number: cv2.boundingRect(cv2.compare(labels, int(number), cv2.CMP_EQ)) for number in numbers}
    if missing := [number for number, (_, _, width, _) in boxes.items() if not width]:
        raise UsageError(f"there is no cell {', '.join(map(str, missing))}: it was deleted or merged; reload the image")
    left, top, width, height = np.array(list(boxes.values())).T
    return slice(int(top.min()), int((top + height).max())), slice(int(left.min()), int((left + width).max()))


def _touching(crop: Labels, numbers: Sequence[int]) -> dict[int, bool]:
    """Whether each of ``numbers`` is connected with the first through the others, by sides or corners of pixels."""
    pairs = set[tuple[int, int]]()
    for one, other in (
        (crop[1:], crop[:-1]),
        (crop[:, 1:], crop[:, :-1]),
        (crop[1:, 1:], crop[:-1, :-1]),
        (crop[1:, :-1], crop[:-1, 1:]),
    ):
        meet = (one != other) & np.isin(one, numbers) & np.isin(other, numbers)
        pairs.update(zip(one[meet].tolist(), other[meet].tolist(), strict=True))
    reached = {numbers[0]}
    while more := {b for pair in pairs for a, b in (pair, pair[::-1]) if a in reached} - reached:
        reached |= more
    return {number: number in reached for number in numbers}


def _points(points: Points) -> npt.NDArray[np.float64]:
    """Return ``points`` as float64 (n, 2). Raises ``UsageError`` for anything that is not a list of x, y."""
    try:
        array = np.array(points, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"points must be pairs of numbers x, y ({error})") from error
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all() or (np.abs(array) > 1e6).any():
        raise UsageError(f"points must be pairs of numbers x, y within the picture, got shape {array.shape}")
    return array
