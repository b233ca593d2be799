"""The directory of a CZI file, whose format ZEISS calls ZISRAW, checked against the file's size.

libCZI, which decodes the pixels, ended the process for damaged sizes in the header of a subblock, and for JPEG XR of
another pixel format than it announces; so they are checked before it opens the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError
from cellseg_deploy.files.regular import opened

PIXEL_TYPES = {0: "Gray8", 1: "Gray16", 3: "Bgr24", 4: "Bgr48"}
_OTHER_TYPES = {2: "Gray32Float", 8: "Bgr96Float", 9: "Bgra32", 10: "Gray64ComplexFloat", 12: "Gray32"}
_BYTES = {"Gray8": 1, "Gray16": 2, "Bgr24": 3, "Bgr48": 6}
_NONE, _JPEG_XR, _ZSTD = 0, 4, (5, 6)
_PIXEL_FORMAT, _IMAGE = 0xBC01, 0xBCC0
_FORMATS = bytes.fromhex("24c3dd6f034efe4bb1853d77768dc9")
# The last byte of the pixel format, and the output format and bit depth of the image's header.
_JPEG_XR_OF = {"Gray8": b"\x08\x01", "Gray16": b"\x0b\x02", "Bgr24": b"\x0c\x71", "Bgr48": b"\x15\x72"}
_SEGMENT = struct.Struct("<16sqq")
_ENTRY = struct.Struct("<2siqiiB5xi")
_DIMENSION = struct.Struct("<4siifi")
_NOT_PLANES = ("X", "Y", "M", "S")
"""All tiles and scenes lie in one system of coordinates, so they are one picture."""
_MOST_DIMENSIONS = 40
_CELLS = 1024


@dataclass(frozen=True)
class Subblock:
    """A tile of ``width`` x ``height`` px of level 0 at ``x``, ``y``; ``step`` x ``step`` px are stored as one."""

    x: int
    y: int
    width: int
    height: int
    step: int


@dataclass(frozen=True)
class CziStructure:
    """``x``, ``y``, ``width``, ``height``: the box around all tiles of level 0, in the file's coordinates.

    ``pixel_type``: one of ``PIXEL_TYPES``. ``steps``: 1, and the pixels of level 0 per pixel of each layer of the
    pyramid that covers all that was scanned.
    """

    x: int
    y: int
    width: int
    height: int
    pixel_type: str
    steps: tuple[int, ...]
    has_metadata: bool


def structure_of(path: Path) -> CziStructure:
    """Read the directory of ``path``. Raises ``DataError`` for a file that is no CZI, is damaged or cut short, has
    several channels, times or slices, or pixels of another kind than ``PIXEL_TYPES``."""
    try:
        with opened(path) as file:
            return _Directory(path, file).read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Directory:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._size = path, file, os.fstat(file.fileno()).st_size
        self._kinds, self._places = set[int](), dict[str, set[int]]()

    def read(self) -> CziStructure:
        head = self._file.read(_SEGMENT.size)
        if not head.startswith(b"ZISRAWFILE\0"):
            raise DataError(f"{self._path}: not a CZI file, whatever its name says: it starts with {head[:8]!r}")
        part, directory, metadata = struct.unpack("<iqq", self._bytes(_SEGMENT.size + 48, 20, "header"))
        self._refuse_parts(part)
        if metadata:
            text, attached = struct.unpack("<ii", self._segment(metadata, b"ZISRAWMETADATA", 8, "metadata"))
            self._check_room(metadata + _SEGMENT.size + 256, (text, attached), "metadata")
        (count,) = struct.unpack("<i", self._segment(directory, b"ZISRAWDIRECTORY", 4, "directory"))
        blocks = self._blocks(directory + _SEGMENT.size + 128, count)
        if several := [f"{name} {len(starts)}" for name, starts in sorted(self._places.items()) if len(starts) > 1]:
            raise DataError(
                f"{self._path}: CZI with several planes ({', '.join(several)}); expected one channel (C), time (T) and "
                "slice (Z); in ZEN, save the one that you want with Create Image Subset"
            )
        if len(self._kinds) > 1 or not self._kinds <= PIXEL_TYPES.keys():
            found = ", ".join(_OTHER_TYPES.get(kind, PIXEL_TYPES.get(kind, str(kind))) for kind in sorted(self._kinds))
            raise DataError(
                f"{self._path}: CZI with pixels of type {found}; expected one of {', '.join(PIXEL_TYPES.values())}; in "
                "ZEN, convert it to 8 or 16 bit"
            )
        full = [block for block in blocks if block.step == 1]
        if not full:
            raise DataError(f"{self._path}: CZI without a tile at full resolution; save it completely")
        x, y = min(block.x for block in full), min(block.y for block in full)
        width = max(block.x + block.width for block in full) - x
        height = max(block.y + block.height for block in full) - y
        steps = _steps(blocks, (x, y, width, height))
        return CziStructure(x, y, width, height, PIXEL_TYPES[self._kinds.pop()], steps, bool(metadata))

    def _blocks(self, position: int, count: int) -> list[Subblock]:
        if not 0 <= count <= self._size // _SEGMENT.size:  # each subblock is a segment
            raise self._damaged(f"the directory lists {count} tiles")
        blocks = []
        for _ in range(count):
            kind, place, part, compression, dimensions = self._entry(self._bytes(position, _ENTRY.size, "directory"))
            self._refuse_parts(part)
            said = self._bytes(position + _ENTRY.size, dimensions * _DIMENSION.size, "directory")
            sizes = dict[str, tuple[int, int, int]]()
            for name, start, size, _, stored in _DIMENSION.iter_unpack(said):
                sizes[name.rstrip(b"\0").decode("latin-1")] = start, size, stored or size
            position += _ENTRY.size + len(said)
            blocks.append(self._block(sizes))
            self._check_subblock(place, kind, compression, sizes)
            self._kinds.add(kind)
            for name in sizes.keys() - _NOT_PLANES:
                self._places.setdefault(name, set()).add(sizes[name][0])
        return blocks

    def _entry(self, entry: bytes) -> tuple[int, int, int, int, int]:
        """Pixel type, place in the file, part, compression and number of dimensions."""
        schema, kind, place, part, compression, _, dimensions = _ENTRY.unpack(entry)
        if schema != b"DV" or not 2 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged("the description of a tile is not readable")
        return kind, place, part, compression, dimensions

    def _block(self, sizes: dict[str, tuple[int, int, int]]) -> Subblock:
        if not {"X", "Y"} <= sizes.keys() or not all(sizes[axis][1] >= sizes[axis][2] > 0 for axis in "XY"):
            raise self._damaged("a tile has no valid size")
        (x, width, stored_width), (y, height, stored_height) = sizes["X"], sizes["Y"]
        ratio = width / stored_width if width > height else height / stored_height
        powers = [base**power for power in range(20) for base in (2, 3)]
        return Subblock(x, y, width, height, min(powers, key=lambda step: max(step / ratio, ratio / step)))

    def _check_subblock(self, place: int, kind: int, compression: int, sizes: dict[str, tuple[int, int, int]]) -> None:
        about = self._segment(place, b"ZISRAWSUBBLOCK", 16 + _ENTRY.size, "tile")
        described, attached, pixels = struct.unpack_from("<iiq", about)
        *_, dimensions = self._entry(about[16:])  # its own copy, which libCZI compares with that in the directory
        before = max(256, len(about) + dimensions * _DIMENSION.size)
        self._check_room(place + _SEGMENT.size + before, (described, attached, pixels), "tile")
        if compression not in (_NONE, _JPEG_XR, *_ZSTD):
            raise DataError(
                f"{self._path}: CZI with compression {compression}; expected none (0), JPEG XR (4) or Zstd (5, 6); in "
                "ZEN, save it with one of them"
            )
        plain = sizes["X"][2] * sizes["Y"][2] * _BYTES[PIXEL_TYPES[kind]] if kind in PIXEL_TYPES else 0
        if compression == _NONE and pixels < plain:
            raise self._damaged(f"a tile has {pixels} bytes of pixels instead of {plain}")
        if compression == _JPEG_XR and kind in PIXEL_TYPES:
            self._check_jpeg_xr(place + _SEGMENT.size + before + described, PIXEL_TYPES[kind])

    def _check_jpeg_xr(self, start: int, pixel_type: str) -> None:
        """Compare what a JPEG XR (ITU-T T.832, clause 8 and annex A) says of its pixels with the type of its tile."""
        mark, directory = struct.unpack("<4sI", self._bytes(start, 8, "tile"))
        (count,) = struct.unpack("<H", self._bytes(start + directory, 2, "tile"))
        entries = struct.iter_unpack("<HHII", self._bytes(start + directory + 2, 12 * count, "tile"))
        places = {tag: value for tag, _, _, value in entries}
        if mark[:3] != b"II\xbc" or not {_PIXEL_FORMAT, _IMAGE} <= places.keys():
            raise self._damaged("a tile is no JPEG XR")
        image = self._bytes(start + places[_IMAGE], 21, "tile")
        inner = image[16 if image[10] & 0x80 else 20] >> 5  # short or long header
        is_plain = not image[9] & 0x80 and not image[10] & 0x20  # neither tiling nor windowing lies before it
        expected = _JPEG_XR_OF[pixel_type]
        if (
            self._bytes(start + places[_PIXEL_FORMAT], 16, "tile") != _FORMATS + expected[:1]
            or image[:8] != b"WMPHOTO\0"
            or image[11:12] != expected[1:]
            or (is_plain and inner not in ((0,) if pixel_type.startswith("Gray") else (1, 2, 3)))
        ):
            raise self._damaged(f"the JPEG XR of a tile has other pixels than {pixel_type}")

    def _segment(self, position: int, name: bytes, size: int, what: str) -> bytes:
        """The first ``size`` bytes of the segment ``name``."""
        read = self._bytes(position, _SEGMENT.size + size, what)
        if read[:16].rstrip(b"\0") != name:
            raise self._damaged(f"its {what} is not where the file says")
        return read[_SEGMENT.size :]

    def _bytes(self, position: int, size: int, what: str) -> bytes:
        if not 0 <= position <= self._size - size:
            raise self._damaged(f"its {what} lies behind the end of the file")
        self._file.seek(position)
        read = self._file.read(size)
        if len(read) < size:
            raise self._damaged(f"its {what} is cut short")
        return read

    def _check_room(self, position: int, sizes: Sequence[int], what: str) -> None:
        if min(sizes) < 0 or position + sum(sizes) > self._size:
            raise self._damaged(f"its {what} lies behind the end of the file")

    def _refuse_parts(self, part: int) -> None:
        if part:
            raise DataError(f"{self._path}: CZI in several files; in ZEN, save it as one file")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._path}: damaged or incomplete CZI: {what}; copy the file again")


def _steps(blocks: Sequence[Subblock], box: tuple[int, int, int, int]) -> tuple[int, ...]:
    """1, and the steps whose tiles cover all tiles of level 0, on a grid of at most ``_CELLS`` points a side."""
    full = _covered(blocks, box, 1)
    steps = sorted({block.step for block in blocks} - {1})
    return 1, *(step for step in steps if not (full & ~_covered(blocks, box, step)).any())


def _covered(blocks: Sequence[Subblock], box: tuple[int, int, int, int], step: int) -> npt.NDArray[np.bool_]:
    """Points of the grid that tiles of ``step`` cover. The last pixel of a layer may cover less than others."""
    x, y, width, height = box
    cell = max(1, -(-max(width, height) // _CELLS))
    covered: Any = np.zeros((-(-height // cell), -(-width // cell)), bool)
    more = step if step > 1 else 0
    for block in blocks:
        if block.step == step:
            left, top = (max(0, -(-start // cell)) for start in (block.x - x, block.y - y))
            right = (block.x - x + block.width + more - 1) // cell + 1
            bottom = (block.y - y + block.height + more - 1) // cell + 1
            covered[top : max(0, bottom), left : max(0, right)] = True
    return np.asarray(covered)
