"""Scale at which images go through the network: from settings, or from a search over scales.

A network works best on cells of the size it was trained on, and is most certain there: of the pixels that may be
foreground (p > 0.3) the largest share is certain (p > 0.9). The search runs the network on crops of a sample of the
images, at scales for cells of all sizes. Among scales at which the median whole cell is about as large as the model's,
it takes the most certain one, corrected by the remaining ratio of that median to the model's cell.

Far from the right scale the network finds fragments and piles, which in a field of three or four whole cells outnumber
them. Unlike cells, they are not of one size at adjacent scales, so a scale is considered only if a neighbour agrees, or
if there are many cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.instances import whole_areas
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import UsageError, check_types, plural

MAX_SCALE = 32.0
MIN_CELLS = 10
"""With fewer whole cells in an image, their median is unreliable."""
TOLERANCE = 1.15
"""Cells up to this factor larger or smaller than the model's need no second pass: people and smears vary as much."""

SEARCH_DIAMETERS_PX = (12, 24, 48, 96, 192)
"""Cell diameters in image px that the search tries, for cells of 10 to 250 px. Steps of 1.41 with three crops gave the
same diameters within 5 % on ten sets (one differed by 8 %), in 2.5 times the time."""
WITNESS_DIAMETER_PX = 384
"""One step beyond the largest, at which the same crops are only looked at: cells of 200 px need a neighbour that agrees
too. Without it, granules of 18 px in a field of six such cells were the only pieces on which two scales agreed."""
FITTING = (0.55, 1.8)
"""A scale is considered if its median cell is between these multiples of the model's: wider than the search's step, so
that cells of any size fit one or two scales, and narrow enough to exclude nuclei (too small) and piles (too large)."""
POSSIBLE, SURE = 0.3, 0.9
MIN_MEASURED = 3
"""Whole cells required at a scale, and at the neighbour that agrees with it. Red cells of one smear vary by some 15 %
in diameter, so the median of three is right within about 10 %, far less than the search's step; a small field may have
no more."""
AGREEING = 1.25
"""Largest ratio of the cell diameters, in image px, of two adjacent scales that agree. In single fields of five
laboratories 80 of 82 pairs of scales near the right one agreed, and 1 of 20 other pairs."""
MANY_CELLS = 20
"""With so many whole cells a scale needs no neighbour that agrees: at the search's ends there is none. In single
fields, scales that no neighbour confirmed showed 11 wrong cells at most."""
SEARCH_CROPS = 2
"""Crops of a tile's size that the network sees at each scale."""
SAMPLE_IMAGES = 6
"""Images sampled from a folder: those after the first ``SEARCH_CROPS`` only refine the diameter."""
ENOUGH_CELLS = 300

MIN_SEEN = 0.01
"""A smaller foreground share of an image may just as well be dirt."""

REMARKABLE = 1.3
"""Cells at least this factor larger or smaller than the model's are counted noticeably worse without a second pass."""

Look = Callable[[npt.NDArray[np.uint8], float], tuple[npt.NDArray[np.float32], Labels]]
CellDiameter = float | Literal["auto"] | None


@dataclass(frozen=True)
class ScaleChoice:
    """``scale``: model px per image px. ``note``: note for the user on the scale, or empty. ``images``: number of
    images measured."""

    scale: float
    note: str = ""
    images: int = 0

    def summary(self, group: str, model_diameter_px: float) -> str:
        """Describe the scale measured for a ``group`` of images in one line."""
        images = f"{self.images} image{'' if self.images == 1 else 's'} measured"
        if self.note:
            return f"{group}: {self.note} ({images})"
        return f"{group}: cells are {model_diameter_px / self.scale:.0f} px wide ({images}): scale {self.scale:.2f}"


