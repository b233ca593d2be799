"""CZI files from single subblocks, by ZEISS's description of the format: what pylibCZIrw cannot write.

That is JPEG XR, layers of a pyramid, and files that are to be refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np

GRAY8, GRAY16, GRAY32_FLOAT, BGR24, BGR48 = 0, 1, 2, 3, 4
NONE, JPEG, JPEG_XR, ZSTD0 = 0, 1, 4, 5
_TYPES = {("uint8", 2): GRAY8, ("uint16", 2): GRAY16, ("float32", 2): GRAY32_FLOAT, ("uint8", 3): BGR24}
_TYPES["uint16", 3] = BGR48
# Pixel formats of JPEG XR; the decoder of the second one reverses the channels, as in files of ZEN.
_RGB = bytes.fromhex("24c3dd6f034efe4bb1853d77768dc90d")
_BGR = _RGB[:-1] + b"\x0c"


@dataclass(frozen=True)
class Subblock:
    """``pixels``, grey (h, w) or RGB (h, w, 3), at ``x``, ``y`` of level 0, of whose pixels each covers ``step`` x
    ``step``; ``place``: its other coordinates."""

    pixels: np.ndarray
    x: int = 0
    y: int = 0
    step: int = 1
    place: dict[str, int] = field(default_factory=dict)
    compression: int = NONE
    file_part: int = 0


def tiles(pixels: np.ndarray, side: int, x: int = 0, y: int = 0, *, step: int = 1, **more: object) -> list[Subblock]:
    """``pixels`` in tiles of ``side``; the first one at ``x``, ``y``."""
    return [
        Subblock(pixels[top : top + side, left : left + side], x + left * step, y + top * step, step, **more)  # type: ignore[arg-type]
        for top in range(0, pixels.shape[0], side)
        for left in range(0, pixels.shape[1], side)
    ]


def metadata(um_xy: tuple[float, float] | None = None, *, bits: int | None = None) -> str:
    """As ZEN writes it, of a pixel size and the bits of the camera."""
    count = "" if bits is None else f"<ComponentBitCount>{bits}</ComponentBitCount>"
    size = "".join(
        f'<Distance Id="{axis}"><Value>{um}E-06</Value><DefaultUnitFormat>µm</DefaultUnitFormat></Distance>'
        for axis, um in zip("XY", um_xy or (), strict=False)
    )
    return (
        f"<ImageDocument><Metadata><Information><Image>{count}<SizeX>1</SizeX></Image></Information>"
        f"<Scaling><AutoScaling/><Items>{size}</Items></Scaling></Metadata></ImageDocument>"
    )


def write_czi(path: Path, subblocks: list[Subblock], xml: str | None = None) -> Path:
    """Write the file ``path``. ``xml``: None for a file without metadata."""
    position, entries, segments = 544, b"", b""
    for index, block in enumerate(subblocks):
        entry = _entry(block, index, position)
        data = _encoded(block)
        sizes = struct.pack("<iiq", 0, 0, len(data))
        made = _segment(b"ZISRAWSUBBLOCK", (sizes + entry).ljust(256, b"\0") + data)
        entries, segments, position = entries + entry, segments + made, position + len(made)
    directory = _segment(b"ZISRAWDIRECTORY", struct.pack("<i", len(subblocks)).ljust(128, b"\0") + entries)
    text = b"" if xml is None else xml.encode()
    about = (
        b"" if xml is None else _segment(b"ZISRAWMETADATA", struct.pack("<ii", len(text), 0).ljust(256, b"\0") + text)
    )
    places = position, position + len(directory) if about else 0
    header = struct.pack("<4i16s16siqqiq", 1, 0, 0, 0, bytes(16), bytes(16), 0, *places, 0, 0)
    path.write_bytes(_segment(b"ZISRAWFILE", header.ljust(512, b"\0")) + segments + directory + about)
    return path


def _segment(name: bytes, content: bytes) -> bytes:
    content = content.ljust(-(-len(content) // 32) * 32, b"\0")
    return struct.pack("<16sqq", name, len(content), len(content)) + content


def _entry(block: Subblock, index: int, position: int) -> bytes:
    """A DirectoryEntryDV. Layers of a pyramid are no part of the mosaic, so they have no M."""
    height, width = block.pixels.shape[:2]
    dimensions = [("X", block.x, width * block.step, width), ("Y", block.y, height * block.step, height)]
    place = block.place if block.step > 1 else {"M": index} | block.place
    dimensions += [(name, start, 1, 1) for name, start in place.items()]
    kind = _TYPES[block.pixels.dtype.name, block.pixels.ndim]
    head = struct.pack(
        "<2siqiiB5xi", b"DV", kind, position, block.file_part, block.compression, 2 * (block.step > 1), len(dimensions)
    )
    return head + b"".join(
        struct.pack("<4siifi", name.encode(), start, size, start, stored) for name, start, size, stored in dimensions
    )


def _encoded(block: Subblock) -> bytes:
    stored = np.ascontiguousarray(block.pixels[..., ::-1] if block.pixels.ndim == 3 else block.pixels)  # BGR
    if block.compression == ZSTD0:
        return bytes(imagecodecs.zstd_encode(stored.tobytes()))
    if block.compression == JPEG_XR:
        made = bytes(imagecodecs.jpegxr_encode(block.pixels, level=1.0))
        return made.replace(_RGB, _BGR) if block.pixels.ndim == 3 else made
    return stored.tobytes()
