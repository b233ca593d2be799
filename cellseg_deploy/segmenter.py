"""The whole pipeline for one image: scale, tile, predict, stitch, label, measure.

image_hwc --resize--> model scale --pad, cut--> tiles --backend--> probabilities
    --stitch--> probabilities_khw --segment--> labels (image scale) --measure--> table
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack

import numpy as np
import numpy.typing as npt

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.batching import Job, Network, Overlapped, alone
from cellseg_deploy.cells import scale as scales
from cellseg_deploy.cells.classes import classify, counting_classes
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, check_rule
from cellseg_deploy.cells.field_marks import drawn_note, find_pointer, pointer_note, without_drawn, without_pointer
from cellseg_deploy.cells.field_of_view import (
    MAX_AREA,
    Field,
    check_field,
    edges,
    find_field,
    inside_field,
    least_edge_area_rel,
    without_surround,
)
from cellseg_deploy.cells.field_of_view import note as field_note
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock, checked_probabilities, foreground_share, resize
from cellseg_deploy.cells.instances import BorderCells, check_border_cells, check_params, painted, segment_runs
from cellseg_deploy.cells.label_runs import Runs
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.cells.notes import Note
from cellseg_deploy.cells.scale import CellDiameter, ScaleChoice, check_scale, fixed_scale, lost_share_note, size_note
from cellseg_deploy.cells.stain import negative_note
from cellseg_deploy.cells.tiling import checked_halo
from cellseg_deploy.errors import UsageError, check_types
from cellseg_deploy.images import any_image
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage
from cellseg_deploy.images.resolution import checked_by_cells
from cellseg_deploy.outputs import formats
from cellseg_deploy.outputs.segmentation import NO_PROBABILITIES, Segmentation
from cellseg_deploy.threads import ThreadPlan, single_threaded_libraries

if TYPE_CHECKING:
    from cellseg_deploy.images.any_image import ImageLike
    from cellseg_deploy.run.elsewhere import Elsewhere
    from cellseg_deploy.run.result import FolderResult
    from cellseg_deploy.slides.api import SlideOptions
    from cellseg_deploy.slides.run import SlideResult

__all__ = ["BATCH_SIZE", "Segmenter", "as_read", "resize"]

T = TypeVar("T")
BATCH_SIZE = 8
_DEFAULT_ENGINE, _READ_DEFAULTS = EngineOptions(), ReadOptions()


class Segmenter:
    """A network with everything needed to turn an image into labelled cells.

    >>> with Segmenter.load("my.onnx") as segmenter:
    ...     segmenter("smear.png").count > 0
    True
    """

    def __init__(
        self,
        backend: Backend,
        *,
        task: str = "counting",
        scale: float | None = None,
        cell_diameter_px: CellDiameter = None,
        batch_size: int = BATCH_SIZE,
        halo: int | None = None,
        border_cells: BorderCells = "visible",
        classes: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        """Set options for all images; the caller remains responsible for closing the backend.

        ``task``: selects the operating point. ``scale``: model px per image px; or ``cell_diameter_px``: median
        cell diameter in the images, from which the scale follows; with neither, images have the scale of the
        training images. With ``auto`` each image is measured alone, unless ``measured_scales`` has its size (h, w).
        ``batch_size``: tiles per network call; results do not depend on it. ``halo``: context px on each side of a
        tile that are discarded, None for the model's own. ``border_cells``: which cells cut by the border are
        labelled: ``visible``, or ``model``, cells above the ``min_border_area_rel`` of its operating point, as in
        earlier versions. ``threads``: CPU threads of the engine, None for one per core; ``map`` and ``run`` add as
        many. ``classes``: which of the model's classes count as cells, None for all but platelets.

        Raises ``UsageError`` for a setting outside its range, or a class that the model does not have.
        """
        check_types(Backend, backend=backend)
        check_types("a whole number", batch_size=batch_size)
        check_types("a whole number or None", halo=halo, threads=threads)
        spec, self.backend = backend.spec, backend
        self.task, self.params = task, spec.operating_point(task)
        check_params(self.params)
        check_border_cells(border_cells)
        self.border_cells: BorderCells = border_cells
        self.counting_classes = counting_classes(spec.classes, classes)
        self.scale = fixed_scale(
            spec.image_scale, spec.cell_diameter_px, scale=scale, cell_diameter_px=cell_diameter_px
        )
        self.auto_scale = cell_diameter_px == "auto"
        self.measured_scales: dict[tuple[int, int], float] = {}
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {batch_size}")
        self.batch_size, self.threads = batch_size, threads
        self.halo = checked_halo(spec.halo if halo is None else halo, spec.tile_size)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        engine: EngineOptions = _DEFAULT_ENGINE,
        given: str | Path | None = None,
        task: str = "counting",
        scale: float | Literal["auto"] | None = "auto",
        cell_diameter_px: CellDiameter = None,
        batch_size: int = BATCH_SIZE,
        halo: int | None = None,
        border_cells: BorderCells = "visible",
        classes: Sequence[str] | None = None,
    ) -> Segmenter:
        """Open the model file ``model``, by default the model that ships with the package, in ``engine``.

        ``scale``: model px per image px. ``auto``, the default as in ``cellseg-infer``, measures each image unless
        ``cell_diameter_px`` is passed; None: the scale of the model's training images. ``given``: see
        ``open_backend``. All other settings: see ``__init__``.

        Raises what ``open_backend`` raises, and ``UsageError``.

        >>> with Segmenter.load(engine=EngineOptions(threads=1), cell_diameter_px=90) as segmenter:
        ...     segmenter("smear.png").count > 0
        True
        """
        from cellseg_deploy.models import default_model_path

        if scale == "auto":
            scale, cell_diameter_px = None, "auto" if cell_diameter_px is None else cell_diameter_px
        check_types("a path or None", model=model)
        opened = open_backend(default_model_path() if model is None else model, engine, given=given)
        try:
            return cls(
                opened,
                task=task,
                scale=scale,
                cell_diameter_px=cell_diameter_px,
                batch_size=batch_size,
                halo=halo,
                border_cells=border_cells,
                classes=classes,
                threads=engine.threads,
            )
        except BaseException:
            opened.close()
            raise

    def __call__(
        self,
        image: ImageLike,
        *,
        read: ReadOptions = _READ_DEFAULTS,
        field: Field = "auto",
        count_rule: CountRule = DEFAULT_RULE,
        scale: float | None = None,
    ) -> Segmentation:
        """Segment ``image``: a path, uint8 RGB (h, w, 3) of any size from 1 x 1, a PIL image, or a file open for
        reading bytes.

        ``read``: options for reading files. ``field``: ``full`` takes the whole image as the field of view, surround
        included. ``count_rule``: which cells at the border count (``Segmentation.counted``). ``scale``: model px per
        image px; None for the segmenter's own. A measured scale is measured in this image alone, so the result is that
        of ``cellseg-infer`` over a folder with only this image.

        May be called from any number of threads. Raises ``UsageError`` for another type of image, ``DataError`` if the
        image or the network's output for it is unusable.

        >>> with open("smear.png", "rb") as file:
        ...     model(file).count == model("smear.png").count
        True
        """
        return self._one(image, self._alone(), read=read, field=field, count_rule=count_rule, scale=scale)

    def map(
        self,
        images: Iterable[ImageLike],
        *,
        read: ReadOptions = _READ_DEFAULTS,
        field: Field = "auto",
        count_rule: CountRule = DEFAULT_RULE,
        scale: float | None = None,
    ) -> Generator[Segmentation, None, None]:
        """Call the segmenter on each of ``images``, faster, with the same results in the same order.

        Images are read, run and measured in parallel, with at most about 1 GB of them in flight. An unusable image
        raises when its turn comes and ends the iteration; ``run`` would continue.

        >>> [cells.name for cells in model.map(["smear.png", "other.png"])]
        ['smear.png', 'other.png']
        """
        check_types("several images, such as a list", images=images)
        check_scale(1.0 if scale is None else scale)
        work = partial(self._one, read=read, field=field, count_rule=count_rule, scale=scale)
        jobs = [Job(partial(work, image), partial(self._bytes_of, image, scale)) for image in images]
        return self.results(jobs, thread_plans.plan_of_engine(self.threads))

    def run(
        self,
        images: str | Path | Sequence[str | Path],
        out: str | Path,
        *,
        save: Sequence[str] = formats.DEFAULT,
        read: ReadOptions = _READ_DEFAULTS,
        field: Field = "auto",
        count_rule: CountRule = DEFAULT_RULE,
        group_by: str | Path = "",
        report: bool = True,
        overwrite: bool = False,
        follow_links: bool = False,
        on_image: Callable[[str], None] = lambda _: None,
        cluster: Elsewhere | None = None,
    ) -> FolderResult:
        """Segment a folder of images into the folder ``out``, as ``cellseg-infer`` does.

        A stopped run is resumed. One bad image never stops a run: it is listed in ``failed`` of the result.
        ``save``: kinds of files to write, see ``outputs.formats``; tables are always written. ``group_by``: groups of
        summary.csv and the report, a regular expression or a CSV file image,group; "" for folders. ``report``: write
        report.html and files for MultiQC. ``overwrite``: replace an earlier run in ``out``. ``follow_links``: read
        links that lead out of the folder too. ``on_image``: called with the name of each processed image, in order.
        ``cluster``: of ``open_cluster``; its workers do the images. A scale is measured once for all images of one
        folder and size.

        Raises ``NothingToDoError`` without images, ``UsageError``, and ``OutputError`` for the folder.

        >>> result = model.run("photographs", out="counts", group_by="patient[0-9]+")
        >>> [image.name for image in result.failed], (result.out / "report.html").is_file()
        ([], True)
        """
        from cellseg_deploy.run.record import RunOptions
        from cellseg_deploy.run.result import run

        check_types("a sequence of names", save=save)
        check_types("a path", group_by=group_by)
        options = RunOptions(tuple(save), overwrite, read, count_rule, field, str(group_by), report)
        return run(self, images, out, options, follow_links=follow_links, on_image=on_image, cluster=cluster)

    def run_slide(self, image: str | Path, out: str | Path, **options: Unpack[SlideOptions]) -> SlideResult:
        """Count the cells of ``image``, which may be larger than memory, into the folder ``out``, as ``cellseg-slide``.

        ``options``: see ``slides.api.SlideOptions``. A stopped run is resumed. Raises as ``run``, and ``DataError``.

        >>> model.run_slide("smear.png", "slide", region=(0, 0, 300, 200), memory=10**9).cells > 0
        True
        """
        from cellseg_deploy.slides.api import run_file

        return run_file(self, image, out, **options)

    def _one(
        self,
        image: ImageLike,
        network: Network,
        *,
        read: ReadOptions,
        field: Field,
        count_rule: CountRule,
        scale: float | None,
    ) -> Segmentation:
        check_rule(count_rule)
        check_scale(1.0 if scale is None else scale)
        clock = StageClock()
        with clock("read"):
            loaded = any_image.load(image, read)
        found = self.segment(loaded.pixels_hwc, network, clock, field=field, scale=scale)
        return as_read(found, loaded, name=any_image.name_of(image), count_rule=count_rule)

    def _bytes_of(self, image: ImageLike, scale: float | None) -> int:
        return self.bytes_in_flight(any_image.pixels_of(image), scale)

    def segment(
        self,
        image_hwc: npt.NDArray[np.uint8],
        network: Network,
        clock: StageClock | None = None,
        *,
        field: Field = "auto",
        scale: float | None = None,
        keep_probabilities: bool = True,
    ) -> Segmentation:
        """Segment an array like a call of the segmenter, with the ``network`` passed.

        ``clock``: collects the seconds of each stage. ``field``: ``full`` takes the whole image as the field of view,
        surround included. ``scale``: model px per image px as returned by ``find_scale``; None: the segmenter's, which
        with ``cell_diameter_px="auto"`` is measured in this image alone. ``keep_probabilities``: False frees them once
        the labels are found, as a large image needs; the result then has no channels.
        """
        any_image.check_array(image_hwc)
        check_field(field)
        pixels_hwc, clock = image_hwc, clock or StageClock()
        with clock("resize"):
            inside = find_field(image_hwc) if field == "auto" else None
            pointer = find_pointer(image_hwc, inside) if field == "auto" else None
            if pointer is not None:
                image_hwc = without_pointer(image_hwc, pointer)
            if inside is not None:
                image_hwc = without_surround(image_hwc, inside)
        notes: list[str] = [] if inside is None else [field_note(inside)]
        notes += [] if pointer is None else [pointer_note()]
        is_found = scale is not None or self.auto_scale
        if self.auto_scale and scale is None:
            scale = self.measured_scales.get((image_hwc.shape[0], image_hwc.shape[1]))
        if scale is None and self.auto_scale:
            choice = self.find_scale([image_hwc], network, clock, field="full")  # the surround is already removed
            scale = choice.scale
            notes.append(choice.note)
        scale = self.scale if scale is None else scale
        probabilities = self._probabilities(image_hwc, scale, network, clock)
        with clock("label"):
            runs = self._runs(probabilities, (image_hwc.shape[0], image_hwc.shape[1]))
            seen = foreground_share(self._foreground(probabilities), self.params.foreground_threshold, inside)
            if not keep_probabilities:  # before the label image is made, which is larger
                probabilities = probabilities[len(probabilities) - len(self.backend.spec.classes) :].copy()
            labels = painted(runs)
            del runs
            if inside is not None:
                rel = least_edge_area_rel(self.params, self.border_cells)
                largest_px = MAX_AREA * self.model_cell_px(scale)
                labels = inside_field(labels, inside, min_edge_area_rel=rel, max_area_px=largest_px)
        if field == "auto":
            with clock("label"):
                labels, n_drawn = without_drawn(image_hwc, labels)
            notes += [drawn_note(n_drawn)] if n_drawn else []
        if not is_found and scale == self.backend.spec.image_scale:  # by value, so that a rerun gives the same note
            notes.append(size_note(labels, self.backend.spec.cell_diameter_px, scale))
        kept = np.count_nonzero(labels) / (labels.size if inside is None else np.count_nonzero(inside))
        notes += [lost_share_note(seen, float(kept)), negative_note(image_hwc, labels)]
        classes = classify(labels, probabilities, self.backend.spec.classes, self.counting_classes)
        if not keep_probabilities:
            probabilities = NO_PROBABILITIES
        with clock("measure"):
            table = measure(labels)
            if inside is not None:
                table.columns["touches_border"] |= edges(labels, inside, len(table)).any(axis=1)
            if classes is not None:
                table.columns.update(classes.columns)
        return Segmentation(
            labels=labels,
            probabilities_khw=probabilities,
            measured=table,
            scale=scale,
            seconds=clock.seconds,
            pixels_hwc=pixels_hwc,
            channels=self.backend.spec.channels if keep_probabilities else (),
            notes=tuple(note for note in notes if note),
            field=inside,
            model_cell_px=self.model_cell_px(scale),
            model=self.backend.spec.name,
            task=self.task,
            classes=classes,
        )

    def model_cell_px(self, scale: float) -> float:
        """Area of the model's typical cell, in px of an image at ``scale``."""
        return float(np.pi / 4 * (self.backend.spec.cell_diameter_px / scale) ** 2)

    def find_scale(
        self,
        images: Iterable[npt.NDArray[np.uint8]],
        network: Network | None = None,
        clock: StageClock | None = None,
        *,
        field: Field = "auto",
    ) -> ScaleChoice:
        """Find the scale at which the cells of ``images``, uint8 RGB (h, w, 3), are as large as the model's cells; see
        ``cells.scale``. Keeps a part of each image, and reads no more than ``SAMPLE_IMAGES`` images.

        Returns the model's own scale if the cells are nearly as large (``TOLERANCE``) or, with a note, if there are too
        few cells to tell. Raises as ``segment``.
        """
        spec, network, clock = self.backend.spec, network or self._alone(), clock or StageClock()
        most = round(spec.tile_size * max(scales.SEARCH_DIAMETERS_PX) / spec.cell_diameter_px)
        parts = list[npt.NDArray[np.uint8]]()
        for image_hwc in islice(images, scales.SAMPLE_IMAGES):
            any_image.check_array(image_hwc)
            with clock("resize"):
                inside = find_field(image_hwc) if field == "auto" else None
                whole = image_hwc if inside is None else without_surround(image_hwc, inside)
                parts.append(whole[scales.crop_of((whole.shape[0], whole.shape[1]), most, 0)].copy())

        def look(crop_hwc: npt.NDArray[np.uint8], at: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
            probabilities = self._probabilities(crop_hwc, at, network, clock)
            with clock("label"):
                return self._foreground(probabilities), painted(self._runs(probabilities, None))

        return scales.search(
            parts,
            look,
            tile_size=spec.tile_size,
            model_diameter_px=spec.cell_diameter_px,
            image_scale=spec.image_scale,
        )

    def overlapped(self, jobs: Sequence[Job[T]], threads: ThreadPlan) -> Overlapped[T]:
        """Run ``jobs``, which call ``segment`` with the network passed to them, in parallel; see ``batching``."""
        return Overlapped(
            jobs,
            self.backend.predict,
            batch=self.batch_size,
            step=self.backend.batch_step,
            helpers=threads.helpers,
            exclusive=threads.exclusive,
        )

    def results(self, jobs: Sequence[Job[T]], threads: ThreadPlan) -> Generator[T, None, None]:
        """Yield the results of ``jobs`` in order; the first error is raised and ends all jobs. If iteration may stop
        early, close the generator before the segmenter (``contextlib.closing``): its threads use the backend."""
        with single_threaded_libraries(), self.overlapped(jobs, threads) as outcomes:
            for outcome in outcomes:
                yield outcome.get()

    def _alone(self) -> Network:
        return alone(self.backend.predict, self.batch_size)

    def bytes_in_flight(self, pixels: int, scale: float | None = None) -> int:
        """Estimate the bytes that an image of ``pixels`` px takes while in flight: the image and its labels, and at
        model scale the image and its probabilities. A stage may briefly take more."""
        model_pixels = round(pixels * (self.scale if scale is None else scale) ** 2)
        return pixels * (3 + 4) + model_pixels * (3 + 4 * len(self.backend.spec.channels))

    def _foreground(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.asarray(probabilities[self.backend.spec.channels.index("foreground")])

    def _runs(self, probabilities: npt.NDArray[np.float32], out_hw: tuple[int, int] | None) -> Runs:
        """Runs of the cells at the image's size ``out_hw``; None for the model's scale."""
        spec = self.backend.spec
        return segment_runs(
            probabilities,
            spec.channels,
            self.params,
            cell_diameter_px=spec.cell_diameter_px,
            out_hw=out_hw,
            border_cells=self.border_cells,
            classes=() if out_hw is None else spec.classes,  # platelets do not indicate the scale
        )

    def _probabilities(
        self, image_hwc: npt.NDArray[np.uint8], scale: float, network: Network, clock: StageClock
    ) -> npt.NDArray[np.float32]:
        spec = self.backend.spec
        with clock("resize"):
            scaled = resize(image_hwc, scale)
        tiles = ImageTiles(scaled, tile_size=spec.tile_size, halo=self.halo, n_channels=len(spec.channels), clock=clock)
        del scaled  # ``tiles`` keeps it as long as needed
        network(tiles)
        with clock("tile"):
            return checked_probabilities(tiles.out_khw)

    def probabilities(self, image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the probabilities (K, h', w') float32 of ``image_hwc`` at model scale, before any labelling."""
        any_image.check_array(image_hwc)
        return self._probabilities(image_hwc, self.scale, self._alone(), StageClock())

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_read(found: Segmentation, loaded: LoadedImage, *, name: str, count_rule: CountRule) -> Segmentation:
    """Return ``found`` with the pixels and notes of ``loaded``, named ``name``, and with its pixel size unless the
    cell sizes contradict that."""
    size = checked_by_cells(loaded.pixel_size, found.measured.columns["equivalent_diameter_px"])
    doubts = [Note(size.note, "pixel size")] if size.note != loaded.pixel_size.note else []
    return replace(
        found,
        pixels_hwc=loaded.pixels_hwc,
        notes=(*loaded.notes, *found.notes, *doubts),
        name=name,
        count_rule=count_rule,
        pixel_size_um=size.um,
        pixel_size_source=size.source,
    )
