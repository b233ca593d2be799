"""Pixel size stated by an image file, and whether it is credible.

A microscope's software writes a pixel size; cameras and editors write 72, 96 or 300 dpi, which is meant for a screen or
a printer and says nothing about the magnification: 72 dpi is 353 micrometres per pixel. A tag that is missing, zero or
damaged is ignored: the pixels are complete without it. PNG and JPEG hold only a density for printers; it is listed,
but never believed.
"""

from __future__ import annotations

import html
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

PRINT_UM = 5.0
"""A red cell is 6 to 8 micrometres wide: pixels of this size or more belong to a page or a screen."""
GIVEN = "given"
"""Source of a pixel size set by the user."""
PLAUSIBLE_UM = (0.01, 20.0)
"""Side of a pixel, from a fine camera behind a 100x objective to a plate scanner of 1,300 dpi."""
CELL_UM = (2.0, 100.0)
"""Diameter of the median cell: platelets are the smallest, 2 to 4, and few cells of the body are larger than 100."""
_PLACEHOLDER_UM, _PLACEHOLDER_CELL_UM = 1.0, 30.0  # written if nobody set a size; then the limit for doubt is lower
_OF_MICROSCOPES = ("OME", "ImageJ", "TIFF", "CZI")
_SQUARE = 0.01  # relative difference of a pixel's sides that rounding explains
_UM_PER_INCH, _UM_PER_CM = 25_400.0, 10_000.0
_EXIF_X, _EXIF_Y, _EXIF_UNIT = 282, 283, 296  # the same numbers as in TIFF 6.0
_UNIT_UM = {2: _UM_PER_INCH, 3: _UM_PER_CM}
_UM_OF = {
    **dict.fromkeys(("µm", "μm", "um", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("inch", "in", "inches"), _UM_PER_INCH),
    **{"m": 1e6, "å": 1e-4, "pm": 1e-6},
}
# A pattern instead of an XML parser: an untrusted file must not make a parser expand its entities.
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^<>]*>")
_OME_SIZE = re.compile(r"""\bPhysicalSize([XY](?:Unit)?)\s*=\s*["']([^"']*)["']""")


@dataclass(frozen=True)
class Resolution:
    """Size of a pixel, width and height in micrometres, as stated by the tag ``source`` of the file."""

    source: str
    um_per_px: tuple[float, float]

    @property
    def is_of_print(self) -> bool:
        """Whether this is the resolution of a page or screen, unrelated to the magnification."""
        return min(self.um_per_px) >= PRINT_UM

    def __str__(self) -> str:
        unit = "dpi" if self.is_of_print else "µm/px"
        values = [_UM_PER_INCH / um if self.is_of_print else um for um in self.um_per_px]
        same = math.isclose(*values, rel_tol=1e-3)
        return f"{self.source} {' x '.join(f'{value:.4g}' for value in (values[:1] if same else values))} {unit}"


@dataclass(frozen=True)
class PixelSize:
    """``um``: side of a pixel in micrometres, None if nothing credible is known. ``source``: origin, a tag of the file
    or the user. ``note``: what was rejected or is doubtful."""

    um: float | None = None
    source: str = ""
    note: str = ""


UNKNOWN = PixelSize()


def believed_pixel_size(said: Sequence[Resolution]) -> PixelSize:
    """Choose the pixel size from those a file states, in the file's order. Sizes that no light microscope has are
    rejected, and so are the densities of PNG and JPEG."""
    sizes = [one for one in said if one.source in _OF_MICROSCOPES]
    if not sizes:
        return UNKNOWN
    x, y = sizes[0].um_per_px
    low, high = PLAUSIBLE_UM
    if not (low <= x <= high and low <= y <= high):
        return PixelSize(
            note=f"the file's resolution of {_UM_PER_INCH / x:.4g} dpi ({x:.4g} micrometres per pixel) is not a "
            "microscope's and was not used; give `pixel_size_um` for micrometres"
        )
    if abs(x - y) > _SQUARE * max(x, y):
        return PixelSize(
            note=f"the file's pixels are not square ({x:.4g} x {y:.4g} micrometres) and their size was not used; "
            "give `pixel_size_um` for micrometres"
        )
    return PixelSize(x, sizes[0].source)


