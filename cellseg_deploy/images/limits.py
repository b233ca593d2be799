"""Limit on the size of an image, checked before decoding."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import DataError


def check_pixels(path: Path, width: int, height: int, max_pixels: int) -> None:
    """Raise ``DataError`` if an image of this size is empty, or larger than ``max_pixels``."""
    if width < 1 or height < 1:
        raise DataError(f"{path}: image of {width} x {height} px; expected at least 1 x 1")
    if width * height > max_pixels:
        raise DataError(
            f"{path}: {width} x {height} px are more than the limit of {max_pixels} pixels; "
            "if the file really is that large, raise `max_pixels`"
        )
