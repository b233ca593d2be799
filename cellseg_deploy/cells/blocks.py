"""Labels of an image that is too large for memory, block by block, equal to those of the whole image.

The probabilities (K, h, w) are read in windows. A *block* is a band of rows; its window is larger by ``overlap`` rows
below and a few above. Labels are made per *object*, a 4-connected piece of the foreground::

    window  |   .##.        ##       |    <- rows of the block above, for context
            |===####=========#=======|    first row of the block
            |   ####   ##            |    ## is owned: its first pixel lies in the block
            |==========##============|    first row of the next block
            |          ##     ##     |    overlap
            +-----------------##-----+    an object that reaches the end of its window is not complete

Rows and columns without foreground around the objects of a window are left out: a sparse slide has many.

Everything that ``instances.segment`` does to a cell depends on its own object, on what lies inside that object, on the
cells within ``REACH_PX`` of it, and on one number of the whole image, the typical area. So an object that is complete
in a window, with complete neighbours, gets there the labels that it gets in the whole image. The block that owns it,
the one of its first pixel in raster order, returns them. All other objects wait for a second pass, where each has a
window of its own that grows until the object and its neighbours are complete. No object is cut, whatever its size, and
each is returned once.

The typical area is the median over all objects, so the objects are visited twice: by ``first_pass``, then by ``cells``.
The first labels of the blocks, which are most of the work, are made once and kept, by the caller's ``Keep``. Objects
with a window of their own get theirs twice: such windows may overlap without limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.enlarge import enlarge_part
from cellseg_deploy.cells.instances import (
    BorderCells,
    components,
    final_labels,
    first_labels,
    typical_area,
    whole_areas,
)
from cellseg_deploy.cells.label_runs import Ints, Labels, Runs, largest_pieces, raster_ranks, row_runs
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.models.spec import InstanceParams

Probabilities = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
ReadPlanes = Callable[[slice, slice], Probabilities]
"""Rows and columns to the probabilities there, float32 (K, rows, columns)."""

Keep = Callable[[Labels], Callable[[], Labels]]
"""Keeps labels (h, w) for later; calling the result returns them, once."""

REACH_PX = 3
"""An outline at the image's size depends on labels at most two pixels away; one more for safety."""
MARGIN_PX = 8
"""More than ``REACH_PX``. Rows of a window above its block, and below its overlap."""
BYTES_PER_PIXEL = 40
"""Memory for a pixel of a window at model scale, beside its probabilities: labels, components and temporaries."""


@dataclass(frozen=True)
class BlockSettings:
    """What labels depend on, as for ``instances.segment``, and the size of the blocks, on which they do not.

    ``hw``: size of the probabilities; ``out_hw``: of the labels. ``block_rows``: rows of a block; ``overlap_rows``:
    rows of its window below. ``most_px``: pixels of the largest window that fits into memory, None for no limit.
    """

    channels: tuple[str, ...]
    params: InstanceParams
    cell_diameter_px: float
    hw: tuple[int, int]
    out_hw: tuple[int, int]
    border_cells: BorderCells = "visible"
    classes: tuple[str, ...] = ()
    block_rows: int = 512
    overlap_rows: int = 128
    most_px: int | None = None

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.overlap_rows < 0:
            raise UsageError(
                f"blocks need at least 1 row and an overlap of 0 or more, got {self.block_rows} and {self.overlap_rows}"
            )

    @property
    def disc_px(self) -> float:
        """Area of the disc of the model's cell diameter, in px."""
        return math.pi / 4 * self.cell_diameter_px**2


@dataclass(frozen=True)
class Window:
    """A part of the image. ``top``, ``left``: where it lies. ``planes_khw``: its probabilities (K, h, w).

    ``component``: number of the object at each pixel, int32 (h, w), 0 outside; ``wanted``: bool by number, the objects
    whose cells are to be taken from this window.
    """

    top: int
    left: int
    planes_khw: Probabilities
    component: Labels
    wanted: Mask

    def of_wanted(self, labels: Labels) -> Mask:
        """Whether each number of ``labels`` (h, w) lies in a wanted object, bool (largest number + 1,)."""
        found = np.zeros(int(labels.max(initial=0)) + 1, np.bool_)
        found[labels] = self.wanted[self.component]  # every pixel of a label lies in the same object
        found[0] = False
        return found


