"""What a run costs on machines that are not here: a model of few numbers, each measured or named as an assumption.

Images:   seconds = largest of   images x (a + b x tiles) / workers      the workers
                                 images x (c + 3 x fsync)                scheduler and the process that starts the run
                                 bytes / bytes per second                storage, shared by all

A slide:  seconds = largest of   ceil(bands / workers) x tiles of a band x d      the workers
                                 bytes / bytes per second                         storage
                    + tiles x e                                 labels and tables, in the process that starts the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRIVER = "scheduler and journal"
LABELS = "labels and tables, in one process"
SYNCS_PER_IMAGE = 3
"""Calls of fsync by the process that starts the run: for the folder of each of two files, and the journal."""
STORAGE = "storage"
_TIMES_STORED = 6
"""How often the probabilities of a slide pass through storage: a worker writes a band, the process that starts the run
copies it, and reads it for each of its two passes and for the share of foreground."""
NODES = "CPU nodes"
GPUS = "GPUs"
CORES = "CPU cores at the GPUs"


@dataclass(frozen=True)
class Line:
    """``seconds = constant + per_tile * tiles``, neither negative."""

    constant: float
    per_tile: float

    def __call__(self, tiles: float) -> float:
        """Return the seconds for an image of ``tiles``."""
        return self.constant + self.per_tile * tiles


@dataclass(frozen=True)
class Sample:
    """Measured images of one size, the mean of each. ``seconds``: of the run on all cores; ``cpu_seconds``: of all
    stages but the network, summed over threads; ``read_bytes``, ``written_bytes``: files."""

    pixels: int
    tiles: int
    seconds: float
    cpu_seconds: float
    read_bytes: float
    written_bytes: float


@dataclass(frozen=True)
class SlideSample:
    """A streamed image that was measured. ``band_seconds``: for all its bands on all cores; ``core_seconds``: without
    the network; ``label_seconds``: for labels, tables and files, on one core; ``stored_bytes``: the probabilities."""

    pixels: int
    tiles: int
    band_seconds: float
    core_seconds: float
    label_seconds: float
    stored_bytes: int


@dataclass(frozen=True)
class SlideCosts:
    """Per tile: the sums of ``SlideSample`` over samples, divided by the tiles."""

    band_seconds: float
    core_seconds: float
    label_seconds: float
    stored_bytes: float

    @classmethod
    def of(cls, samples: Sequence[SlideSample]) -> SlideCosts:
        """Divide the sums of ``samples``."""
        tiles = sum(sample.tiles for sample in samples)
        return cls(
            sum(sample.band_seconds for sample in samples) / tiles,
            sum(sample.core_seconds for sample in samples) / tiles,
            sum(sample.label_seconds for sample in samples) / tiles,
            sum(sample.stored_bytes for sample in samples) / tiles,
        )


@dataclass(frozen=True)
class Costs:
    """Fitted to samples. ``node``: seconds of an image on a machine like this one; ``cores``: core seconds without the
    network; ``slide``: of a streamed image. Bytes are per pixel. ``images_per_second``: most that scheduler and this
    process handle with their files in memory; ``sync_seconds``: one fsync on disk."""

    node: Line
    cores: Line
    slide: SlideCosts
    read_bytes: float
    written_bytes: float
    images_per_second: float
    sync_seconds: float

    @property
    def recorded_per_second(self) -> float:
        """Most images per second that scheduler and this process handle with their files on disk."""
        return 1 / (1 / self.images_per_second + SYNCS_PER_IMAGE * self.sync_seconds)

    @classmethod
    def fitted(
        cls, samples: Sequence[Sample], slides: Sequence[SlideSample], images_per_second: float, sync_seconds: float
    ) -> Costs:
        """Fit the lines to ``samples`` of two sizes or more; ``slides``: at least one."""
        pixels = sum(sample.pixels for sample in samples)
        return cls(
            line_through([(sample.tiles, sample.seconds) for sample in samples]),
            line_through([(sample.tiles, sample.cpu_seconds) for sample in samples]),
            SlideCosts.of(slides),
            sum(sample.read_bytes for sample in samples) / pixels,
            sum(sample.written_bytes for sample in samples) / pixels,
            images_per_second,
            sync_seconds,
        )


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here. ``gpu_tiles_per_second``: of one GPU; ``cores_per_gpu``: as fast as these;
    ``storage_bytes_per_second``: of all machines together."""

    gpu_tiles_per_second: float = 500.0
    cores_per_gpu: int = 8
    storage_bytes_per_second: float = 1e9


