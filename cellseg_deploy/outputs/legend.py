"""The legend of class colours in a corner of an overlay, or below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.outputs.palette import class_rgb

_PLATE_RGB = (16, 16, 16)
_TEXT_RGB = (255, 255, 255)
_FONT_PX = 16  # for a 1200 px picture; smaller ones use it too, to stay legible
_MOST_OF_HEIGHT = 1 / 8


def with_legend(
    picture: npt.NDArray[np.uint8], classes: CellClasses, by_class: Mapping[str, int]
) -> npt.NDArray[np.uint8]:
    """Return ``picture`` (h, w, 3) with colour, name and number of each class.

    They stand one below the other on a dark plate at the lower left, or, where it would hide more than an eighth of the
    height, side by side in a strip below the picture. ``by_class``: number of cells per class.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1.0, min(picture.shape[:2]) / 1200)
    font = ImageFont.load_default(size=_FONT_PX * scale)
    lines = [line_of(name, by_class.get(name, 0), classes.counting) for name in classes.names]
    step, margin, swatch = round(1.4 * _FONT_PX * scale), round(0.5 * _FONT_PX * scale), round(1.5 * _FONT_PX * scale)
    widths = [3 * margin + swatch + round(font.getlength(line)) for line in lines]
    plate_w = max(widths)
    is_below = 2 * margin + step * len(lines) > _MOST_OF_HEIGHT * picture.shape[0]
    if is_below:
        plate_w = max(plate_w, picture.shape[1])
    places = _in_rows(widths, plate_w if is_below else 0)
    plate_h = 2 * margin + step * (1 + places[-1][1])
    missing_hw = (plate_h if is_below else 0, max(0, plate_w - picture.shape[1]))
    if any(missing_hw):
        picture = np.pad(picture, (*((0, side) for side in missing_hw), (0, 0)), constant_values=_PLATE_RGB[0])
    picture = np.ascontiguousarray(picture)
    plate = picture[-plate_h:, :plate_w]
    drawn = Image.fromarray(plate // 4 + np.array(_PLATE_RGB, np.uint8))
    brush = ImageDraw.Draw(drawn)
    for index, (line, (left, row)) in enumerate(zip(lines, places, strict=True)):
        middle = margin + step * row + step // 2
        half = max(1, round(0.15 * _FONT_PX * scale))
        brush.rectangle((left + margin, middle - half, left + margin + swatch, middle + half), fill=class_rgb(index))
        brush.text((left + 2 * margin + swatch, middle), line, _TEXT_RGB, font=font, anchor="lm")
    plate[:] = np.asarray(drawn)
    return picture


def _in_rows(widths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Left end and row of each entry, in px, where a row holds ``room`` px and one entry at least."""
    places, left, row = list[tuple[int, int]](), 0, 0
    for width in widths:
        if left and left + width > room:
            left, row = 0, row + 1
        places.append((left, row))
        left += width
    return places


def line_of(name: str, number: int, counting: tuple[str, ...]) -> str:
    """Describe a class, as ``red 95`` or ``platelet 19, not counted``."""
    return f"{name} {number}" + ("" if name in counting else ", not counted")
