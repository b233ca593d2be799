"""Check that an image file has a complete header: its size is known, and its pixels lie within the file."""

from __future__ import annotations

import struct
from pathlib import Path

from cellseg_deploy.errors import DataError
from cellseg_deploy.files.regular import opened
from cellseg_deploy.images.decoder_warnings import collected
from cellseg_deploy.images.jpeg_structure import walk
from cellseg_deploy.images.tiff_pages import picture_of

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF; the last two are BigTIFF."""
_HEAD_BYTES = 1 << 20  # a JPEG's frame comes after EXIF data and colour profile
_PNG_HEAD = PNG + b"\0\0\0\rIHDR"


def has_header(path: Path) -> bool:
    """Whether ``path`` begins as a PNG, JPEG or TIFF with a size. Also False if it cannot be read; never blocks.

    Damage further on is not detected here but by the reader.
    """
    try:
        with opened(path) as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    if head.startswith(_PNG_HEAD) and len(head) >= len(_PNG_HEAD) + 8:
        width, height = struct.unpack_from(">II", head, len(_PNG_HEAD))
        return bool(width and height)
    if head.startswith(JPEG):
        found = walk(head)
        return min(found.width, found.height) > 0
    return head[:4] in TIFF and _has_tiff_header(path)


def _has_tiff_header(path: Path) -> bool:
    """Whether the TIFF's directory is there: usually it follows the pixels and is written last."""
    import tifffile

    try:
        size = path.stat().st_size
        with collected(), tifffile.TiffFile(path) as tiff:  # an incomplete file causes many messages
            try:
                page = picture_of(path, tiff).page
            except DataError:  # reported by the reader
                page = tiff.pages[0]
            parts = zip(page.dataoffsets, page.databytecounts, strict=True)
            return bool(page.imagewidth and page.imagelength and all(sum(part) <= size for part in parts))
    except Exception:  # tifffile may raise anything
        return False
