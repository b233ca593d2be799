"""Images of a run that are read by region: slides, and TIFFs of more than 200 megapixels, whatever ``max_pixels`` is.

The size of the image decides, never the memory, so the kinds of its files do not depend on the machine. Its labels are
those of ``field="full"``; see ``slides.counting``. Until the image is recorded, the network's answers lie in
OUT/unfinished, from where a killed run continues; a run that ended leaves none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cellseg_deploy.batching import Network
from cellseg_deploy.cells.image_tiles import StageClock
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.cells.stain import QUICK_PIXELS, colours
from cellseg_deploy.errors import CellsegError, DataError
from cellseg_deploy.files import urls
from cellseg_deploy.files.atomic import temporary_in, write_bytes, writing
from cellseg_deploy.files.fingerprint import Fingerprint, sha256_of
from cellseg_deploy.files.regular import opened
from cellseg_deploy.images.decoder_warnings import collected
from cellseg_deploy.images.find import SLIDES, FoundImage
from cellseg_deploy.images.header import TIFF
from cellseg_deploy.images.options import MAX_PIXELS
from cellseg_deploy.images.read import declared_pixels
from cellseg_deploy.outputs import overlay
from cellseg_deploy.outputs.formats import FORMATS, Format
from cellseg_deploy.outputs.segmented import several_of
from cellseg_deploy.run import tables
from cellseg_deploy.run.journal import ImageRecord, OutputFile
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank, files
from cellseg_deploy.slides.counting import (
    SILENT,
    CountedImage,
    NoMemoryError,
    Progress,
    SlideElsewhere,
    count_cells,
    prepare,
)
from cellseg_deploy.slides.memory import half_of_free_memory
from cellseg_deploy.slides.network import NoDiskError
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import Pixels, Region, region_of
from cellseg_deploy.slides.run import geojson_of

UNFINISHED = "unfinished"
STREAMED_PIXELS = MAX_PIXELS
"""Larger TIFFs are read by region."""
KINDS = ("labels", "overlays", "geojson")
"""Kinds of files of a streamed image; those of the whole run are written as always."""

OnStream = Callable[[str, str], Progress]
"""Called with the name of an image and how it is read, in words; returns what its progress is reported to."""
_OF_RUN = tuple(format.name for format in FORMATS if not format.folder)
_WORK = re.compile("[0-9a-f]{32}")


def is_streamed(path: Path) -> bool:
    """Whether the image ``path`` is read by region: by its ending, or as a TIFF of more than ``STREAMED_PIXELS``.

    ``max_pixels`` does not decide: a run may be resumed with another value, and results must not depend on it.
    """
    if urls.is_url(path):  # without asking the server
        return False
    if path.suffix.lower() in SLIDES:
        return True
    try:
        with opened(path) as file:
            if file.read(4) not in TIFF:
                return False
    except OSError:
        return False  # the reader will say so
    return declared_pixels(path) > STREAMED_PIXELS


def memory_of(options: RunOptions) -> int:
    """Bytes that the windows of a streamed image may take."""
    return half_of_free_memory() if options.memory is None else options.memory


def forget(out: Path, names: Iterable[str] | None) -> None:
    """Remove what the network answered for the images ``names``, which are recorded, or None for all. Raises
    ``OutputError``."""
    if names is None:
        works = [path for path in (out / UNFINISHED).glob("*") if _WORK.fullmatch(path.name)]
    else:
        works = [_work_folder(out, name) for name in names]
    for work in works:
        if work.is_dir():
            with writing(work):
                shutil.rmtree(work)
            with suppress(OSError):  # others are not finished
                work.parent.rmdir()


def _work_folder(out: Path, name: str) -> Path:
    return out / UNFINISHED / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


class StreamWork:
    """The work on one streamed image, except naming its files. ``formats``: of single images."""

    def __init__(
        self,
        segmenter: Segmenter,
        options: RunOptions,
        formats: Sequence[Format],
        out: Path,
        on_stream: OnStream | None,
    ) -> None:
        self._segmenter, self._options, self._formats = segmenter, options, formats
        self._out, self._on_stream = out, on_stream

    def __call__(
        self,
        image: FoundImage,
        output_name: str,
        network: Network,
        clock: StageClock,
        elsewhere: SlideElsewhere | None = None,
    ) -> tuple[ImageRecord, dict[str, Path]]:
        """Return the record of ``image`` and its files, which have temporary names in the output folder.

        ``elsewhere``: computes the bands in place of ``network``, which then only measures the scale. Raises
        ``DataError``, also for kinds of files that a streamed image cannot have.
        """
        if refused := [each.name for each in self._formats if each.name not in KINDS]:
            raise DataError(
                f"{image.path}: is read by region, so {', '.join(dict.fromkeys(refused))} cannot be written; expected "
                f"`save` of {', '.join((*KINDS, *_OF_RUN))}; run such images into a folder of their own"
            )
        try:
            with collected():  # an incomplete file causes many messages
                reader = open_image(image.path, self._options.reading)
        except CellsegError:
            raise
        except Exception as error:  # the packages for the formats may raise anything
            raise DataError(f"{image.path}: damaged: {error}") from error
        try:
            return self._count(image, region_of(reader), output_name, network, clock, elsewhere)
        except (NoMemoryError, NoDiskError) as error:  # one image that is too large must not end the run
            raise DataError(f"{image.path}: {error}") from error
        finally:
            reader.close()

    def _count(
        self,
        image: FoundImage,
        region: Region,
        output_name: str,
        network: Network,
        clock: StageClock,
        elsewhere: SlideElsewhere | None,
    ) -> tuple[ImageRecord, dict[str, Path]]:
        memory, segmenter = memory_of(self._options), self._segmenter
        size = f"{region.width} x {region.height} px"
        how = f"{size}, read by region in blocks of up to {memory / 1e9:.1f} GB"
        progress = SILENT if self._on_stream is None else self._on_stream(image.name, how)
        work = _work_folder(self._out, image.name)
        prepare(work, segmenter, region, blank.EXACT, overwrite=True)
        with clock("read"):
            try:
                about = image.path.stat()
                source = Fingerprint(about.st_size, about.st_mtime_ns, sha256_of(image.path))
            except OSError as error:
                raise DataError(f"{image.path}: cannot be read: {error.strerror or error}") from error
        counted = count_cells(
            *(segmenter, region, work, network),
            contrast=blank.EXACT,
            memory=memory,
            count_rule=self._options.count_rule,
            with_outlines=any(each.name == "geojson" for each in self._formats),
            clock=clock,
            progress=progress,
            elsewhere=None if elsewhere is None else elsewhere(self._out, segmenter, region, blank.EXACT),
        )
        with clock("write"):
            samples, written = counted.samples, dict[str, Path]()
            try:
                self._write(image.name, counted, written, progress)
                small, labels = samples.overview()
                record = tables.record_of(
                    image.name,
                    counted.columns,
                    counted.classes,
                    counted.by_class,
                    covered_px=counted.found.pixels,
                    field_px=region.height * region.width,
                    image_px=region.height * region.width,
                    scale=counted.scale,
                    pixel_size_um=counted.size.um,
                    pixel_size_source=counted.size.source,
                    colours=colours(small, labels > 0, pixels=QUICK_PIXELS),
                    notes=[*counted.notes, *filter(None, samples.notes())],
                )
                found = {each.place(output_name): written[each.name] for each in self._formats}
                outputs = [OutputFile(place, path.stat().st_size, sha256_of(path)) for place, path in found.items()]
            except BaseException:
                for path in written.values():
                    path.unlink(missing_ok=True)
                raise
        return replace(record, input=source, output_name=output_name, outputs=tuple(outputs)), found

    def _write(self, name: str, counted: CountedImage, written: dict[str, Path], progress: Progress) -> None:
        kinds = {each.name for each in self._formats}
        strips = counted.strips(progress)
        if "labels" in kinds:
            written["labels"] = temporary_in(self._out)
            files.write_labels(written["labels"], counted.region.hw, strips, pixel_size_um=counted.size.um)
        else:
            deque(strips, maxlen=0)
        if "geojson" in kinds:
            written["geojson"] = temporary_in(self._out)
            files.write_pieces(written["geojson"], geojson_of(counted, self._segmenter, name))
        if "overlays" in kinds:
            written["overlays"] = temporary_in(self._out)
            write_bytes(written["overlays"], self._overlay(counted, *counted.samples.overview()))

    @staticmethod
    def _overlay(counted: CountedImage, small_hwc: Pixels, labels: Labels) -> bytes:
        """The overlay of a small image and its labels, which may lack some cells, with the count of all."""
        return overlay.encode(
            *(small_hwc, labels, None, counted.counts),
            classes=counted.classes,
            by_class=counted.by_class,
            several=several_of(counted.table, counted.classes),
        )