@dataclass(frozen=True)
class View:
    """The network's results for some crops at ``scale``.

    ``areas_px``: areas of whole cells, in model px (n,). ``sure``, ``possible``: numbers of foreground pixels.
    """

    scale: float
    areas_px: npt.NDArray[np.intp]
    sure: int
    possible: int

    def with_crop(self, foreground: npt.NDArray[np.float32], labels: Labels) -> View:
        """Return this view plus one more crop: its foreground probability (h, w) and its cells (h, w)."""
        return View(
            self.scale,
            np.concatenate([self.areas_px, whole_areas(labels)]),
            self.sure + int(np.count_nonzero(foreground > SURE)),
            self.possible + int(np.count_nonzero(foreground > POSSIBLE)),
        )

    def agrees(self, other: View) -> bool:
        """Whether both have enough whole cells, of about the same diameter in image px."""
        if min(len(self.areas_px), len(other.areas_px)) < MIN_MEASURED:
            return False
        ratio = self.median_px / self.scale / (other.median_px / other.scale)
        return max(ratio, 1 / ratio) <= AGREEING

    @property
    def median_px(self) -> float:
        """Median diameter of the whole cells in model px (disc of equal area); 0 without whole cells."""
        return math.sqrt(4 / math.pi * float(np.median(self.areas_px))) if len(self.areas_px) else 0.0


def empty_view(scale: float) -> View:
    """View without crops."""
    return View(scale, np.zeros(0, np.intp), 0, 0)


def surest(views: Sequence[View], model_diameter_px: float) -> View | None:
    """Return the view whose scale fits the cells best; None if no scale has enough cells of about the model's size.

    ``views``: in the order of their scales.
    """
    low, high = (times * model_diameter_px for times in FITTING)
    fitting = []
    for number, view in enumerate(views):
        neighbours = [*views[max(0, number - 1) : number], *views[number + 1 : number + 2]]
        is_sound = len(view.areas_px) >= MANY_CELLS or any(map(view.agrees, neighbours))
        if is_sound and low <= view.median_px <= high:
            fitting.append(view)
    return max(fitting, key=lambda view: view.sure / max(1, view.possible), default=None)


def crop_of(image_hw: tuple[int, int], side_px: int, index: int) -> tuple[slice, slice]:
    """Rows and columns of a square of ``side_px``, or less if the image is smaller: in the image's middle for ``index``
    0, elsewhere for other indices, always at the same places."""
    rows, columns = (
        slice(start, start + min(side_px, length))
        for length, step in zip(image_hw, (0.618034, 0.414214), strict=True)
        for start in (round(max(0, length - side_px) * ((0.5 + index * step) % 1)),)
    )
    return rows, columns


def search(
    parts: Sequence[npt.NDArray[np.uint8]],
    look: Look,
    *,
    tile_size: int,
    model_diameter_px: float,
    image_scale: float,
) -> ScaleChoice:
    """Search for the scale at which the cells of ``parts``, images or crops (h, w, 3), are as large as the model's.

    ``look(crop, scale)``: foreground probability of ``crop`` and the cells found there, both (h', w') at ``scale``.
    ``tile_size``, ``model_diameter_px``, ``image_scale``: from the ModelSpec. ``image_scale`` is kept if cells are
    nearly as large (``TOLERANCE``), and, with a note, if there are too few cells to tell.
    """

    def with_part(view: View, index: int, seen: set[tuple[int, str]]) -> View:
        """Add crop ``index`` to ``view``, unless already ``seen``; the parts take turns."""
        part = parts[turn := index % len(parts)]
        crop = crop_of((part.shape[0], part.shape[1]), int(tile_size / view.scale), index)
        if (name := (turn, str(crop))) in seen:
            return view
        seen.add(name)
        return view.with_crop(*look(part[crop], view.scale))

    views = []
    for diameter in (*SEARCH_DIAMETERS_PX, WITNESS_DIAMETER_PX):
        view, seen = empty_view(model_diameter_px / diameter), set[tuple[int, str]]()
        for index in range(SEARCH_CROPS if parts else 0):
            view = with_part(view, index, seen)
        views.append(view)
    best = surest(views, model_diameter_px)
    if best is None:
        return ScaleChoice(image_scale, too_few_note(model_diameter_px, image_scale), len(parts))
    for index in range(SEARCH_CROPS, len(parts)):
        if len(best.areas_px) < ENOUGH_CELLS:
            best = with_part(best, index, set())
    found = best.scale * model_diameter_px / best.median_px
    is_near = max(found / image_scale, image_scale / found) <= TOLERANCE
    return ScaleChoice(image_scale if is_near else found, images=len(parts))


def too_few_note(model_diameter_px: float, image_scale: float) -> Note:
    """Note for the user when the search found no scale."""
    return Note(
        f"fewer than {MIN_MEASURED} whole cells of one size to estimate it from; the model's own scale was kept "
        f"(cells of {model_diameter_px / image_scale:.0f} px); give `cell_diameter_px` if the magnification differs",
        "cell size",
    )


