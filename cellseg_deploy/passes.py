"""One image on its way through the network, in steps that whoever drives them may mix with those of other images.

What happens to an image is written once, as a generator::

    resize, cut --> yield TiledPass  ...tiles through the network...  --> label --> (yield another pass) --> return

Work on the CPU stands in the generator; where it needs the network it yields a ``TiledPass`` and goes on when all of
its tiles were answered. ``run_alone`` drives the steps of one image; ``stream.Stream`` those of many at a time, with
tiles of several images in one batch. An error of the network is raised in the generator, at the ``yield``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cellseg_deploy import tiling

T = TypeVar("T")
Predict = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""``Backend.predict``: tiles uint8 (N, S, S, 3) to probabilities float32 (N, K, S, S)."""


class StageClock:
    """Wall seconds by stage, summed over calls and over the threads that take part."""

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
        """Count ``seconds`` more for ``stage``."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


class TiledPass:
    """One image at model scale, cut into tiles, and the probabilities that its answers are put together to.

    ``out_khw``: float32 (K, h, w) of the image, defined once every tile was stitched. ``len()``: number of tiles.
    Different tiles may be cut and stitched by different threads at the same time.
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

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Shape (S, S, 3) of each tile."""
        return (self._plan.tile_size, self._plan.tile_size, self._padded_hwc.shape[2])

    def cut_into(self, batch_nhwc: npt.NDArray[np.uint8], start: int) -> None:
        """Fill ``batch_nhwc`` (n, S, S, 3) with tiles ``start``, ``start + 1``, ..."""
        with self.clock("tile"):
            tiling.cut_into(batch_nhwc, self._padded_hwc, self._plan, start)

    def stitch(self, start: int, probabilities_nkhw: npt.NDArray[np.float32]) -> None:
        """Write the answers (n, K, S, S) for tiles ``start``, ``start + 1``, ... to their place in ``out_khw``."""
        with self.clock("tile"):
            tiling.stitch_into(self.out_khw, self._plan, start, probabilities_nkhw)


Steps = Generator[TiledPass, None, T]
"""The steps of one image, which end in a T."""


def run_alone(steps: Steps[T], predict: Predict, batch_size: int) -> T:
    """Drive the steps of one image to their end, ``batch_size`` tiles a call of ``predict``; gives what they return."""
    with closing(steps):
        while True:
            try:
                work = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            for start in range(0, len(work), batch_size):
                batch_nhwc = np.empty((min(batch_size, len(work) - start), *work.tile_shape), np.uint8)
                work.cut_into(batch_nhwc, start)
                with work.clock("network"):
                    answers = predict(batch_nhwc)
                work.stitch(start, answers)
                del batch_nhwc, answers
            del work  # the next step is labelling, which wants the memory
