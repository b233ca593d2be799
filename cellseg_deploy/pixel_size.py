"""How large a pixel is in the specimen, as far as a TIFF says: OME-XML, ImageJ's calibration, or the resolution tags.

A resolution is written into most files, and mostly means paper: 72 dpi is 353 micrometres a pixel. What no light
microscope gives is not believed, and the image's notes say so. PNG and JPEG hold a density for printers only; theirs is
not read.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import Any

from cellseg_deploy.errors import UsageError

PLAUSIBLE_UM = (0.01, 20.0)
"""Side of a pixel: from a fine camera behind a 100x objective to a plate scanner of 1,300 dpi."""
_SQUARE = 0.01  # relative difference of a pixel's sides that rounding explains
_MICROMETRES = {
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    "m": 1e6,
    **dict.fromkeys(("in", "inch", "inches"), 25_400.0),
}
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296  # tags of TIFF 6.0, pixels a unit
_UNIT_OF_TAG = {2: "inch", 3: "cm"}
# No XML parser on text that somebody else made: entities can grow without bound, and two attributes are all we want.
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b([^<>]*)>")
_ATTRIBUTE = re.compile(r"""\bPhysicalSize([XY](?:Unit)?)\s*=\s*["']([^"']*)["']""")


@dataclass(frozen=True)
class PixelSize:
    """``um``: side of a pixel in micrometres, None if nothing credible is known. ``note``: what was not believed."""

    um: float | None = None
    note: str = ""


UNKNOWN = PixelSize()


def check_pixel_size(pixel_size_um: float | None) -> None:
    """Raise ``UsageError`` if somebody cannot mean this size."""
    if pixel_size_um is not None and not (math.isfinite(pixel_size_um) and 0 < pixel_size_um <= 1000):
        raise UsageError(f"pixel size must be above 0 and at most 1000 micrometres, got {pixel_size_um}")


def from_tiff(page: Any) -> PixelSize:
    """What the first page of a TIFF (a tifffile page) says. Never fails: a broken description says nothing."""
    sides = _sides(page)
    if sides is None:
        return UNKNOWN
    x, y = sides
    low, high = PLAUSIBLE_UM
    if not (low <= x <= high and low <= y <= high):
        return PixelSize(
            note=f"the file's resolution of {25_400 / x:.4g} dpi ({x:.4g} micrometres a pixel) is no microscope's and "
            "was not used; give --pixel-size for micrometres"
        )
    if abs(x - y) > _SQUARE * max(x, y):
        return PixelSize(
            note=f"the file's pixels are not square ({x:.4g} x {y:.4g} micrometres) and their size was not used; "
            "give --pixel-size for micrometres"
        )
    return PixelSize(x)


def _sides(page: Any) -> tuple[float, float] | None:
    """Width and height of a pixel in micrometres, both positive and finite."""
    description = page.description if isinstance(page.description, str) else ""
    if "<" in description[:5] and (pixels := _OME_PIXELS.search(description)) is not None:
        said = {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(pixels[1])}
        width, height = said.get("X", ""), said.get("Y", said.get("X", ""))
        width_unit = said.get("XUnit", "um")  # the schema's own default
        return _in_um(width, width_unit, height, said.get("YUnit", "um" if "Y" in said else width_unit))
    x, y = (_pixels_a_unit(page, tag) for tag in (_X_RESOLUTION, _Y_RESOLUTION))
    if description.startswith("ImageJ="):
        unit = re.search(r"^unit=(.*)$", description, re.MULTILINE)
        named = "" if unit is None else unit[1].replace("\\u00B5", "\u00b5")
        return _in_um(1 / x, named, 1 / y, named) if x and y else None
    tag = page.tags.get(_RESOLUTION_UNIT)
    unit_of_tag = "" if tag is None else _UNIT_OF_TAG.get(tag.value, "")
    return _in_um(1 / x, unit_of_tag, 1 / y, unit_of_tag) if x and y else None


def _in_um(x: float | str, x_unit: str, y: float | str, y_unit: str) -> tuple[float, float] | None:
    try:
        sides = float(x) * _MICROMETRES[x_unit.strip().lower()], float(y) * _MICROMETRES[y_unit.strip().lower()]
    except (KeyError, ValueError):
        return None
    return sides if all(math.isfinite(side) and side > 0 for side in sides) else None


def _pixels_a_unit(page: Any, number: int) -> float:
    """Value of a resolution tag, 0 if there is none."""
    tag = page.tags.get(number)
    try:
        numerator, denominator = tag.value
        return float(numerator / denominator)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return 0.0
