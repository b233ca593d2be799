"""Bands of one large image, computed by the workers of a cluster; see ``engine`` for what is in flight, and failures.

Workers open the image by its path and write a band's probabilities to a file in OUT/unfinished. Its name and the flags
of blank tiles travel back; this process appends the files in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cells.tiling import Tile
from cellseg_deploy.cluster.engine import ClusterEngine, ClusterOutcomes, reading_of_a_worker
from cellseg_deploy.cluster.worker import do_band
from cellseg_deploy.errors import OutputError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.run.record import Inputs, RunOptions, RunSetup
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.counting import BandsElsewhere, SlideElsewhere
from cellseg_deploy.slides.network import Band
from cellseg_deploy.slides.region import Region
from cellseg_deploy.threads import plan


@dataclass(frozen=True)
class _BandTask:
    arguments: tuple[Any, ...]
    size: int
    """Bytes of its probabilities."""

    def nbytes(self) -> int:
        return self.size


class _BandOutcomes(ClusterOutcomes):
    def _work(self, index: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return do_band, self._tasks[index].arguments

    def _finished(self, answer: dict[str, Any]) -> Any:
        path = self._out / answer["rows"]
        with reading_of_a_worker():
            size = path.stat().st_size
        if size != answer["size"]:
            raise OutputError(f"{path}: a worker's file is incomplete; check free space and the file system")
        return Band(path, answer["blank"])


def on_cluster(engine: ClusterEngine, image: Path, reading: ReadOptions) -> SlideElsewhere:
    """Return what computes the bands of ``image``, read with ``reading``, on the workers of ``engine``."""

    def of_region(work: Path, segmenter: Segmenter, region: Region, contrast: int) -> BandsElsewhere:
        options = RunOptions(save=(), reading=reading)
        setup = RunSetup(segmenter, work, options, plan(1), Inputs((), ()))
        order = engine.order(setup)
        xywh = (region.x, region.y, region.width, region.height)
        about = (str(image.absolute()), region.level, xywh, tuple(region.reader.stamp))
        row_values = len(segmenter.backend.spec.channels)

        def bands(scale: float, todo: Sequence[Tile]) -> Iterator[Band]:
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
            with _BandOutcomes(engine.client, engine.address, work, order, tasks) as outcomes:
                for outcome in outcomes:
                    band: Any = outcome.get()
                    yield band

        return bands

    return of_region
