"""Checks of a TIFF before it is decoded; ``page`` is a tifffile page, whose reader is lenient.

tifffile silently fills a missing tile with zeros, which looks exactly like an empty field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.jpeg_structure import check_effort, decode_strictly, walk
from cellseg_deploy.images.limits import check_pixels

JPEG = (6, 7)
"""Values of the tag Compression that stand for JPEG."""
# Decoders of these stop at the size that the TIFF declares. Those of JPEG 2000, PNG, WebP, JPEG XR, JPEG XL ... inside
# a TIFF decode whatever size their own header declares, which could be a million times as much.
_BOUNDED_IN_TIFF = {
    **{1: "none", 2: "CCITT RLE", 3: "CCITT T.4", 4: "CCITT T.6", 5: "LZW", 32773: "PackBits"},
    **{8: "Deflate", 32946: "Deflate", 34925: "LZMA", 34926: "Zstd", 50000: "Zstd"},
    **dict.fromkeys(JPEG, "JPEG"),  # its own header is checked
}


def check_page(path: Path, page: Any, data: bytes, max_pixels: int) -> None:
    """Check everything required before decoding: tifffile silently fills a missing tile with zeros."""
    check_pixels(path, page.imagewidth, page.imagelength, max_pixels)
    if int(page.compression) not in _BOUNDED_IN_TIFF:
        raise DataError(
            f"{path}: TIFF with compression {int(page.compression)}; expected "
            f"{', '.join(dict.fromkeys(_BOUNDED_IN_TIFF.values()))}; save it with LZW, Deflate or none"
        )
    if page.samplesperpixel > 4:
        raise DataError(f"{path}: TIFF with {page.samplesperpixel} channels; expected grey, RGB or RGBA")
    if page.is_tiled:
        check_pixels(path, page.tilewidth, page.tilelength, max(max_pixels, 1 << 22))
    expected = int(np.prod(page.chunked))
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != expected or len(counts) != expected:
        raise DataError(
            f"{path}: damaged TIFF: {len(offsets)} offsets and {len(counts)} sizes for {expected} strips or tiles"
        )
    missing = sum(1 for offset, count in zip(offsets, counts, strict=True) if offset == 0 or count == 0)
    if missing:
        raise DataError(f"{path}: {missing} of {expected} strips or tiles of the TIFF are missing; save it completely")
    if any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=True)):
        raise DataError(f"{path}: the TIFF is cut short: some of its pixels lie behind the end of the file")
    if int(page.compression) in JPEG:
        _check_jpeg_parts(path, page, data)
    elif int(page.compression) == 1 and sum(counts) < (needed := _raw_bytes(page)):
        # tifffile would read whatever follows in the file as the missing pixels.
        raise DataError(f"{path}: damaged TIFF: its pixels have {sum(counts)} bytes; expected {needed}")


def _raw_bytes(page: Any) -> int:
    """Number of bytes of all pixels of an uncompressed page; each row starts at a new byte, tiles are never cropped."""
    planes = page.samplesperpixel if int(page.planarconfig) == 2 else 1
    full_h, full_w, down, across = _layout(page)
    row_bytes = -(-full_w * (page.samplesperpixel // planes) * page.bitspersample // 8)
    rows = down * full_h if page.is_tiled else page.imagelength
    return int(planes * across * rows * row_bytes)


def _layout(page: Any) -> tuple[int, int, int, int]:
    """Height and width of a full strip or tile, and their number vertically and horizontally."""
    if page.is_tiled:
        height, width = page.tilelength, page.tilewidth
    else:
        height, width = min(page.rowsperstrip, page.imagelength), page.imagewidth
    return height, width, -(-page.imagelength // height), -(-page.imagewidth // width)


def _check_jpeg_parts(path: Path, page: Any, data: bytes) -> None:
    """Check that each JPEG of a TIFF is complete and of the size of its strip or tile; the last ones may be smaller."""
    full_h, full_w, down, across = _layout(page)
    tables = bytes(page.jpegtables or b"")
    cut = 0
    for index, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        part = data[offset : offset + count]
        found = walk(part)
        check_effort(path, found)
        is_whole = found.has_end and not found.lacks_scans
        cut += not is_whole
        row, column = divmod(index % (across * down), across)
        least_h = min(full_h, page.imagelength - row * full_h)
        least_w = min(full_w, page.imagewidth - column * full_w)
        if is_whole and not (least_h <= found.height <= full_h and least_w <= found.width <= full_w):
            raise DataError(
                f"{path}: damaged TIFF: a JPEG of {found.width} x {found.height} px in the place of a part of "
                f"{full_w} x {full_h} px"
            )
        if is_whole and found.is_common and int(page.compression) == 7:
            # tifffile fills damaged parts with grey. Tables are in a separate tag (TIFF Technical Note 2).
            decode_strictly(tables[:-2] + part[2:] if tables else part, "GRAY")
    if cut:
        raise DataError(
            f"{path}: {cut} of {len(page.dataoffsets)} JPEG parts of the TIFF are cut short; save it completely"
        )