def checked_by_cells(size: PixelSize, diameters_px: npt.NDArray[np.float64]) -> PixelSize:
    """Add a ``note`` to ``size`` if the median of these cell diameters (n,) in px would not be the size of a cell.

    Then a size from the file becomes unknown; one set by the user is kept. Without cells, ``size`` is not questioned.
    """
    if size.um is None or not len(diameters_px):
        return size
    cell_um = float(np.median(diameters_px)) * size.um
    low, high = CELL_UM
    if low <= cell_um <= high and not (
        size.um == _PLACEHOLDER_UM and size.source != GIVEN and cell_um > _PLACEHOLDER_CELL_UM
    ):
        return size
    because = f"the median cell would be {cell_um:.3g} micrometres wide"
    if size.source == GIVEN:
        return replace(
            size,
            note=f"{because} at the given pixel size of {size.um:.4g} micrometres, expected {low:g} to {high:g}; "
            "`pixel_size_um` takes micrometres (65 nm are 0.065)",
        )
    return PixelSize(
        note=f"the file's pixel size of {size.um:.4g} micrometres ({size.source}) was not used: {because}, expected "
        f"{low:g} to {high:g}; give `pixel_size_um` for micrometres"
    )


def of_png(data: bytes) -> tuple[Resolution, ...]:
    """Read the pHYs chunk of a complete PNG file, if it is in metres."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"pHYs" and length == 9:
            x, y, unit = struct.unpack_from(">IIB", data, position + 8)
            return _made("PNG", x, y, 1e6 if unit == 1 else None)
        if kind in (b"IDAT", b"IEND"):
            break
        position += 12 + length
    return ()


def of_jpeg(image: Any) -> tuple[Resolution, ...]:
    """Read the JFIF header of a Pillow image, else its EXIF data."""
    unit = {1: _UM_PER_INCH, 2: _UM_PER_CM}.get(image.info.get("jfif_unit"))
    x, y = image.info.get("jfif_density", (None, None))
    jfif = _made("JPEG", x, y, unit)
    exif = image.getexif()
    return jfif or _made("EXIF", exif.get(_EXIF_X), exif.get(_EXIF_Y), _UNIT_UM.get(exif.get(_EXIF_UNIT, 2)))


def of_tiff(tiff: Any, page: Any) -> tuple[Resolution, ...]:
    """Read ``page`` of a ``tifffile.TiffFile``: OME, then ImageJ's unit or the page's own."""
    x, y, unit = (None if tag is None else tag.value for tag in map(page.tags.get, (_EXIF_X, _EXIF_Y, _EXIF_UNIT)))
    found = _of_ome(tiff.pages[0].description) if tiff.is_ome else ()
    if tiff.is_imagej:
        name = str((tiff.imagej_metadata or {}).get("unit", "")).strip().casefold()
        return found + _made("ImageJ", x, y, _UM_OF.get(name))
    return found + _made("TIFF", x, y, _UNIT_UM.get(2 if unit is None else unit))  # inch is TIFF's default


def _of_ome(description: str) -> tuple[Resolution, ...]:
    pixels = _OME_PIXELS.search(description)
    if pixels is None:
        return ()
    said = {name: html.unescape(value) for name, value in _OME_SIZE.findall(pixels[0])}
    if "Y" not in said:  # a microscope's pixels are square unless stated otherwise
        said |= {name.replace("X", "Y"): value for name, value in said.items() if name.startswith("X")}
    units = [_UM_OF.get(said.get(f"{axis}Unit", "µm").strip().casefold(), math.nan) for axis in "XY"]  # µm: the schema
    um = [_number(said.get(axis)) * unit for axis, unit in zip("XY", units, strict=True)]
    return (Resolution("OME", (um[0], um[1])),) if _is_size(um) else ()


def _made(source: str, x: Any, y: Any, um_per_unit: float | None) -> tuple[Resolution, ...]:
    """Convert pixels per unit in both directions; empty if invalid."""
    if um_per_unit is None:
        return ()
    per_unit = [_number(value) for value in (x, y)]
    um = [um_per_unit / value if value else math.nan for value in per_unit]
    return (Resolution(source, (um[0], um[1])),) if _is_size(um) else ()


def _number(value: Any) -> float:
    """Convert a number or a pair (numerator, denominator) to float; NaN if invalid."""
    try:
        return float(value[0] / value[1]) if isinstance(value, tuple) else float(value)
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return math.nan


def _is_size(um: list[float]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in um)
