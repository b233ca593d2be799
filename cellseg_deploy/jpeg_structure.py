"""The skeleton of a JPEG: how large it says it is, how many scans it has, and whether it ends; without decoding it.

Decoders go wrong in silence here: a JPEG that was cut ends in grey, and one inside of a TIFF is decoded at its own
size, however large, and then cropped to the size that the TIFF declares.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import DataError

# A marker that ends pixel data or starts a segment: FF 00 is a pixel byte FF, FF D0..D7 are restarts within the data.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)
_SCAN, _END = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables of codes have markers among those of frames
MAX_SCANS = 32
"""Progressive files have about ten. Each costs a pass over all pixels, even if it is empty."""
MAX_SEGMENTS = 20_000
"""A colour profile has at most 255."""


@dataclass(frozen=True)
class JpegStructure:
    """``height``, ``width`` in px, 0 without a frame header. ``scans``, ``segments``: how many were seen, at most one
    more than the limits. ``is_whole``: its end marker stands behind a scan."""

    height: int
    width: int
    scans: int
    segments: int
    is_whole: bool


def walk(data: bytes) -> JpegStructure:
    """Structure of the JPEG file or stream ``data`` from its start to its end marker.

    What is behind that is no matter: phones append a film or a depth map. An embedded preview has an end marker of its
    own, inside of a segment.
    """
    height = width = scans = segments = 0
    is_whole, position = False, 2
    while scans <= MAX_SCANS and segments <= MAX_SEGMENTS:
        marker = _MARKER.search(data, position)
        if marker is None:
            break
        kind, position = marker[0][1], marker.end()
        if kind == _END:
            is_whole = scans > 0
            break
        if position + 2 > len(data):
            break
        segments += 1
        if kind in _FRAMES and not width and position + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 3)
        scans += kind == _SCAN
        position += max(2, struct.unpack_from(">H", data, position)[0])
    return JpegStructure(height, width, scans, segments, is_whole)


def check_effort(path: Path, found: JpegStructure) -> None:
    """Raise ``DataError`` for a JPEG made to keep a decoder busy."""
    if found.scans > MAX_SCANS or found.segments > MAX_SEGMENTS:
        raise DataError(
            f"{path}: JPEG of more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments, which no camera writes; "
            "save it again with another program"
        )
