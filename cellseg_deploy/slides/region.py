"""What every reader of regions offers, and the part of an image that is asked for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.resolution import UNKNOWN, PixelSize

Pixels = npt.NDArray[np.uint8]


class RegionReader(Protocol):
    """An image whose regions can be read. Levels go from the full resolution, 0, to the smallest."""

    name: str
    levels: tuple[tuple[int, int], ...]
    """Size (h, w) in px of each level."""
    pixel_size: PixelSize
    """Of level 0, as of ``LoadedImage``."""
    notes: tuple[str, ...]
    stamp: tuple[int, ...]
    """Recognises other pixels under the same name: size in bytes and time stamp of the file, or a checksum."""

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """Read a region that lies in the image, uint8 RGB (h, w, 3); ``y``, ``x`` in px of ``level``.

        Raises ``DataError`` if a part of the file is missing or damaged.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass(frozen=True)
class Region:
    """A part of one level of ``reader``: ``height`` x ``width`` px at ``y``, ``x``."""

    reader: RegionReader
    level: int
    y: int
    x: int
    height: int
    width: int

    @property
    def hw(self) -> tuple[int, int]:
        """Size (h, w) in px."""
        return self.height, self.width

    @property
    def pixel_size(self) -> PixelSize:
        """Of the region's level."""
        size = self.reader.pixel_size
        if size.um is None or self.level == 0:
            return size
        return PixelSize(size.um * self.reader.levels[0][0] / self.reader.levels[self.level][0], size.source, size.note)

    def rows(self, start: int, stop: int) -> Pixels:
        """Rows ``start`` to before ``stop``, uint8 RGB (stop - start, w, 3)."""
        return self.reader.read(self.y + start, self.x, stop - start, self.width, self.level)

    def part(self, rows: slice, columns: slice) -> Pixels:
        """The pixels of ``rows`` and ``columns``, uint8 RGB (h, w, 3)."""
        y, x = self.y + rows.start, self.x + columns.start
        return self.reader.read(y, x, rows.stop - rows.start, columns.stop - columns.start, self.level)


def region_of(reader: RegionReader, level: int = 0, xywh: tuple[int, int, int, int] | None = None) -> Region:
    """Return the region ``xywh`` (left, top, width, height in px of ``level``) of ``reader``; None for all of it.

    Raises ``UsageError`` for a level that does not exist, or a region that does not lie in the image.
    """
    if not 0 <= level < len(reader.levels):
        sizes = ", ".join(f"{n}: {w} x {h} px" for n, (h, w) in enumerate(reader.levels))
        raise UsageError(f"{reader.name}: level {level} does not exist; there are {sizes}")
    height, width = reader.levels[level]
    if xywh is not None and not (isinstance(xywh, Sequence) and [isinstance(n, Integral) for n in xywh] == [True] * 4):
        raise UsageError(f"`region` must be four whole numbers: left, top, width, height in px; got {xywh!r}")
    x, y, w, h = (0, 0, width, height) if xywh is None else xywh
    if x < 0 or y < 0 or w < 1 or h < 1 or x + w > width or y + h > height:
        raise UsageError(
            f"{reader.name}: region {x},{y},{w},{h} (left, top, width, height) does not lie in the {width} x {height} "
            f"px of level {level}"
        )
    return Region(reader, level, y, x, h, w)


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size and time stamp of the file ``path``; of a folder: number of its files, their sizes and the newest stamp."""
    about = path.stat()
    if not path.is_dir():
        return about.st_size, about.st_mtime_ns
    files = [each.stat() for each in path.rglob("*") if each.is_file()]
    return len(files), sum(one.st_size for one in files), max((one.st_mtime_ns for one in files), default=0)


@dataclass
class ArrayReader:
    """Regions of ``image_hwc``, uint8 RGB (h, w, 3)."""

    image_hwc: Pixels
    name: str = "image"
    pixel_size: PixelSize = UNKNOWN
    notes: tuple[str, ...] = ()
    stamp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.levels: tuple[tuple[int, int], ...] = ((self.image_hwc.shape[0], self.image_hwc.shape[1]),)
        self.stamp = self.stamp or (zlib.crc32(np.ascontiguousarray(self.image_hwc).data),)

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """As ``RegionReader.read``."""
        assert level == 0
        return self.image_hwc[y : y + h, x : x + w]

    def close(self) -> None:
        """Do nothing."""
