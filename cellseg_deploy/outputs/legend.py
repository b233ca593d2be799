"""The legend of class colours in a corner of an overlay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.outputs.palette import class_rgb

_PLATE_RGB = (16, 16, 16)
_TEXT_RGB = (255, 255, 255)
_FONT_PX = 16  # for a 1200 px picture; smaller ones use it too, to stay legible


def with_legend(
    picture: npt.NDArray[np.uint8], classes: CellClasses, by_class: Mapping[str, int]
) -> npt.NDArray[np.uint8]:
    """Draw on ``picture`` (h, w, 3), lower left, a dark plate with one line of colour, name and number per class.

    ``by_class``: number of cells per class. A picture too small for the plate gets a margin, below or to the right.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1.0, min(picture.shape[:2]) / 1200)
    font = ImageFont.load_default(size=_FONT_PX * scale)
    lines = [line_of(name, by_class.get(name, 0), classes.counting) for name in classes.names]
    step, margin, swatch = round(1.4 * _FONT_PX * scale), round(0.5 * _FONT_PX * scale), round(1.5 * _FONT_PX * scale)
    plate_w = 3 * margin + swatch + max(round(font.getlength(line)) for line in lines)
    plate_h = 2 * margin + step * len(lines)
    missing_h, missing_w = max(0, 2 * plate_h - picture.shape[0]), max(0, plate_w - picture.shape[1])
    if missing_h:  # a strip of an image: the plate is below the pixels and the count
        missing_h = plate_h
    if missing_h or missing_w:
        picture = np.pad(picture, ((0, missing_h), (0, missing_w), (0, 0)), constant_values=_PLATE_RGB[0])
    picture = np.ascontiguousarray(picture)
    plate = picture[-plate_h:, :plate_w]
    drawn = Image.fromarray(plate // 4 + np.array(_PLATE_RGB, np.uint8))
    brush = ImageDraw.Draw(drawn)
    for index, line in enumerate(lines):
        middle = margin + step * index + step // 2
        half = max(1, round(0.15 * _FONT_PX * scale))
        brush.rectangle((margin, middle - half, margin + swatch, middle + half), fill=class_rgb(index))
        brush.text((2 * margin + swatch, middle), line, _TEXT_RGB, font=font, anchor="lm")
    plate[:] = np.asarray(drawn)
    return picture


def line_of(name: str, number: int, counting: tuple[str, ...]) -> str:
    """Describe a class, as ``red 95`` or ``platelet 19, not counted``."""
    return f"{name} {number}" + ("" if name in counting else ", not counted")
