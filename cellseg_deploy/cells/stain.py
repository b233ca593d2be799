"""Colour of a smear: light and colour of the background, and how much light the stain of the cells absorbs.

Lightness L* and the colour axes a* (green to red) and b* (blue to yellow) are CIE 1976 L*a*b* of the file's sRGB under
D65. Optical density is ``-log10((value + 1) / 256)`` of a channel, the 1 for black pixels (as Ruifrok and Johnston,
Anal. Quant. Cytol. Histol. 23 (2001) 291-299, with the largest value as the incident light). It is additive where dyes
overlap, and more light lowers it by the same amount in background and cells. So the cells' density minus that of the
background is the strength and colour of the stain, whatever the light was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.notes import Note

# Figures with their names for people and the smallest difference that matters: five units of L*a*b* are visible in two
# pictures side by side; 0.05 of optical density is 12 % of the light.
LIGHT = {
    "field_lightness": ("lightness of the background", 5.0),
    "field_a": ("green to red of the background", 5.0),
    "field_b": ("blue to yellow of the background", 5.0),
    "field_od_spread": ("unevenness of the background", 0.05),
}
STAIN = {
    "stain_red": ("stain in red light", 0.05),
    "stain_green": ("stain in green light", 0.05),
    "stain_blue": ("stain in blue light", 0.05),
    "cell_od_spread": ("unevenness of the cells", 0.05),
}
FIELD, CELL = tuple(LIGHT), tuple(STAIN)
QUICK_PIXELS = (
    50_000  # for every image of a run, in a few milliseconds; medians move by less than a tenth of a tolerance
)
_PIXELS = 200_000  # sampled per image, in a regular grid: medians need no more
_FEW_PIXELS = 20_000  # for a yes or no
_DARK = 30.0  # L* of a background; the darkest of 279 fields of five laboratories has 42
_BLACK = 15.0  # median L* of an image that is darker than any stain makes it
_TAIL, _TAIL_RATIO = 20.0, 3.0  # of L* above the median and below it; the ratio is at most 1.1 in 118 smears
_BRIGHTER = 10.0  # L* of cells above their background: stain absorbs light, fluorescence and dark field add it


def colours(
    image_hwc: npt.NDArray[np.uint8],
    inside_hw: npt.NDArray[np.bool_],
    *,
    seen_hw: npt.NDArray[np.bool_] | None = None,
    pixels: int = _PIXELS,
) -> dict[str, float]:
    """Colour figures of one image, uint8 RGB (h, w, 3), with cells ``inside_hw``; undefined figures are omitted.

    ``seen_hw``: the field of view, None for the whole image. ``pixels``: about how many are looked at.

    ``FIELD``: median L*, a* and b* of the background and the spread of its mean optical density, half the range between
    the 16th and 84th percentile (the standard deviation of a normal distribution). ``CELL``: median optical density of
    the cells in red, green and blue minus that of the background, and the same spread for the cells.
    """
    import cv2

    step = max(1, math.isqrt(inside_hw.size // pixels))
    sample = np.ascontiguousarray(image_hwc[::step, ::step])
    cell = inside_hw[::step, ::step]
    field = ~cell if seen_hw is None else ~cell & seen_hw[::step, ::step]
    lab: npt.NDArray[np.float32] = cv2.cvtColor(sample.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    density = optical_density(sample)
    found: list[tuple[str, float]] = []
    if field.any():
        found += zip(FIELD, (*_median(lab[field]), _spread(density[field])), strict=True)
    if cell.any():
        found.append((CELL[-1], _spread(density[cell])))
    if field.any() and cell.any():
        found += zip(CELL[:3], _median(density[cell]) - _median(density[field]), strict=True)
    return {name: float(value) for name, value in found}


def negative_note(image_hwc: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> str:
    """Return a note if an image, uint8 RGB (h, w, 3), looks like the negative of a smear in bright field (dark field,
    fluorescence, an inverted image), else "". ``labels`` (h, w): its cells, integers or bool, 0 for none."""
    step = negative_step(labels.size)
    return negative_note_of_sample(image_hwc[::step, ::step], labels[::step, ::step] > 0)


def negative_step(n_px: int) -> int:
    """Every how many rows and columns ``negative_note`` looks at, for an image of ``n_px`` pixels."""
    return max(1, math.isqrt(n_px // _FEW_PIXELS))


def negative_note_of_sample(image_hwc: npt.NDArray[np.uint8], cell: npt.NDArray[np.bool_]) -> str:
    """``negative_note`` of the rows and columns that it looks at."""
    lightness = _lightness(image_hwc)
    background = float(np.median(lightness if cell.all() else lightness[~cell]))
    cells = float(np.median(lightness[cell])) if cell.any() else background
    whole = float(np.median(lightness))
    if whole < _BLACK:  # this is background, even if parts of it were labelled as cells
        background, cells = min(background, whole), max(cells, whole)
    low, high = (float(value) for value in np.quantile(lightness, (0.01, 0.99)))
    if cell.mean() < 0.5 and high - whole > max(_TAIL, _TAIL_RATIO * (whole - low)):  # most of it is background
        background, cells = min(background, whole), max(cells, high)
    if background >= _DARK and cells <= background + _BRIGHTER:
        return ""
    seen = "cells are brighter than the background" if cells > background + _BRIGHTER else "the background is dark"
    return Note(
        f"{seen} (L* {background:.0f} of 100): dark field, fluorescence or a negative? The model was trained on "
        "stained cells on a bright field; what it found here may be background; check the overlay",
        "negative",
    )


def optical_density(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """``-log10((value + 1) / 256)`` of every sample, from 0 (white) to 2.41 (black), float32 of the same shape."""
    table = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)
    density: npt.NDArray[np.float32] = table[values]
    return density


def _lightness(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """CIE L* (h, w), 0 to 100, of sRGB pixels (IEC 61966-2-1; CIE 15:2004). Not by OpenCV, whose first conversion to
    L*a*b* builds tables for 0.2 s."""
    values = np.arange(256, dtype=np.float32) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)
    light: npt.NDArray[np.float32] = linear[image_hwc] @ np.array([0.212671, 0.715160, 0.072169], np.float32)
    return np.where(light > (6 / 29) ** 3, 116 * np.cbrt(light) - 16, (29 / 3) ** 3 * light).astype(np.float32)


def _median(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(np.median(pixels, axis=0))


def _spread(density: npt.NDArray[np.float32]) -> float:
    low, high = np.quantile(density.mean(axis=1), (0.16, 0.84))
    return float(high - low) / 2
