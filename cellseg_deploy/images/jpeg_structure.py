"""Structure of a JPEG (size, scans, end marker) without decoding it, and its pixels from a strict decoder.

libjpeg fails silently: missing data becomes grey, and damage a smear of colour. simplejpeg turns its warnings into
errors. Checked here is what simplejpeg cannot detect: a file made to keep a decoder busy, a progressive file cut
between two scans, which lacks only detail, and a JPEG inside a TIFF, which is decoded at its own size, however large,
and then cropped to the size that the TIFF declares.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError

# A marker that ends pixel data or starts a segment: FF 00 is a pixel byte FF, FF D0..D7 are restarts within the data.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)
_SCAN, _END = 0xDA, 0xD9
_PROGRESSIVE = b"\xc2"
_COMMON = (b"\xc0", b"\xc1", _PROGRESSIVE)  # baseline, extended, progressive with Huffman codes
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # code tables have markers in the range of frames
MAX_SCANS = 32
"""Progressive files have about ten scans. Each costs a pass over all pixels, even if it is empty."""
MAX_SEGMENTS = 20_000
"""A colour profile has at most 255 segments."""


@dataclass(frozen=True)
class JpegStructure:
    """``height``, ``width`` in px, 0 without a frame header. ``scans``, ``segments``: number found, at most one more
    than the limits. ``has_end``: an end marker follows a scan. ``lacks_scans``: the file is progressive, and some
    component's coefficients were not sent to the last bit. ``is_common``: ``decode_strictly`` can read it."""

    height: int
    width: int
    scans: int
    segments: int
    has_end: bool
    lacks_scans: bool
    is_common: bool


def walk(data: bytes) -> JpegStructure:
    """Structure of the JPEG file or stream ``data`` from its start to its end marker.

    Data after the end marker is ignored: phones append a video or a depth map. An embedded preview has its own end
    marker, inside a segment.
    """
    height = width = scans = segments = 0
    has_end, position = False, 2
    frame, sent = b"", _Sent()
    while scans <= MAX_SCANS and segments <= MAX_SEGMENTS:
        marker = _MARKER.search(data, position)
        if marker is None:
            break
        kind, position = marker[0][1], marker.end()
        if kind == _END:
            has_end = scans > 0
            break
        if position + 2 > len(data):
            break
        segments += 1
        if kind in _FRAMES and not width and position + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 3)
        length = max(2, struct.unpack_from(">H", data, position)[0])
        if kind in _FRAMES and not frame:
            frame = bytes((kind,)) + data[position + 2 : position + length]
        elif kind == _SCAN:
            scans += 1
            sent.add(data[position + 2 : position + length])
        position += length
    components = [frame[7 + 3 * index : 10 + 3 * index] for index in range(frame[6] if len(frame) > 6 else 0)]
    lacks_scans = frame[:1] == _PROGRESSIVE and not all(sent.has_all(one[0]) for one in components if one)
    is_common = frame[:1] in _COMMON and frame[1:2] == b"\x08" and _has_common_sampling(components)
    return JpegStructure(height, width, scans, segments, has_end, lacks_scans, is_common)


class _Sent:
    """Coefficients of a progressive JPEG that its scans sent to the last bit (ITU-T T.81, B.2.3 and G.1.1.1)."""

    def __init__(self) -> None:
        self._whole: dict[int, set[int]] = {}

    def add(self, header: bytes) -> None:
        """Record a scan's header, starting at its number of components; ignore a damaged one."""
        n = header[0] if header else 0
        if len(header) < 4 + 2 * n:
            return
        first, last, bits = header[1 + 2 * n : 4 + 2 * n]
        if bits & 15 == 0:
            for component in header[1 : 1 + 2 * n : 2]:
                self._whole.setdefault(component, set()).update(range(first, min(last, 63) + 1))

    def has_all(self, component: int) -> bool:
        """Whether all 64 coefficients of this component are complete."""
        return len(self._whole.get(component, ())) == 64


def _has_common_sampling(components: list[bytes]) -> bool:
    """Whether the components' sampling is one that TurboJPEG knows: grey, or 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 with
    chroma of one sample."""
    if len(components) == 1:
        return True
    factors = [one[1] for one in components if len(one) == 3]
    return len(factors) == 3 and factors[0] in (0x11, 0x21, 0x22, 0x12, 0x41) and factors[1:] == [0x11, 0x11]


def decode_strictly(data: bytes, colours: Literal["GRAY", "RGB"]) -> npt.NDArray[Any]:
    """Decode a common JPEG as uint8 (h, w) for ``GRAY``, else (h, w, 3), to the same bytes as Pillow.

    Raises ``ValueError`` with libjpeg's message where libjpeg would only warn of damage and continue.
    """
    import simplejpeg

    samples = np.asarray(
        simplejpeg.decode_jpeg(data, colours, fastdct=False, fastupsample=False, strict=True), dtype=np.uint8
    )
    return samples[..., 0] if colours == "GRAY" else samples


def check_whole(path: Path, found: JpegStructure) -> None:
    """Raise ``DataError`` for a truncated JPEG. libjpeg fills missing data with grey, or leaves detail out."""
    if not found.has_end:
        raise DataError(f"{path}: the JPEG is cut short: its end marker is missing")
    if found.lacks_scans:
        raise DataError(
            f"{path}: the JPEG is cut short: it is progressive, and the scans that hold its detail are missing; "
            "copy or save it completely"
        )


def check_effort(path: Path, found: JpegStructure) -> None:
    """Raise ``DataError`` for a JPEG made to keep a decoder busy."""
    if found.scans > MAX_SCANS or found.segments > MAX_SEGMENTS:
        raise DataError(
            f"{path}: JPEG of more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments, which no camera writes; "
            "save it again with another program"
        )
