"""The folder run: many images in, labels, pictures and tables out; one bad image never stops it.

OUT/labels/NAME.tif      label image                  OUT/cells.csv    a row a cell
OUT/overlays/NAME.jpg    outlines and count           OUT/images.csv   a row an image, failed ones too
                                                      OUT/run.json     what ran, with what, how long
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.counting import CountRule, check_rule, counted
from cellseg_deploy.errors import CellsegError, DataError, NothingToDoError
from cellseg_deploy.images import MAX_PIXELS, FoundImage, LoadedImage, check_settings, read_image
from cellseg_deploy.measure import COLUMNS as CELL_COLUMNS
from cellseg_deploy.outputs import label_tiff, overlay, tables
from cellseg_deploy.outputs.atomic import atomic_file, make_folder, write_bytes, writing
from cellseg_deploy.outputs.folder import LABELS, OVERLAYS, RUN_JSON, check_apart, output_folder
from cellseg_deploy.outputs.interrupts import deferred_signals
from cellseg_deploy.outputs.names import LABEL_SUFFIX, OVERLAY_SUFFIX, output_names
from cellseg_deploy.pipeline import Segmentation, Segmenter

CELLS_CSV, IMAGES_CSV = "cells.csv", "images.csv"
COUNTED = "counted"
IMAGE_COLUMNS = (
    "image",
    "status",
    "cells",
    "counted",
    "confluence",
    "median_cell_area_px",
    "scale",
    "warning",
    "error",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What to write and how to read, with the defaults of ``cellseg-infer``; ``UsageError`` if it cannot be meant."""

    save_labels: bool = True
    save_overlays: bool = True
    overwrite: bool = False
    max_pixels: int = MAX_PIXELS
    bit_depth: int | None = None
    count_rule: CountRule = "all"

    def __post_init__(self) -> None:
        check_rule(self.count_rule)
        check_settings(self.max_pixels, self.bit_depth)


@dataclass(frozen=True)
class ImageResult:
    """One line of images.csv. ``status`` is ``done`` or ``failed``; a failed image has an error and no numbers.

    ``cells``: all that were found; ``counted``: those that the count rule lets in.
    """

    image: str
    status: str
    cells: int | None = None
    counted: int | None = None
    confluence: float | None = None
    median_cell_area_px: float | None = None
    scale: float | None = None
    warning: str = ""
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class RunSummary:
    """Totals of a run; ``remaining`` is 0 unless it was stopped."""

    found: int
    output: Path
    done: int = 0
    failed: int = 0
    cells: int = 0
    counted: int = 0
    wall_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        """Images that were neither done nor failed."""
        return self.found - self.done - self.failed

    def add(self, result: ImageResult) -> None:
        """Count one more image."""
        if result.status == "done":
            self.done += 1
            self.cells += result.cells or 0
            self.counted += result.counted or 0
        else:
            self.failed += 1
        for stage, seconds in result.seconds.items():
            self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + seconds


def run_folder(
    segmenter: Segmenter,
    images: Sequence[FoundImage],
    out: Path,
    *,
    options: RunOptions | None = None,
    on_result: Callable[[ImageResult], None] | None = None,
) -> RunSummary:
    """Segment ``images`` in order into the folder ``out``; ``on_result`` is told of each image.

    An image that cannot be read, or fails in any way of its own, is recorded and the run goes on. Interrupted
    (KeyboardInterrupt), or stopped by an error that concerns the whole run or by one of ``on_result``, the tables of
    what is done are still written before the exception goes on.

    Raises ``NothingToDoError`` without an image, ``OutputError`` / ``OutputInUseError`` for the folder, ``UsageError``
    if ``out`` lies inside the input or the other way round.
    """
    if not images:
        raise NothingToDoError("no image to work on; expected PNG, JPEG or TIFF files")
    options = options or RunOptions()
    check_apart([image.path for image in images], out)
    with output_folder(out, overwrite=options.overwrite):
        return _Run(segmenter, images, out, options).run(on_result)


