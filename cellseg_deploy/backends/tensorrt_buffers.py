"""Assign tiles to calls, and compute buffer sizes: arithmetic only, no device, no TensorRT.

An engine takes batches of ``min`` to ``max`` tiles, both fixed when it is built. More tiles are split into full batches
and a last partial one; a partial batch below ``min`` is padded with black tiles whose results are dropped:

    21 tiles, min 1, max 8     8 8 5             21 tiles, min 8, max 8     8 8 5+3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

MAX_BATCH = 8
"""Default largest batch of an engine: the number of tiles ``cellseg-infer`` passes to a network in one call."""


@dataclass(frozen=True)
class BatchProfile:
    """Tiles per call that an engine is built for: minimum, the number it is tuned for, and maximum.

    With ``min == max`` every call runs exactly the same kernels, however many tiles are left.
    """

    min: int = 1
    opt: int = MAX_BATCH
    max: int = MAX_BATCH

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"batch sizes must be 1 <= min <= opt <= max, got min {self.min}, opt {self.opt}, max {self.max}"
            )

    def __str__(self) -> str:
        return f"{self.min}/{self.opt}/{self.max}"

    def input_shapes(self, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return shapes (N, S, S, 3) of the tiles for min, opt and max, for an optimisation profile."""
        tail = (spec.tile_size, spec.tile_size, 3)
        return (self.min, *tail), (self.opt, *tail), (self.max, *tail)


@dataclass(frozen=True)
class TensorPlan:
    """One input or output of an engine: ``shape`` at the largest batch, batch first."""

    name: str
    shape: tuple[int, ...]
    dtype: npt.DTypeLike

    @property
    def row_nbytes(self) -> int:
        """Bytes per tile."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes at the largest batch, allocated once on the host and once on the device."""
        return self.nbytes_of(self.shape[0])

    def nbytes_of(self, batch: int) -> int:
        """Return the bytes of the first ``batch`` tiles, which are at the start of the buffer."""
        return batch * self.row_nbytes

    def shape_of(self, batch: int) -> tuple[int, ...]:
        """Return the shape with ``batch`` tiles."""
        return (batch, *self.shape[1:])


@dataclass(frozen=True)
class BufferPlan:
    """Buffers of one engine: raw tiles in, probabilities out."""

    tiles: TensorPlan
    probabilities: TensorPlan

    @property
    def nbytes(self) -> int:
        """Bytes of both, which is also the size of pinned host memory."""
        return self.tiles.nbytes + self.probabilities.nbytes


def plan_buffers(spec: ModelSpec, max_batch: int) -> BufferPlan:
    """Plan tiles uint8 (N, S, S, 3) and probabilities float32 (N, K, S, S) for ``N = max_batch``."""
    size = spec.tile_size
    return BufferPlan(
        TensorPlan(INPUT_NAME, (max_batch, size, size, 3), np.uint8),
        TensorPlan(OUTPUT_NAME, (max_batch, len(spec.channels), size, size), np.float32),
    )


@dataclass(frozen=True)
class Call:
    """One engine call: tiles ``start`` to ``stop`` of those passed, run as a batch of ``batch``."""

    start: int
    stop: int
    batch: int

    @property
    def n(self) -> int:
        """Number of tiles whose results are kept."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Slice of these tiles among those passed."""
        return slice(self.start, self.stop)


def plan_calls(n: int, profile: BatchProfile) -> Iterator[Call]:
    """Yield calls that run ``n`` tiles: each tile in exactly one call, in order, each batch within ``profile``."""
    for start in range(0, n, profile.max):
        stop = min(start + profile.max, n)
        yield Call(start, stop, max(stop - start, profile.min))
