"""Bands of one large image, computed by the workers of a cluster; see ``outcomes`` for what is in flight, and failures.

Workers open the image by its path and write a band's probabilities to a temporary file in OUT. Its name and the flags
of blank tiles travel back; this process appends the files in order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cells.tiling import Tile
from cellseg_deploy.cluster.outcomes import ClusterOutcomes, Workers, reading_of_a_worker
from cellseg_deploy.cluster.work_order import WorkOrder
from cellseg_deploy.cluster.worker import do_band
from cellseg_deploy.errors import OutputError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run.record import Inputs, RunOptions, RunSetup
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.counting import BandsElsewhere, SlideElsewhere
from cellseg_deploy.slides.network import Band
from cellseg_deploy.slides.region import Region
from cellseg_deploy.threads import plan

_TIMES_HELD = 3
"""The probabilities of a band on a worker: with the context of its tiles, without it, and the resized pixels."""


@dataclass(frozen=True)
class _BandTask:
    arguments: tuple[Any, ...]
    size: int
    """Bytes of its probabilities."""

    def nbytes(self) -> int:
        return _TIMES_HELD * self.size


class _BandOutcomes(ClusterOutcomes[Band]):
    def _work(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return do_band, self._tasks[index].arguments

    def _finished(self, answer: dict[str, Any]) -> Band:
        path = self.out / answer["rows"]
        with reading_of_a_worker():
            size = path.stat().st_size
        if size != answer["size"]:
            raise OutputError(f"{path}: a worker's file is incomplete; check free space and the file system")
        return Band(path, answer["blank"], answer["seconds"])


def of_slide(
    workers: Workers, order_of: Callable[[RunSetup], WorkOrder], image: Path, reading: ReadOptions
) -> SlideElsewhere:
    """Return what computes the bands of ``image``, read with ``reading``, for ``slides.run.run_slide``."""

    def of_region(out: Path, segmenter: Segmenter, region: Region, contrast: int) -> BandsElsewhere:
        options = RunOptions(save=(), reading=reading)
        order = order_of(RunSetup(segmenter, out, options, plan(1), Inputs((), ())))
        return _bands(image, segmenter, region, contrast, lambda tasks: _BandOutcomes(workers, out, order, tasks))

    return of_region


def of_run(run: ClusterOutcomes[Any], image: Path) -> SlideElsewhere:
    """Return what computes the bands of ``image``, one of a ``run`` whose other images are in flight."""

    def of_region(_: Path, segmenter: Segmenter, region: Region, contrast: int) -> BandsElsewhere:
        def outcomes(tasks: Sequence[_BandTask]) -> _BandOutcomes:
            return _BandOutcomes(run.workers, run.out, run.order, tasks, beside=run)

        return _bands(image, segmenter, region, contrast, outcomes)

    return of_region


def _bands(
    image: Path,
    segmenter: Segmenter,
    region: Region,
    contrast: int,
    outcomes_of: Callable[[Sequence[_BandTask]], _BandOutcomes],
) -> BandsElsewhere:
    xywh = (region.x, region.y, region.width, region.height)
    about = (str(image.absolute()), region.level, xywh, tuple(region.reader.stamp))
    row_values = len(segmenter.backend.spec.channels)

    def bands(scale: float, todo: Sequence[Tile]) -> Generator[Band, None, None]:
        width = scaled_size(region.hw, scale)[1]
        tasks = [
            _BandTask(
                (*about, scale, contrast, band.write[0].start),
                4 * row_values * width * (band.write[0].stop - band.write[0].start),
            )
            for band in todo
        ]
        if not tasks:
            return
        with outcomes_of(tasks) as outcomes:
            for outcome in outcomes:
                yield outcome.get()

    return bands
