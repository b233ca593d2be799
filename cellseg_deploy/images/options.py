"""Settings for reading images: those of ``read_image``, and the defaults of every command."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cellseg_deploy.errors import UsageError, check_types

MAX_PIXELS = 200_000_000
"""Largest image that is decoded, in pixels; 200 MP need about 600 MB as RGB."""


@dataclass(frozen=True)
class ReadOptions:
    """Settings for reading images.

    ``max_pixels``: larger images are refused before they are decoded. ``bit_depth`` (9 to 16): bits that the camera
    really used in a file of 16-bit samples; None: as stated in the file, or its full range. ``pixel_size_um``: side of
    a pixel in the specimen in micrometres, overriding the file; None: the TIFF's value, if plausible for a microscope.

    Raises ``UsageError`` for a wrong type, or a value outside its range.

    >>> ReadOptions(bit_depth=12).max_pixels
    200000000
    """

    max_pixels: int = MAX_PIXELS
    bit_depth: int | None = None
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        size = self.pixel_size_um
        check_types("a whole number", max_pixels=self.max_pixels)
        check_types("a whole number or None", bit_depth=self.bit_depth)
        check_types("a number or None", pixel_size_um=size)
        if self.max_pixels < 1:
            raise UsageError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.bit_depth is not None and not 9 <= self.bit_depth <= 16:
            raise UsageError(f"bit depth must be 9 to 16, got {self.bit_depth}; 8-bit images need none")
        if size is not None and not (math.isfinite(size) and 0 < size <= 1000):
            raise UsageError(f"pixel size must be above 0 and at most 1000 micrometres, got {size}")
