"""The work of a folder run on one image, except writing: from the image file to the bytes of all its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cellseg_deploy.batching import Network
from cellseg_deploy.cells.image_tiles import StageClock
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.read import declared_pixels, read_image
from cellseg_deploy.outputs.formats import Format
from cellseg_deploy.run import tables
from cellseg_deploy.run.journal import ImageRecord, OutputFile
from cellseg_deploy.run.record import RunOptions
from cellseg_deploy.run.streamed import OnStream, StreamWork, is_streamed, memory_of
from cellseg_deploy.run.threshold_steps import encoded_steps
from cellseg_deploy.segmenter import Segmenter, as_read
from cellseg_deploy.slides.counting import SlideElsewhere


@dataclass(frozen=True)
class Finished:
    """One image, ready to be written. ``files``: path in the output folder (posix) -> content, or a finished file in
    the output folder that only lacks its name. ``seconds``: by stage; a network call with tiles of several images is
    shared among them."""

    record: ImageRecord
    files: Mapping[str, bytes | Path]
    seconds: dict[str, float]


class ImageWork:
    """Called by helper threads in parallel for different images; a result depends on the image alone."""

    def __init__(
        self,
        segmenter: Segmenter,
        options: RunOptions,
        formats: Sequence[Format],
        out: Path | None = None,
        on_stream: OnStream | None = None,
    ) -> None:
        """``out``: the output folder, for images that are read by region; None where there is none, as on a
        worker of a cluster."""
        self._segmenter = segmenter
        self._options = options
        self._formats = [format for format in formats if format.folder]
        self._stream = None if out is None else StreamWork(segmenter, options, self._formats, out, on_stream)
        self._last = next((format for format in self._formats if format.name == "overlays"), None)

    def bytes_in_flight(self, image: FoundImage, scale: float | None = None) -> int:
        """Estimate the memory that ``image`` takes, from the size its header declares."""
        if not image.problem and is_streamed(image.path):
            return memory_of(self._options)
        return 0 if image.problem else self._segmenter.bytes_in_flight(declared_pixels(image.path), scale)

    def __call__(
        self,
        image: FoundImage,
        output_name: str,
        scale: float | None,
        network: Network,
        *,
        with_thresholds: bool = False,
    ) -> Finished:
        """Read, segment, measure and encode ``image``. ``output_name``: name of its files without extension. ``scale``:
        None for the segmenter's. ``with_thresholds``: record what other thresholds would find."""
        if image.problem:
            raise DataError(image.problem)
        segmenter, options = self._segmenter, self._options
        if is_streamed(image.path):
            return self.by_region(image, output_name, network)
        clock = StageClock()
        with clock("read"):
            loaded = read_image(image.path, options.reading, with_fingerprint=True)
        found = segmenter.segment(
            *(loaded.pixels_hwc, network, clock),
            field=options.field_of_view,
            scale=scale,
            keep_probabilities=with_thresholds or "probabilities" in options.save,
        )
        found = as_read(found, loaded, name=image.name, count_rule=options.count_rule)
        with clock("write"):
            segmented = found.segmented
            record = tables.done(
                segmented, source=loaded.source, output_name=output_name, outputs=(), notes=found.notes
            )
        if with_thresholds:
            with clock("thresholds"):
                record = replace(record, thresholds=encoded_steps(segmenter, found, loaded, options))
        with clock("write"):
            encoded = {format: format.encode(segmented) for format in self._formats if format is not self._last}
            if self._last is not None:  # no copy of a large image for its outlines: nothing reads the pixels any more
                encoded[self._last] = self._last.encode(replace(segmented, pixels_are_spare=True))
            files = {format.place(output_name): encoded[format] for format in self._formats}
            outputs = tuple(OutputFile.of(path, content) for path, content in files.items())
        return Finished(replace(record, outputs=outputs), files, clock.seconds)

    def by_region(
        self, image: FoundImage, output_name: str, network: Network, elsewhere: SlideElsewhere | None = None
    ) -> Finished:
        """Do an ``image`` that ``is_streamed``. ``elsewhere``: see ``StreamWork``."""
        if self._stream is None:
            raise DataError(
                f"{image.path}: is read by region here, and was not on the machine that starts the run: it has grown, "
                "or could not be opened there; run again, which tries it again"
            )
        clock = StageClock()
        record, files = self._stream(image, output_name, network, clock, elsewhere)
        return Finished(record, files, clock.seconds)