@dataclass(frozen=True)
class Work:
    """``images`` of ``pixels`` and ``tiles`` each. ``bands``: of a slide, one image that all workers share; else 0."""

    name: str
    images: int
    pixels: int
    tiles: int
    bands: int = 0


@dataclass(frozen=True)
class Prediction:
    """``seconds``: of the whole run. ``limits``: seconds that each part would take alone, the longest first."""

    work: Work
    workers: int
    on: str
    seconds: float
    limits: tuple[tuple[str, float], ...]


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line with non-negative coefficients to (tiles, seconds), relative errors weighing the same."""
    from scipy.optimize import nnls

    tiles, seconds = (np.array(values, np.float64) for values in zip(*points, strict=True))
    (constant, per_tile), _ = nnls(np.stack([1 / seconds, tiles / seconds], axis=1), np.ones(len(seconds)))
    return Line(float(constant), float(per_tile))


def predict(costs: Costs, assumed: Assumptions, work: Work, workers: int, on: str) -> Prediction:
    """Predict ``work`` on ``workers`` machines like this one (``on=NODES``), or on GPUs (``on=GPUS``)."""
    if work.bands:
        return _of_slide(costs, assumed, work, workers, on)
    at_once = min(workers, work.images)
    limits = {
        DRIVER: work.images / costs.recorded_per_second,
        STORAGE: work.images
        * work.pixels
        * (costs.read_bytes + costs.written_bytes)
        / assumed.storage_bytes_per_second,
    }
    if on == NODES:
        limits[NODES] = work.images * costs.node(work.tiles) / at_once
    else:
        limits[GPUS] = work.images * work.tiles / assumed.gpu_tiles_per_second / at_once
        limits[CORES] = work.images * costs.cores(work.tiles) / (at_once * assumed.cores_per_gpu)
    return Prediction(work, workers, on, max(limits.values()), _longest_first(limits))


def _of_slide(costs: Costs, assumed: Assumptions, work: Work, workers: int, on: str) -> Prediction:
    slide = costs.slide
    tiles = -(-work.bands // workers) * work.tiles / work.bands  # of the worker that has most to do
    stored = _TIMES_STORED * work.tiles * slide.stored_bytes
    limits = {
        STORAGE: (work.pixels * (costs.read_bytes + costs.written_bytes) + stored) / assumed.storage_bytes_per_second
    }
    if on == NODES:
        limits[NODES] = tiles * slide.band_seconds
    else:
        limits[GPUS] = tiles / assumed.gpu_tiles_per_second
        limits[CORES] = tiles * slide.core_seconds / assumed.cores_per_gpu
    labels = work.tiles * slide.label_seconds
    return Prediction(work, workers, on, max(limits.values()) + labels, _longest_first(limits | {LABELS: labels}))


def _longest_first(limits: dict[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(limits.items(), key=lambda item: -item[1]))


def seconds_of_sleepers(images: int, workers: int, seconds: float, images_per_second: float) -> float:
    """Predict a run whose work is to sleep for ``seconds`` per image.

    Either the workers sleep all the time, and the results of the last wave are recorded after that; or this process
    records all the time, once the first image is done.
    """
    waves = -(-images // workers)
    return max(waves * seconds + min(workers, images) / images_per_second, seconds + images / images_per_second)


def duration(seconds: float) -> str:
    """Say ``seconds`` in the unit that people would use."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