@dataclass(frozen=True)
class Part:
    """What the second pass needs of a window. ``top``, ``left``: where it lies. ``planes_khw``: its probabilities.

    ``labels``: of ``first_labels``, int32 (h, w); ``kept``: whether each number is of a wanted object, (largest + 1,).
    """

    top: int
    left: int
    planes_khw: Probabilities
    labels: Labels
    kept: Mask


@dataclass(frozen=True)
class Block:
    """The window of a block, kept for the second pass: its ``rows`` and ``columns``, and ``labels`` and ``kept`` as in
    ``Part``."""

    rows: slice
    columns: slice
    labels: Callable[[], Labels]
    kept: Mask


@dataclass(frozen=True)
class FirstPass:
    """``areas_px``: areas in px of all labels of ``first_labels`` that do not touch the image border, int64 (n,), in
    any order. ``blocks``: all blocks. ``waiting``: first pixel (y, x) of each object that no block has complete."""

    areas_px: Ints
    blocks: tuple[Block, ...]
    waiting: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlockCells:
    """Cells of one window, in the coordinates of the label image.

    ``runs``: their runs in raster order, numbered 1..n by first pixel. ``first``: raster index of each cell's first
    pixel, int64 (n,). ``window``: where they come from.
    """

    runs: Runs
    first: Ints
    window: Part


def first_pass(
    read: ReadPlanes, settings: BlockSettings, keep: Keep, done: Callable[[], None] = lambda: None
) -> FirstPass:
    """Find the objects of the image and label them; ``done`` is called after each block.

    Raises ``DataError`` if an object does not fit into memory.
    """
    areas, found, waiting = [np.zeros(0, np.int64)], list[Block](), list[tuple[int, int]]()
    for window in _blocks(read, settings, waiting):
        part = _labelled(window, settings)
        areas.append(_areas(part))
        height, width = part.labels.shape
        place = slice(part.top, part.top + height), slice(part.left, part.left + width)
        found.append(Block(*place, keep(part.labels), part.kept))
        done()
    waiting.sort()
    areas += [_areas(_labelled(window, settings)) for window in _large(read, settings, waiting)]
    return FirstPass(np.concatenate(areas), tuple(found), tuple(waiting))


def cells(
    read: ReadPlanes, settings: BlockSettings, first: FirstPass, done: Callable[[], None] = lambda: None
) -> Iterator[BlockCells]:
    """Yield the cells of the image window by window, each once; ``done`` is called after each block."""
    typical_px = typical_area(first.areas_px, settings.disc_px)
    for block in first.blocks:
        planes_khw, top_left = read(block.rows, block.columns), (block.rows.start, block.columns.start)
        yield from _numbered(Part(*top_left, planes_khw, block.labels(), block.kept), settings, typical_px)
        del planes_khw
        done()
    for window in _large(read, settings, first.waiting):
        yield from _numbered(_labelled(window, settings), settings, typical_px)


def _labelled(window: Window, settings: BlockSettings) -> Part:
    labels = first_labels(
        window.planes_khw, settings.channels, settings.params, disc_px=settings.disc_px, classes=settings.classes
    )
    return Part(window.top, window.left, window.planes_khw, labels, window.of_wanted(labels))


def _areas(part: Part) -> Ints:
    """Areas of the wanted labels that do not touch a side of the window, int64 (n,). A wanted label that does so lies
    at the side of the image."""
    numbers = np.where(part.kept, np.arange(len(part.kept), dtype=np.int32), np.int32(0))
    return whole_areas(numbers[part.labels]).astype(np.int64)


def _numbered(part: Part, settings: BlockSettings, typical_px: float) -> Iterator[BlockCells]:
    """Yield the wanted cells of ``part``, if there are any."""
    found = _cells_of(part, settings, typical_px)
    if len(found):
        rank = raster_ranks(found.label)
        first = np.full(int(rank.max()) + 1, np.iinfo(np.int64).max)
        number = rank[found.label].astype(np.int64)
        np.minimum.at(first, number, found.row * settings.out_hw[1] + found.start)
        yield BlockCells(replace(found, label=number), first[1:], part)


