"""Tiles of large images for a viewer that pans and zooms, in the layout of Deep Zoom (DZI), without overlap.

Level 0 is 1 x 1 px, each level is twice as large as the one before, and the last is the image.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs import picture_file

TILE_SIZE = 512
Pixels = npt.NDArray[np.uint8]


class Pyramid:
    """Levels of one image, uint8 RGB (h, w, 3); smaller levels are computed when first wanted."""

    def __init__(self, pixels_hwc: Pixels) -> None:
        self.height, self.width = int(pixels_hwc.shape[0]), int(pixels_hwc.shape[1])
        self.top = max(self.height - 1, self.width - 1).bit_length()
        self._levels = {self.top: pixels_hwc}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that all levels take."""
        return self.height * self.width * 4

    def level(self, number: int) -> Pixels:
        """Pixels of level ``number``, the mean of 2 x 2 px of the next. Raises ``UsageError`` for an unknown level."""
        if not 0 <= number <= self.top:
            raise UsageError(f"there is no level {number}; expected 0 to {self.top}")
        with self._lock:
            known = min(level for level in self._levels if level >= number)
            while known > number:
                import cv2

                pixels = self._levels[known]
                half = (-(-pixels.shape[1] // 2), -(-pixels.shape[0] // 2))
                known -= 1
                self._levels[known] = np.asarray(cv2.resize(pixels, half, interpolation=cv2.INTER_AREA), np.uint8)
            return self._levels[number]

    def tile(self, level: int, column: int, row: int) -> bytes:
        """JPEG of a tile. Raises ``UsageError`` for one outside of the image."""
        pixels = self.level(level)
        top, left = row * TILE_SIZE, column * TILE_SIZE
        if not (0 <= top < pixels.shape[0] and 0 <= left < pixels.shape[1]):
            raise UsageError(f"there is no tile {column}, {row} on level {level}")
        return picture_file.encode(np.ascontiguousarray(pixels[top : top + TILE_SIZE, left : left + TILE_SIZE]))

    def thumbnail(self, longest_px: int) -> bytes:
        """JPEG of the smallest level that is at least ``longest_px`` long, or of the image."""
        number = min(self.top, max(0, (longest_px - 1).bit_length()))
        return picture_file.encode(np.ascontiguousarray(self.level(number)))


class PyramidCache:
    """The pyramids used last, up to ``most_bytes``; always the last one, however large. May be called by any thread."""

    def __init__(self, load: Callable[[str], Pixels], most_bytes: int = 1 << 30) -> None:
        self._load, self._most = load, most_bytes
        self._kept: OrderedDict[str, Pyramid] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, key: str) -> Pyramid:
        with self._lock:  # a second request for an image waits until the first has decoded it
            pyramid = self._kept.pop(key, None) or Pyramid(self._load(key))
            self._kept[key] = pyramid
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > self._most:
                self._kept.popitem(last=False)
            return pyramid