class _Run:
    """State of one run between its first and its last image."""

    def __init__(self, segmenter: Segmenter, images: Sequence[FoundImage], out: Path, options: RunOptions) -> None:
        self.segmenter = segmenter
        self.images = images
        self.out = out
        self.options = options
        self.names = output_names([image.name for image in images])
        self.results: list[ImageResult] = []
        self.summary = RunSummary(found=len(images), output=out)
        self.started = datetime.datetime.now(datetime.UTC)
        self.clock = time.perf_counter()

    def run(self, on_result: Callable[[ImageResult], None] | None) -> RunSummary:
        self._write_run_json("running")
        with ExitStack() as stack:
            cells = stack.enter_context(self._tables_at_end())
            for image in self.images:
                result = self._one_image(image, cells)
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
        rows = [[getattr(result, column) for column in IMAGE_COLUMNS] for result in self.results]
        write_bytes(self.out / IMAGES_CSV, tables.csv_rows([IMAGE_COLUMNS, *rows]))
        self.summary.wall_seconds = time.perf_counter() - self.clock
        self._write_run_json("finished" if stopped is None else "stopped")
        if stopped is not None:
            raise stopped

    def _one_image(self, image: FoundImage, cells: BinaryIO) -> ImageResult:
        try:
            return self._process(image, cells)
        except DataError as error:
            reason = str(error)
        except MemoryError as error:
            reason = f"not enough memory{f' ({error})' if str(error) else ''}; try --batch-size 1 or smaller images"
        except CellsegError:
            raise
        except Exception as error:
            # Ours to mend, but the other ten thousand images of the night must not pay for it: recorded, never hidden.
            _log.exception("%s: internal error", image.name)
            reason = f"internal error, please report it: {type(error).__name__}: {error}"
        return self._record_result(
            ImageResult(image.name, "failed", error=_one_line(reason.removeprefix(f"{image.path}: ")))
        )

    def _record_result(self, result: ImageResult) -> ImageResult:
        self.results.append(result)
        self.summary.add(result)
        return result

    def _process(self, image: FoundImage, cells: BinaryIO) -> ImageResult:
        if image.problem:
            raise DataError(image.problem)
        start = time.perf_counter()
        loaded = read_image(image.path, max_pixels=self.options.max_pixels, bit_depth=self.options.bit_depth)
        read = time.perf_counter()
        segmentation = self.segmenter(loaded.pixels_hwc)
        segmented = time.perf_counter()
        with deferred_signals():  # files, rows and record of an image all, or none
            self._write_outputs(image, loaded, segmentation)
            counts = counted(segmentation.table.boxes, segmentation.labels.shape, self.options.count_rule)
            self._append(cells, image.name, segmentation, counts)
            seconds = {"read": read - start, **segmentation.seconds, "write": time.perf_counter() - segmented}
            areas = segmentation.table.columns["area_px"]
            return self._record_result(
                ImageResult(
                    image=image.name,
                    status="done",
                    cells=segmentation.count,
                    counted=int(counts.sum()),
                    confluence=segmentation.confluence,
                    median_cell_area_px=float(np.median(areas)) if len(areas) else None,
                    scale=segmentation.scale,
                    warning="; ".join(_one_line(note) for note in (*loaded.notes, *segmentation.notes)),
                    seconds=seconds,
                )
            )

    def _append(self, cells: BinaryIO, name: str, segmentation: Segmentation, counts: npt.NDArray[np.bool_]) -> None:
        with writing(self.out / CELLS_CSV):  # a full disk concerns the run, not the image
            cells.write(tables.csv_rows(tables.cell_rows(name, {**segmentation.table.columns, COUNTED: counts})))

    def _write_outputs(self, image: FoundImage, loaded: LoadedImage, segmentation: Segmentation) -> None:
        """Both files of an image or none, so that what lies in the folder is what images.csv calls done."""
        name, written = self.names[image.name], list[Path]()
        try:
            if self.options.save_labels:
                path = self.out / LABELS / (name + LABEL_SUFFIX)
                written.append(path)
                make_folder(path.parent)
                write_bytes(path, label_tiff.encode(segmentation.labels))
            if self.options.save_overlays:
                path = self.out / OVERLAYS / (name + OVERLAY_SUFFIX)
                written.append(path)
                make_folder(path.parent)
                write_bytes(path, overlay.encode(loaded.pixels_hwc, segmentation.labels))
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    def _write_run_json(self, status: str) -> None:
        record = self._record(status)
        write_bytes(self.out / RUN_JSON, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")

    def _record(self, status: str) -> dict[str, Any]:
        backend, spec, summary = self.segmenter.backend, self.segmenter.backend.spec, self.summary
        engine = backend.describe()
        return {
            "program": "cellseg-infer",
            "version": version("cellseg-deploy"),
            "status": status,
            "model": {
                "name": spec.name,
                "variant": spec.variant,
                "parity": spec.parity,
                **{key: engine.pop(key) for key in sorted(engine) if key.startswith("model_")},
            },
            "backend": {
                "name": backend.name,
                "device": backend.device,
                "precision": backend.precision,
                "verified": backend.verified,
                "choice": backend.choice,
                **engine,
            },
            "task": self.segmenter.task,
            "operating_point": msgspec.to_builtins(self.segmenter.params),
            "settings": {
                "scale": "auto" if self.segmenter.auto_scale else self.segmenter.scale,
                "tile_size": spec.tile_size,
                "halo": self.segmenter.halo,
                "batch_size": self.segmenter.batch_size,
                **msgspec.to_builtins(self.options),
            },
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("numpy", "opencv-python-headless", "scikit-image", "scipy", "pillow", "tifffile")
                },
            },
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
            "started": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round(summary.wall_seconds, 3),
            "stage_seconds": {stage: round(seconds, 3) for stage, seconds in summary.stage_seconds.items()},
            "totals": {
                "found": summary.found,
                "done": summary.done,
                "failed": summary.failed,
                "remaining": summary.remaining,
                "cells": summary.cells,
                "counted": summary.counted,
            },
        }


def _one_line(text: str) -> str:
    return " ".join(text.split())