def _cells_of(window: Part, settings: BlockSettings, typical_px: float) -> Runs:
    """Runs of the wanted cells of ``window``, with any numbers."""
    labels = final_labels(
        window.labels,
        window.planes_khw,
        settings.params,
        disc_px=settings.disc_px,
        typical_px=typical_px,
        border_cells=settings.border_cells,
        classes=settings.classes,
    )
    if settings.out_hw != settings.hw:
        foreground = np.ascontiguousarray(window.planes_khw[settings.channels.index("foreground")])
        runs = enlarge_part(
            labels,
            foreground,
            settings.params.foreground_threshold,
            settings.hw,
            settings.out_hw,
            (window.top, window.left),
        )
    else:
        runs = row_runs(labels)
        across = window.left
        runs = Runs(runs.label, runs.row + window.top, runs.start + across, runs.stop + across, settings.out_hw)
    is_kept = window.kept[runs.label]  # from before holes were filled, which may hold dropped objects; numbers stay
    runs = Runs(runs.label[is_kept], runs.row[is_kept], runs.start[is_kept], runs.stop[is_kept], settings.out_hw)
    return largest_pieces(runs) if settings.out_hw != settings.hw else runs


# ------------------------------------------------------------------------------------------------------------- windows


def _blocks(read: ReadPlanes, settings: BlockSettings, waiting: list[tuple[int, int]]) -> Iterator[Window]:
    """Yield the window of each block. The objects that it owns, and has complete and with complete neighbours, are
    wanted; the first pixel (y, x) there of every other object that it owns is added to ``waiting``."""
    height, width = settings.hw
    for top in range(0, height, settings.block_rows):
        bottom = min(top + settings.block_rows, height)
        rows = slice(max(0, top - MARGIN_PX), min(height, bottom + settings.overlap_rows + MARGIN_PX))
        planes_khw = read(rows, slice(0, width))
        inside = _foreground(planes_khw, settings)
        around = _around(inside)
        window, boxes = _window(
            np.ascontiguousarray(planes_khw[(slice(None), *around)]),
            inside[around],
            (rows.start + around[0].start, around[1].start),
        )
        del planes_khw, inside
        first_row = boxes[:, 1] + window.top
        owned = (first_row >= top) & (first_row < bottom)
        owned[0] = False
        # A neighbour of an object close to the side may lie outside.
        unclear, cut = (_cut(boxes, window, settings.hw, within) for within in (REACH_PX, 0))
        ready = owned & ~unclear & ~_near(window.component, cut)
        for number in np.flatnonzero(owned & ~ready):
            row = int(boxes[number, 1])
            waiting.append((row + window.top, int(np.argmax(window.component[row] == number)) + window.left))
        yield replace(window, wanted=ready)


def _large(read: ReadPlanes, settings: BlockSettings, waiting: Sequence[tuple[int, int]]) -> Iterator[Window]:
    """Yield a window for each object whose first pixel (y, x) is in ``waiting``, in raster order. Other pixels there
    belong to the same objects: parts that looked like objects of their own in their block.

    Raises ``DataError`` if an object does not fit into memory."""
    at = np.array(waiting, np.int64).reshape(-1, 2)
    seen = np.zeros(len(at), np.bool_)
    for index, (y, x) in enumerate(waiting):
        if seen[index]:
            continue
        window, boxes, number = _complete(read, settings, y, x)
        inside = at - (window.top, window.left)
        (close,) = np.nonzero(((inside >= 0) & (inside < window.component.shape)).all(axis=1))
        seen[close] |= window.component[inside[close, 0], inside[close, 1]] == number
        row = int(boxes[number, 1])
        first = (row + window.top, int(np.argmax(window.component[row] == number)) + window.left)
        if first == (y, x):  # else the block of its first pixel has returned it
            wanted = np.zeros(len(boxes), np.bool_)
            wanted[number] = True
            yield replace(window, wanted=wanted)


