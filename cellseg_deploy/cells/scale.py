"""At which scale an image should go through the network: from settings, or from the cells found in a first pass.

A network finds cells best at the size of those it was trained on. Outlines found at a wrong scale are still nearly as
large as the cells (measured: the median diameter stays within 2 % from half to twice the scale), so one pass at the
model's own scale tells how large the cells are, and a second one at the right scale finds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.instances import whole_areas
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.errors import UsageError

MAX_SCALE = 32.0
MIN_CELLS = 10
"""With fewer whole cells in an image their median says little of it."""
TOLERANCE = 1.15
"""Cells that many times larger or smaller than the model's need no second pass: people and smears differ as much."""

MIN_SEEN = 0.01
"""Less of an image that the network takes for cells is dirt as likely."""

REMARKABLE = 1.3
"""Cells that many times larger or smaller than the model's are counted noticeably worse without a second pass."""

CellDiameter = float | Literal["auto"] | None


@dataclass(frozen=True)
class ScaleChoice:
    """``scale``: model px per image px. ``note``: what the user should know of it, empty if nothing."""

    scale: float
    note: str = ""


def fixed_scale(
    image_scale: float, model_diameter_px: float, *, scale: float | None, cell_diameter_px: CellDiameter
) -> float:
    """Model px per image px from what the user gave, else (and to begin with for ``auto``) the model's own.

    ``image_scale``, ``model_diameter_px``: of the ModelSpec. Raises ``UsageError`` for settings that cannot be meant.
    """
    if scale is not None and cell_diameter_px is not None:
        raise UsageError("scale and cell diameter exclude each other: the scale follows from the diameter; give one")
    if cell_diameter_px == "auto":
        return image_scale
    if isinstance(cell_diameter_px, str):
        raise UsageError(f"cell diameter must be a number of pixels or 'auto', got {cell_diameter_px!r}")
    if cell_diameter_px is not None:
        if not (math.isfinite(cell_diameter_px) and cell_diameter_px > 0):
            raise UsageError(f"cell diameter must be a positive number of pixels, got {cell_diameter_px}")
        result = model_diameter_px / cell_diameter_px
    else:
        result = image_scale if scale is None else scale
    if not (math.isfinite(result) and 1 / MAX_SCALE <= result <= MAX_SCALE):
        raise UsageError(
            f"scale must lie between 1/{MAX_SCALE:g} and {MAX_SCALE:g} model px per image px, got {result:g}"
        )
    return result


def scale_from_cells(labels: Labels, model_diameter_px: float, first_scale: float) -> ScaleChoice:
    """The scale at which the cells of ``labels`` (h, w), found at ``first_scale``, are as large as the model's.

    ``first_scale`` itself where the cells are nearly as large, and, with a note, where there are too few to tell.
    """
    whole = whole_areas(labels)
    if len(whole) < MIN_CELLS:
        note = (
            f"only {len(whole)} whole cells to estimate their size from, {MIN_CELLS} are needed; the model's own scale "
            "was kept, give --cell-diameter if the magnification is another"
        )
        return ScaleChoice(first_scale, Note(note, "cell size"))
    diameter = math.sqrt(4 / math.pi * float(np.median(whole)))
    scale = min(max(model_diameter_px / diameter, 1 / MAX_SCALE), MAX_SCALE)
    if max(scale / first_scale, first_scale / scale) <= TOLERANCE:
        return ScaleChoice(first_scale)
    return ScaleChoice(scale)


def lost_note(foreground: npt.NDArray[np.float32], labels: Labels, threshold: float) -> str:
    """What to say where most of what the network takes for cells became none: 0 cells look like an empty field.

    ``foreground`` (h', w'): its probability; cells are from ``threshold`` on. ``labels`` (h, w). Empty if nothing.
    """
    seen = float(np.count_nonzero(foreground >= threshold) / foreground.size)
    kept = float(np.count_nonzero(labels) / labels.size)
    if seen < MIN_SEEN or kept > seen / 2:
        return ""
    return Note(
        f"the network takes {seen:.0%} of the image for cells, but the cells found cover {kept:.0%}: the rest is too "
        "small or cut by the image border; look at the overlay, and give --cell-diameter for another magnification",
        "lost cells",
    )


def size_note(labels: Labels, model_diameter_px: float, scale: float) -> str:
    """What to say of ``labels`` (h, w), found at the model's own ``scale``; empty if nothing."""
    fitting = scale_from_cells(labels, model_diameter_px, scale).scale
    if max(fitting / scale, scale / fitting) < REMARKABLE:
        return ""
    found, expected = model_diameter_px / fitting, model_diameter_px / scale
    return Note(
        f"cells are about {found:.0f} px wide, the model expects {expected:.0f}; --cell-diameter auto counts them at "
        "their own size",
        "cell size",
    )