def fixed_scale(
    image_scale: float, model_diameter_px: float, *, scale: float | None, cell_diameter_px: CellDiameter
) -> float:
    """Model px per image px from the user's settings, else (and as the initial value for ``auto``) the model's own.

    ``image_scale``, ``model_diameter_px``: from the ModelSpec. Raises ``UsageError`` for invalid settings.
    """
    if scale is not None and cell_diameter_px is not None:
        raise UsageError("scale and cell diameter exclude each other: the scale follows from the diameter; give one")
    if cell_diameter_px == "auto":
        return image_scale
    if isinstance(cell_diameter_px, str):
        raise UsageError(f"cell diameter must be a number of pixels or 'auto', got {cell_diameter_px!r}")
    if cell_diameter_px is not None:
        check_types("a number or None", cell_diameter_px=cell_diameter_px)
        if not (math.isfinite(cell_diameter_px) and cell_diameter_px > 0):
            raise UsageError(f"cell diameter must be a positive number of pixels, got {cell_diameter_px}")
        result = model_diameter_px / cell_diameter_px
    else:
        result = image_scale if scale is None else scale
    return check_scale(result)


def check_scale(scale: float) -> float:
    """Return ``scale``. Raises ``UsageError`` if it is not a number in range."""
    check_types("a number", scale=scale)
    if not (math.isfinite(scale) and 1 / MAX_SCALE <= scale <= MAX_SCALE):
        raise UsageError(
            f"scale must lie between 1/{MAX_SCALE:g} and {MAX_SCALE:g} model px per image px, got {scale:g}"
        )
    return scale


def scale_from_cells(labels: Labels, model_diameter_px: float, first_scale: float) -> ScaleChoice:
    """Return the scale at which the cells of ``labels`` (h, w), found at ``first_scale``, are as large as the model's.

    Keeps ``first_scale`` if the cells are nearly as large, and, with a note, if there are too few cells to tell.
    """
    return scale_from_areas(whole_areas(labels), model_diameter_px, first_scale)


def scale_from_areas(whole: npt.NDArray[np.integer[Any]], model_diameter_px: float, first_scale: float) -> ScaleChoice:
    """``scale_from_cells`` of the areas in px of whole cells, (n,)."""
    if len(whole) < MIN_CELLS:
        note = (
            f"only {plural(len(whole), 'whole cell')} to estimate their size from, {MIN_CELLS} are needed; the model's "
            "own scale was kept; give `cell_diameter_px` if the magnification differs"
        )
        return ScaleChoice(first_scale, Note(note, "cell size"))
    diameter = math.sqrt(4 / math.pi * float(np.median(whole)))
    scale = min(max(model_diameter_px / diameter, 1 / MAX_SCALE), MAX_SCALE)
    if max(scale / first_scale, first_scale / scale) <= TOLERANCE:
        return ScaleChoice(first_scale)
    return ScaleChoice(scale)


def lost_share_note(seen: float, kept: float) -> str:
    """Return a note if most of the foreground did not become cells, else "": 0 cells look like an empty field.

    ``seen``, ``kept``: shares of the image, or of its field of view, that are foreground and that are labelled.
    """
    if seen < MIN_SEEN or kept > seen / 2:
        return ""
    return Note(
        f"{seen:.0%} of the image was classified as cell, but the cells reported cover only {kept:.0%}: the rest was "
        "too small or cut by the image border; check the overlay, and give `cell_diameter_px` if the magnification "
        "differs",
        "lost cells",
    )


def size_note(labels: Labels, model_diameter_px: float, scale: float) -> str:
    """Return a note on the cell size in ``labels`` (h, w), found at the model's own ``scale``, or ""."""
    return size_of_areas_note(whole_areas(labels), model_diameter_px, scale)


def size_of_areas_note(whole: npt.NDArray[np.integer[Any]], model_diameter_px: float, scale: float) -> str:
    """``size_note`` of the areas in px of whole cells, (n,)."""
    fitting = scale_from_areas(whole, model_diameter_px, scale).scale
    if max(fitting / scale, scale / fitting) < REMARKABLE:
        return ""
    found, expected = model_diameter_px / fitting, model_diameter_px / scale
    return Note(
        f"cells are about {found:.0f} px wide, the model expects {expected:.0f}; `cell_diameter_px='auto'` counts them "
        "at their own size",
        "cell size",
    )