def _complete(read: ReadPlanes, settings: BlockSettings, y: int, x: int) -> tuple[Window, npt.NDArray[np.int32], int]:
    """Return a window in which the object at (y, x) and all its neighbours are complete, its boxes, and the object's
    number."""
    import cv2

    side = MARGIN_PX + settings.overlap_rows
    sides = [y - side, x - side, y + side, x + side]  # top, left, bottom, right
    while True:
        top, left = max(0, sides[0]), max(0, sides[1])
        bottom, right = min(settings.hw[0], sides[2]), min(settings.hw[1], sides[3])
        n_px = (bottom - top) * (right - left)
        if settings.most_px is not None and n_px > settings.most_px:
            raise DataError(
                f"cells that touch each other form one area of {bottom - top} x {right - left} px or more at the "
                f"model's scale, and cells are never cut; windows may have {settings.most_px} px now. "
                f"Run again with {math.ceil(n_px / settings.most_px)} times the memory or more; the network's results "
                "are kept"
            )
        planes_khw = read(slice(top, bottom), slice(left, right))
        window, boxes = _window(planes_khw, _foreground(planes_khw, settings), (top, left))
        number = int(window.component[y - top, x - left])
        mask = (window.component == number).astype(np.uint8)
        near = np.asarray(cv2.dilate(mask, np.ones((2 * REACH_PX + 1,) * 2, np.uint8))) > 0
        asked = np.zeros(len(boxes), np.bool_)
        asked[window.component[near]] = True
        asked[0] = False
        box = boxes.astype(np.int64)
        box[number] += (-REACH_PX, -REACH_PX, 2 * REACH_PX, 2 * REACH_PX)  # its neighbours may lie outside
        box = box[asked]
        more = max(64, (bottom - top) // 2, (right - left) // 2)
        grown = False
        for side_number, (at_end, is_whole) in enumerate(
            (
                ((box[:, 1] <= 0).any(), top == 0),
                ((box[:, 0] <= 0).any(), left == 0),
                ((box[:, 1] + box[:, 3] >= bottom - top).any(), bottom == settings.hw[0]),
                ((box[:, 0] + box[:, 2] >= right - left).any(), right == settings.hw[1]),
            )
        ):
            if at_end and not is_whole:
                sides[side_number] += -more if side_number < 2 else more
                grown = True
        if not grown:
            return window, boxes, number


def _foreground(planes_khw: Probabilities, settings: BlockSettings) -> Mask:
    return np.asarray(planes_khw[settings.channels.index("foreground")] >= settings.params.foreground_threshold)


def _around(inside: Mask) -> tuple[slice, slice]:
    """Rows and columns of a window that hold its foreground, ``inside`` (h, w), and ``MARGIN_PX`` more on each side,
    so that only an object that ends at a side of the window ends at one here. One pixel without foreground."""
    found = [np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0)]
    if not len(found[0]):
        return slice(0, 1), slice(0, 1)
    rows, columns = (
        slice(max(0, int(at[0]) - MARGIN_PX), min(n, int(at[-1]) + 1 + MARGIN_PX))
        for at, n in zip(found, inside.shape, strict=True)
    )
    return rows, columns


def _window(planes_khw: Probabilities, inside: Mask, top_left: tuple[int, int]) -> tuple[Window, npt.NDArray[np.int32]]:
    """Return a window without wanted objects; also left, top, width, height of each object in it, (n + 1, 4).
    ``inside``: its foreground."""
    component, boxes = components(inside)
    return Window(*top_left, planes_khw, component, np.zeros(len(boxes), np.bool_)), boxes


def _cut(boxes: npt.NDArray[np.int32], window: Window, hw: tuple[int, int], within: int) -> Mask:
    """Whether each object is at most ``within`` px from a side of ``window`` that is not a side of the image.

    With 0 px it may continue beyond that side. ``window`` has the full width, but for columns without foreground.
    """
    height = window.component.shape[0]
    cut = np.zeros(len(boxes), np.bool_)
    if window.top > 0:
        cut |= boxes[:, 1] <= within
    if window.top + height < hw[0]:
        cut |= boxes[:, 1] + boxes[:, 3] >= height - within
    cut[0] = False
    return cut


def _near(component: Labels, cut: Mask) -> Mask:
    """Whether each object of ``component`` (h, w) lies within ``REACH_PX`` of an object in ``cut``."""
    import cv2

    near = np.zeros(len(cut), np.bool_)
    if cut.any():
        mask = cut[component].astype(np.uint8)
        reached = np.asarray(cv2.dilate(mask, np.ones((2 * REACH_PX + 1,) * 2, np.uint8))) > 0
        near[component[reached]] = True
    near[0] = False
    return near
