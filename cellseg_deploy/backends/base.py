"""The contract that every inference engine fulfils, and the checks they share.

A backend takes uint8 tiles on the host and returns float32 probabilities on the host, synchronised. Colour
normalisation and the sigmoid are inside the graph, so nothing above a backend knows how the network was trained.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.models.spec import ModelSpec


class Backend(ABC):
    """One opened network on one device.

    ``name``: engine name as in ``EngineOptions.backend``. ``device``: the device actually in use (``cpu``, ``cuda:0``).
    ``precision``: arithmetic of the form (``fp32``, ``fp16``, ``mixed``, ``bf16``, ``int8``). ``batch_step``: tiles
    that cost as much as one, if the engine pads each call to a multiple of them. ``given``: the file that was
    requested; ``path``: the file that was opened, which differs if ``auto`` chose another form of the network.
    ``verified``: whether it passed the parity gate here; ``choice``: why it was chosen. ``is_remote``: a server runs
    it, which may be back at the next call.
    """

    name: str
    device: str
    precision: str
    spec: ModelSpec
    verified: bool = False
    choice: str = ""
    given: Path | None = None
    path: Path | None = None
    batch_step: int = 1
    is_remote: bool = False
    _one_call: threading.Lock
    _process: int
    _is_closed: bool

    def __new__(cls, *_: object, **__: object) -> Self:
        """Initialise the base here, so that subclasses need not call ``super().__init__``."""
        backend = super().__new__(cls)
        backend._one_call, backend._process, backend._is_closed = threading.Lock(), os.getpid(), False
        return backend

    def predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return probabilities (N, K, H, W) float32 in [0, 1] for ``tiles_nhwc`` (N, H, W, 3) uint8 RGB.

        Thread-safe: concurrent calls of one backend run one after the other, and each gets its own result.

        Raises ``UsageError`` if the tiles do not fit the model's input (a programming error upstream), if the backend
        is closed, or in a forked process; ``DataError`` if the network returns NaN or infinity: never passed on as
        "no cells".
        """
        size = self.spec.tile_size
        if tiles_nhwc.dtype != np.uint8 or tiles_nhwc.ndim != 4 or tiles_nhwc.shape[1:] != (size, size, 3):
            raise UsageError(f"tiles must be uint8 (N, {size}, {size}, 3), got {tiles_nhwc.dtype} {tiles_nhwc.shape}")
        if len(tiles_nhwc) == 0:
            raise UsageError("got an empty batch of tiles; expected at least one")
        self._check_process()
        with self._one_call:
            self.check_open()
            probabilities = self._predict(np.ascontiguousarray(tiles_nhwc))
        expected = (len(tiles_nhwc), len(self.spec.channels), size, size)
        if probabilities.shape != expected:
            raise DataError(f"network answered with shape {probabilities.shape}, expected {expected}")
        if not np.isfinite(probabilities).all():
            raise DataError("network answered with NaN or infinity; the model or its precision is broken")
        return probabilities

    @abstractmethod
    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run the network on checked, contiguous tiles."""

    def close(self) -> None:
        """Release the engine once a running call has ended; the backend is unusable afterwards. May be repeated."""
        if os.getpid() != self._process:
            return  # the engine belongs to the parent process
        with self._one_call:
            if not self._is_closed:
                self._is_closed = True
                self._close()

    def _close(self) -> None:  # noqa: B027  (most engines free themselves)
        """Release what the subclass holds; called once, while no call is running."""

    def check_open(self) -> None:
        """Raise ``UsageError`` if the backend was closed."""
        if self._is_closed:
            raise UsageError(f"this {self.name} engine was closed; open the model again")

    def _check_process(self) -> None:
        """Raise in a forked process: engine threads are not copied by a fork, so a call would wait for them forever."""
        if os.getpid() != self._process:
            raise UsageError(
                f"this {self.name} engine was opened in process {self._process} and cannot be used in its fork "
                f"{os.getpid()}; open the model in each process (multiprocessing: start method 'spawn' or 'forkserver')"
            )

    def describe(self) -> dict[str, Any]:
        """Return versions and settings worth recording in run.json."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
