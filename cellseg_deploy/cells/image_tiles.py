"""Tiles of one image at model scale for a network, and a clock for the stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells import tiling
from cellseg_deploy.errors import DataError, ModelError

Tiles = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
# A sigmoid in half precision may miss 0 and 1 by rounding; logits miss them by far more.
_SLACK = 1e-2
_MAX_MODEL_PIXELS = 400_000_000


class StageClock:
    """Wall seconds per stage, summed over calls and threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as part of ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage``."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class ImageTiles:
    """One image at model scale, cut into tiles, and the probabilities stitched from the network's answers.

    ``out_khw``: float32 (K, h, w) of the image, defined once every tile is stitched. ``len()``: number of tiles.
    """

    def __init__(
        self, scaled_hwc: npt.NDArray[np.uint8], *, tile_size: int, halo: int, n_channels: int, clock: StageClock
    ) -> None:
        self.clock = clock
        with clock("tile"):
            self._plan = tiling.plan((scaled_hwc.shape[0], scaled_hwc.shape[1]), tile_size, halo)
            self._padded_hwc = tiling.pad(scaled_hwc, self._plan)
            self.out_khw = np.empty((n_channels, *self._plan.image_hw), np.float32)

    def __len__(self) -> int:
        return len(self._plan)

    def cut(self, start: int, most: int) -> Tiles:
        """Tiles ``start``, ``start + 1``, ..., at most ``most`` of them: uint8 (n, S, S, 3)."""
        with self.clock("tile"):
            size = self._plan.tile_size
            tiles_nhwc = np.empty((min(most, len(self) - start), size, size, self._padded_hwc.shape[2]), np.uint8)
            tiling.cut_into(tiles_nhwc, self._padded_hwc, self._plan, start)
            return tiles_nhwc

    def stitch(self, start: int, probabilities_nkhw: Probabilities) -> None:
        """Write the probabilities (n, K, S, S) of tiles ``start``, ``start + 1``, ... to their place in ``out_khw``."""
        with self.clock("tile"):
            tiling.stitch_into(self.out_khw, self._plan, start, probabilities_nkhw)


def checked_probabilities(probabilities: Probabilities) -> Probabilities:
    """Clip rounding errors of ``probabilities`` at 0 and 1 in place. Raises ``ModelError`` for larger deviations."""
    low, high = float(probabilities.min()), float(probabilities.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ModelError(
            f"the network answered with values from {low:g} to {high:g} where probabilities were expected; "
            "was the model exported without its sigmoid? Export it again with cellseg-export"
        )
    return np.clip(probabilities, 0, 1, out=probabilities)


def resize(image_hwc: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """Resize ``image_hwc`` (h, w, 3) by ``scale`` output px per input px, to at least 1 x 1: area down, bilinear up.

    The same interpolation as in training. Raises ``DataError`` if the result would be too large.
    """
    import cv2

    if scale == 1:
        return image_hwc
    height, width = (max(1, round(side * scale)) for side in image_hwc.shape[:2])
    if height * width > _MAX_MODEL_PIXELS:
        raise DataError(
            f"at scale {scale:g} the image becomes {width} x {height} px, more than {_MAX_MODEL_PIXELS} pixels; "
            "check `scale` or `cell_diameter_px`"
        )
    if (height, width) == image_hwc.shape[:2]:
        return image_hwc
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_hwc, (width, height), interpolation=method), np.uint8)


def resize_mask(mask: npt.NDArray[np.bool_], hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Resize ``mask`` (h, w) to ``hw``, nearest neighbour."""
    import cv2

    return np.asarray(cv2.resize(mask.astype(np.uint8), hw[::-1], interpolation=cv2.INTER_NEAREST)) > 0


def foreground_share(
    foreground: npt.NDArray[np.float32], threshold: float, field: npt.NDArray[np.bool_] | None = None
) -> float:
    """Share of ``foreground`` (h', w') that is ``threshold`` or more; with ``field`` (h, w), of the pixels in it."""
    if field is not None:  # around it is its mirror image
        foreground = foreground[resize_mask(field, (foreground.shape[0], foreground.shape[1]))]
    return float(np.count_nonzero(foreground >= threshold) / foreground.size)
