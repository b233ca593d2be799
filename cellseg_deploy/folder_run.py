"""The folder run: many images in, labels, pictures and tables out; one bad image never stops it.

OUT/labels/NAME.tif      label image                  OUT/cells.csv    a row a cell
OUT/overlays/NAME.jpg    outlines and count           OUT/images.csv   a row an image, failed ones too
                                                      OUT/run.json     what ran, with what, how long

Images overlap (see ``stream``): helper threads read, label and encode, the network takes tiles of several images at a
time. What is written is written by the caller's thread, image by image in the order of the images, so that what lies in
the folder at any time is what a run over fewer images would have left.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.counting import counted
from cellseg_deploy.errors import DataError, NothingToDoError, concerns_one_image
from cellseg_deploy.images import FoundImage, declared_pixels, read_image
from cellseg_deploy.measure import COLUMNS as CELL_COLUMNS
from cellseg_deploy.outputs import tables
from cellseg_deploy.outputs.atomic import atomic_file, make_folder, write_bytes, writing
from cellseg_deploy.outputs.folder import RUN_JSON, check_apart, output_folder
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.outputs.interrupts import deferred_signals
from cellseg_deploy.outputs.names import output_names
from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.passes import StageClock, Steps
from cellseg_deploy.pipeline import Segmenter
from cellseg_deploy.run_record import IMAGE_COLUMNS, ImageResult, RunOptions, RunSummary, run_json
from cellseg_deploy.schedule import Job
from cellseg_deploy.stream import Outcome
from cellseg_deploy.threads import ThreadPlan

__all__ = ["ImageResult", "RunOptions", "RunSummary", "run_folder"]

CELLS_CSV, IMAGES_CSV = "cells.csv", "images.csv"
COUNTED = "counted"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Finished:
    """One image, ready to be written. ``files``: place in the output folder -> content. ``cell_rows``: CSV text."""

    result: ImageResult
    files: dict[str, bytes]
    cell_rows: bytes


def run_folder(
    segmenter: Segmenter,
    images: Sequence[FoundImage],
    out: Path,
    *,
    options: RunOptions | None = None,
    threads: ThreadPlan | None = None,
    on_result: Callable[[ImageResult], None] | None = None,
) -> RunSummary:
    """Segment ``images`` into the folder ``out``; ``on_result`` is told of each image, in order.

    An image that cannot be read, or fails in any way of its own, is recorded and the run goes on. Interrupted
    (KeyboardInterrupt), or stopped by an error that concerns the whole run or by one of ``on_result``, the tables of
    what is done are still written before the exception goes on. ``threads``: see ``threads.plan``; neither they nor
    the order of the images change a result.

    Raises ``NothingToDoError`` without an image, ``OutputError`` / ``OutputInUseError`` for the folder, ``UsageError``
    if ``out`` lies inside the input or the other way round.
    """
    if not images:
        raise NothingToDoError("no image to work on; expected PNG, JPEG or TIFF files")
    options = options or RunOptions()
    threads = threads or thread_plans.plan(device=segmenter.backend.device)
    check_apart([image.path for image in images], out)
    with output_folder(out, overwrite=options.overwrite):
        return _Run(segmenter, images, out, options, threads).run(on_result)


class _Run:
    """State of one run between its first and its last image."""

    def __init__(
        self,
        segmenter: Segmenter,
        images: Sequence[FoundImage],
        out: Path,
        options: RunOptions,
        threads: ThreadPlan,
    ) -> None:
        self.segmenter = segmenter
        self.images = images
        self.out = out
        self.options = options
        self.outputs = chosen_formats(options.save)
        self.names = output_names([image.name for image in images])
        self.results: list[ImageResult] = []
        self.summary = RunSummary(found=len(images), output=out)
        self.started = datetime.datetime.now(datetime.UTC)
        self.clock = time.perf_counter()
        self.threads = threads
        jobs = [Job(partial(self._steps, image), partial(self._bytes_in_flight, image)) for image in images]
        self.stream = segmenter.stream(jobs, threads)

    def run(self, on_result: Callable[[ImageResult], None] | None) -> RunSummary:
        self._write_run_json("running")
        with ExitStack() as stack:
            stack.enter_context(thread_plans.single_threaded_libraries())
            # Left in reverse order: after an interrupt the tables are written first, then threads are waited for.
            stack.enter_context(self.stream)
            cells = stack.enter_context(self._tables_at_end())
            for image, outcome in zip(self.images, self.stream, strict=True):
                result = self._one_image(image, outcome, cells)
                if on_result is not None:
                    on_result(result)
        if self.summary.remaining or len(self.results) != self.summary.found:
            raise RuntimeError(f"{self.summary.found} images found, but {self.summary} was recorded")
        return self.summary

    @contextmanager
    def _tables_at_end(self) -> Iterator[BinaryIO]:
        """The open cells.csv; all tables take their place whether the run ends well, is interrupted or breaks."""
        stopped: BaseException | None = None
        with atomic_file(self.out / CELLS_CSV) as cells:
            with writing(self.out / CELLS_CSV):
                cells.write(tables.csv_rows([["image", *CELL_COLUMNS, COUNTED]]))
            try:
                yield cells
            except BaseException as error:  # of any kind: hours of counting must not go with it; raised again below
                stopped = error
                self.stream.stop()
        rows = [[getattr(result, column) for column in IMAGE_COLUMNS] for result in self.results]
        write_bytes(self.out / IMAGES_CSV, tables.csv_rows([IMAGE_COLUMNS, *rows]))
        self.summary.wall_seconds = time.perf_counter() - self.clock
        self.summary.engine_seconds = self.stream.engine_seconds
        self._write_run_json("finished" if stopped is None else "stopped")
        if stopped is not None:
            raise stopped

    def _write_run_json(self, status: str) -> None:
        record = run_json(self.segmenter, self.options, self.threads, self.summary, status=status, started=self.started)
        write_bytes(self.out / RUN_JSON, record)

    # ---------------------------------------------------------------------------------------------- in helper threads

    def _bytes_in_flight(self, image: FoundImage) -> int:
        return 0 if image.problem else self.segmenter.bytes_in_flight(declared_pixels(image.path))

    def _steps(self, image: FoundImage) -> Steps[_Finished]:
        """Everything about one image but its writing: a function of the image alone."""
        if image.problem:
            raise DataError(image.problem)
        clock = StageClock()
        with clock("read"):
            loaded = read_image(image.path, max_pixels=self.options.max_pixels, bit_depth=self.options.bit_depth)
        segmentation = yield from self.segmenter.steps(loaded.pixels_hwc, clock)
        labels, cells = segmentation.labels, segmentation.table
        with clock("write"):
            counts = counted(cells.boxes, labels.shape, self.options.count_rule)
            columns = {**cells.columns, COUNTED: counts}
            spec = self.segmenter.backend.spec
            found = SegmentedImage(
                image.name,
                loaded.pixels_hwc,
                labels,
                cells,
                counts,
                segmentation.probabilities_khw,
                spec.channels,
                segmentation.scale,
                loaded.pixel_size_um,
                spec.name,
                self.segmenter.task,
            )
            name = self.names[image.name]
            files = {f"{one.folder}/{name}{one.suffix}": one.encode(found) for one in self.outputs if one.folder}
            cell_rows = tables.csv_rows(tables.cell_rows(image.name, columns))
        areas = cells.columns["area_px"]
        result = ImageResult(
            image=image.name,
            status="done",
            cells=segmentation.count,
            counted=int(counts.sum()),
            confluence=segmentation.confluence,
            median_cell_area_px=float(np.median(areas)) if len(areas) else None,
            scale=segmentation.scale,
            warning="; ".join(_one_line(note) for note in (*loaded.notes, *segmentation.notes)),
            seconds=clock.seconds,
        )
        return _Finished(result, files, cell_rows)

    # ------------------------------------------------------------------------------------------ in the caller's thread

    def _one_image(self, image: FoundImage, outcome: Outcome[_Finished], cells: BinaryIO) -> ImageResult:
        try:
            return self._commit(outcome.get(), cells)
        except BaseException as error:
            if not concerns_one_image(error):
                raise
            if isinstance(error, MemoryError):
                said = f" ({error})" if str(error) else ""
                reason = f"not enough memory{said}; try --batch-size 1 or smaller images"
            elif isinstance(error, DataError):
                reason = str(error)
            else:
                _log.exception("%s: internal error", image.name)
                reason = f"internal error, please report it: {type(error).__name__}: {error}"
        return self._record(ImageResult(image.name, "failed", error=_one_line(reason.removeprefix(f"{image.path}: "))))

    def _commit(self, finished: _Finished, cells: BinaryIO) -> ImageResult:
        """Files, rows and record of an image all, or none: the one place where results of an image are written."""
        with deferred_signals():
            start = time.perf_counter()
            self._write_files(finished.files)
            with writing(self.out / CELLS_CSV):  # a full disk concerns the run, not the image
                cells.write(finished.cell_rows)
            seconds = dict(finished.result.seconds)
            seconds["write"] += time.perf_counter() - start
            return self._record(replace(finished.result, seconds=seconds))

    def _write_files(self, files: dict[str, bytes]) -> None:
        """All of them or none, so that what lies in the folder is what images.csv calls done."""
        written = list[Path]()
        try:
            for place, content in files.items():
                written.append(self.out / place)
                make_folder(written[-1].parent)
                write_bytes(written[-1], content)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    def _record(self, result: ImageResult) -> ImageResult:
        self.results.append(result)
        self.summary.add(result)
        return result


def _one_line(text: str) -> str:
    return " ".join(text.split())
