"""Resize an image that is read row by row, with the bytes that ``image_tiles.resize`` gives for the whole image.

OpenCV cannot resize a part of an image on the whole image's grid, so its two algorithms are written out here, in its
order of operations: *area* (sums of 32-bit floats, columns first, then rows) and *linear* (11-bit fixed point). Area
with a whole number of pixels per pixel is computed by OpenCV itself, part by part. A test compares the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
ReadRows = Callable[[int, int], Image]
"""First row and row after the last to these rows of the image, uint8 RGB (rows, w, 3)."""

_LEAST = 1e-3  # OpenCV ignores smaller parts of a pixel
_BITS = 2048  # fixed point of OpenCV's linear interpolation


def scaled_size(image_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Size (h, w) of an image of ``image_hw`` at ``scale`` output px per input px, as of ``image_tiles.resize``."""
    height, width = (side if scale == 1 else max(1, round(side * scale)) for side in image_hw)
    return height, width


@dataclass(frozen=True)
class RowResizer:
    """The rows of an image of ``image_hw`` px, read by ``read``, at ``scale`` output px per input px."""

    read: ReadRows
    image_hw: tuple[int, int]
    scale: float

    @property
    def out_hw(self) -> tuple[int, int]:
        """Size of the result."""
        return scaled_size(self.image_hw, self.scale)

    def rows(self, start: int, stop: int) -> Image:
        """Rows ``start`` to before ``stop`` of the resized image, uint8 (stop - start, w', 3)."""
        if self.out_hw == self.image_hw:
            return self.read(start, stop)
        if self.scale > 1:
            return self._linear(start, stop)
        step_y, step_x = (n / n_out for n, n_out in zip(self.image_hw, self.out_hw, strict=True))
        if step_y == round(step_y) and step_x == round(step_x):
            import cv2

            image = self.read(start * round(step_y), stop * round(step_y))
            size = (self.out_hw[1], stop - start)
            return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        return self._area(start, stop)

    def _area(self, start: int, stop: int) -> Image:
        import cv2

        parts = [area_weights(row, self.image_hw[0], self.out_hw[0]) for row in range(start, stop)]
        first = parts[0][0]
        image = self.read(first, parts[-1][0] + len(parts[-1][1])).astype(np.float32)
        across = np.asarray(cv2.resize(image, (self.out_hw[1], len(image)), interpolation=cv2.INTER_AREA))
        out = np.empty((stop - start, self.out_hw[1], 3), np.uint8)
        for row, (above, weights) in zip(out, parts, strict=True):
            total = across[above - first] * weights[0]
            for index, weight in enumerate(weights[1:], 1):
                total += across[above - first + index] * weight
            row[...] = np.clip(np.rint(total), 0, 255)
        return out

    def _linear(self, start: int, stop: int) -> Image:
        (height, width), (out_h, out_w) = self.image_hw, self.out_hw
        left, weight = _positions(np.arange(out_w), width, out_w)
        weight[(left < 0) | (left >= width - 1)] = 0
        left = np.clip(left, 0, width - 1)
        above, down = _positions(np.arange(start, stop), height, out_h)
        upper, lower = np.clip(above, 0, height - 1), np.clip(above + 1, 0, height - 1)
        first = int(upper[0])
        image = self.read(first, int(lower[-1]) + 1).astype(np.int32)
        near, far = (_fixed(part)[np.newaxis, :, np.newaxis] for part in (1 - weight, weight))
        across = image[:, left] * near
        across += image[:, np.minimum(left + 1, width - 1)] * far
        across >>= 4
        near, far = (_fixed(part)[:, np.newaxis, np.newaxis] for part in (1 - down, down))
        total = (across[upper - first] * near) >> 16
        total += (across[lower - first] * far) >> 16
        return np.asarray((total + 2) >> 2, np.uint8)


def area_weights(row: int, n: int, n_out: int) -> tuple[int, list[np.float32]]:
    """First of the ``n`` rows that ``row`` of ``n_out`` covers, and the weight of each row from there on."""
    step = 1 / (n_out / n)
    begin = row * step
    end = begin + step
    size = min(step, n - begin)
    last = min(math.floor(end), n - 1)
    whole = min(math.ceil(begin), last)
    weights = [np.float32(1 / size)] * (last - whole)
    if whole - begin > _LEAST:
        weights.insert(0, np.float32((whole - begin) / size))
        whole -= 1
    if end - last > _LEAST:
        weights.append(np.float32(min(end - last, 1.0, size) / size))
    return whole, weights


def _positions(at: npt.NDArray[np.int64], n: int, n_out: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Index among ``n`` before each position ``at`` among ``n_out``, and the weight of the next one."""
    exact = ((at + 0.5) * (1 / (n_out / n)) - 0.5).astype(np.float32)
    before = np.floor(exact).astype(np.int64)
    return before, exact - before.astype(np.float32)


def _fixed(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    return np.asarray(np.rint(weight * np.float32(_BITS)), np.int32)
