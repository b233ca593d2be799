"""One image through everything: scale, tile, predict, stitch, label, measure.

image_hwc --resize--> model scale --pad, cut--> tiles --backend--> probabilities
    --stitch--> probabilities_khw --segment--> labels (image scale) --measure--> table

``Segmenter.segment`` says this once, for a network that is given to it: that of one image alone when a ``Segmenter`` is
called, one that many images share in a folder run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends import open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.batching import Job, Network, Overlapped, alone
from cellseg_deploy.cells import scale as scales
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, counted
from cellseg_deploy.cells.field_marks import drawn_note, find_pointer, pointer_note, without_drawn, without_pointer
from cellseg_deploy.cells.field_of_view import (
    MAX_AREA,
    Field,
    Mask,
    check_field,
    edges,
    find_field,
    inside_field,
    without_surround,
)
from cellseg_deploy.cells.field_of_view import note as field_note
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock
from cellseg_deploy.cells.instances import (
    VISIBLE_AREA_REL,
    BorderCells,
    check_border_cells,
    check_params,
    segment,
)
from cellseg_deploy.cells.measure import CellTable, measure
from cellseg_deploy.cells.scale import CellDiameter, ScaleChoice, View, fixed_scale, lost_note, size_note
from cellseg_deploy.cells.stain import negative_note
from cellseg_deploy.errors import DataError, ModelError, UsageError
from cellseg_deploy.images.read import read_image
from cellseg_deploy.models.spec import InstanceParams
from cellseg_deploy.threads import ThreadPlan, single_threaded_libraries

T = TypeVar("T")
BATCH_SIZE = 8
_MAX_MODEL_PIXELS = 400_000_000
# A sigmoid in half precision may miss 0 and 1 by rounding; logits miss them by far more.
_PROBABILITY_SLACK = 1e-2


@dataclass(frozen=True)
class Segmentation:
    """What was found in one image.

    ``labels``: int32 (h, w) of the image, 0 = background, 1..n in raster order. ``probabilities_khw``: float32
    (K, h', w') in [0, 1] at model scale, channels as in the ModelSpec. ``table``: a row a cell, in image px.
    ``scale``: model px per image px. ``seconds``: seconds of each stage. ``notes``: what the user should know.
    ``field``: bool (h, w), the field of view, outside of which there is no cell; None if it is the whole image.
    ``model_cell_px``: area of the model's typical cell in px of the image.
    """

    labels: npt.NDArray[np.int32]
    probabilities_khw: npt.NDArray[np.float32]
    table: CellTable
    scale: float
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    field: Mask | None = None
    model_cell_px: float | None = None

    @property
    def count(self) -> int:
        """Number of cells that were found, those that the border cuts among them; see ``counted``."""
        return int(self.labels.max(initial=0))

    def counted(self, rule: CountRule = DEFAULT_RULE) -> npt.NDArray[np.bool_]:
        """Whether each cell counts under ``rule``, bool (n,) in the order of ``table``; see ``cells.count_rules``."""
        return counted(
            self.table.boxes,
            (self.labels.shape[0], self.labels.shape[1]),
            rule,
            None if self.field is None else edges(self.labels, self.field, self.count),
            areas_px=self.table.columns["area_px"],
            model_cell_px=self.model_cell_px,
        )

    @property
    def confluence(self) -> float:
        """Share of the field of view that is covered by cells, 0 to 1."""
        size = self.labels.size if self.field is None else np.count_nonzero(self.field)
        return float(np.count_nonzero(self.labels) / size)


class Segmenter:
    """A network with everything needed to turn an image into labelled cells.

    >>> segmenter = Segmenter.from_file("model.onnx")  # doctest: +SKIP
    >>> segmenter(image_hwc).count  # doctest: +SKIP
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
    ) -> None:
        """Settings for all images that follow; the backend stays the caller's to close.

        ``task``: whose operating point to use. ``scale``: model px per image px; or ``cell_diameter_px``: median
        cell diameter in the images, from which the scale follows; with neither, images have the scale of the
        training images. With ``auto`` each image is measured alone, unless ``measured_scales`` has its size (h, w).
        ``batch_size``: tiles a call of the network; results do not depend on it. ``halo``: context px on each side of
        a tile that are thrown away, None for the model's own. ``border_cells``: which cells cut by the border are
        labelled: ``visible``, or ``model``, those above the ``min_border_area_rel`` of its operating point, as in
        earlier versions.

        Raises ``UsageError`` for a setting outside its range.
        """
        spec = backend.spec
        self.backend = backend
        self.task = task
        self.params: InstanceParams = spec.operating_point(task)
        check_params(self.params)
        check_border_cells(border_cells)
        self.border_cells: BorderCells = border_cells
        self.scale = fixed_scale(
            spec.image_scale, spec.cell_diameter_px, scale=scale, cell_diameter_px=cell_diameter_px
        )
        self.auto_scale = cell_diameter_px == "auto"
        self.measured_scales: dict[tuple[int, int], float] = {}
        if batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.halo = spec.halo if halo is None else halo
        if not 0 <= 2 * self.halo < spec.tile_size:
            raise UsageError(
                f"halo {self.halo} does not fit the model's tile of {spec.tile_size} px; "
                f"expected 0 to {(spec.tile_size - 1) // 2}"
            )

    @classmethod
    def from_file(
        cls,
        path: str | Path | None = None,
        *,
        backend: str = "auto",
        device: str | None = None,
        task: str = "counting",
        scale: float | None = None,
        cell_diameter_px: CellDiameter = None,
        batch_size: int = BATCH_SIZE,
        halo: int | None = None,
        threads: int | None = None,
        rebuild: bool = False,
        cuda_graph: bool = False,
        ort_provider: str | None = None,
        precision: str | None = None,
        streams: int | None = None,
        given: str | Path | None = None,
        border_cells: BorderCells = "visible",
    ) -> Segmenter:
        """Open the model file ``path`` (None: the model that ships with the package); settings as ``__init__``, or as
        ``open_backend``.

        Raises what ``open_backend`` raises, and ``UsageError``.
        """
        from cellseg_deploy.models import default_model_path

        opened = open_backend(
            path or default_model_path(),
            backend=backend,
            device=device,
            threads=threads,
            rebuild=rebuild,
            cuda_graph=cuda_graph,
            ort_provider=ort_provider,
            precision=precision,
            streams=streams,
            given=given,
        )
        try:
            return cls(
                opened,
                task=task,
                scale=scale,
                cell_diameter_px=cell_diameter_px,
                batch_size=batch_size,
                halo=halo,
                border_cells=border_cells,
            )
        except BaseException:
            opened.close()
            raise

    def __call__(self, image: npt.NDArray[np.uint8] | str | Path | Any, *, field: Field = "auto") -> Segmentation:
        """Cells of ``image``: uint8 RGB (h, w, 3) of any size from 1 x 1, the path of an image file, or a PIL image.

        A file is read as ``cellseg-infer`` does (``images.read_image``), whose remarks are then among the ``notes``.
        ``field``: as in ``segment``.

        Raises ``UsageError`` if it is none of these, ``DataError`` if the file cannot be used or the network's answer
        for it is unusable.
        """
        if isinstance(image, (str, Path)):
            loaded = read_image(Path(image))
            found = self.segment(loaded.pixels_hwc, self._alone(), field=field)
            return replace(found, notes=(*loaded.notes, *found.notes))
        return self.segment(_as_array(image), self._alone(), field=field)

    def segment(
        self,
        image_hwc: npt.NDArray[np.uint8],
        network: Network,
        clock: StageClock | None = None,
        *,
        field: Field = "auto",
        scale: float | None = None,
    ) -> Segmentation:
        """Calling the segmenter, with a ``network`` of one's own.

        ``clock``: takes the seconds of each stage. ``field``: ``full`` takes the whole image for the field of view,
        surround and all. ``scale``: model px per image px as ``find_scale`` gave it; None: the segmenter's, which with
        ``cell_diameter_px="auto"`` is searched for in this image alone.
        """
        _check_image(image_hwc)
        check_field(field)
        clock = clock or StageClock()
        with clock("resize"):
            inside = find_field(image_hwc) if field == "auto" else None
            pointer = find_pointer(image_hwc, inside) if field == "auto" else None
            if pointer is not None:
                image_hwc = without_pointer(image_hwc, pointer)
            if inside is not None:
                image_hwc = without_surround(image_hwc, inside)
        notes = list[str]() if inside is None else [field_note(inside)]
        notes += [] if pointer is None else [pointer_note()]
        is_found = scale is not None or self.auto_scale
        if self.auto_scale and scale is None:
            scale = self.measured_scales.get((image_hwc.shape[0], image_hwc.shape[1]))
        if scale is None and self.auto_scale:
            choice = self.find_scale([image_hwc], network, clock, field="full")  # the surround is gone already
            scale = choice.scale
            notes += [choice.note] if choice.note else []
        scale = self.scale if scale is None else scale
        probabilities, labels = self._labels(image_hwc, scale, network, clock, inside)
        if field == "auto":
            with clock("label"):
                labels, n_drawn = without_drawn(image_hwc, labels)
            notes += [drawn_note(n_drawn)] if n_drawn else []
        if not is_found and scale == self.backend.spec.image_scale:  # not recorded if typed: a run again says the same
            note = size_note(labels, self.backend.spec.cell_diameter_px, scale)
            notes += [note] if note else []
        foreground = probabilities[list(self.backend.spec.channels).index("foreground")]
        if inside is None:
            note = lost_note(foreground, labels, self.params.foreground_threshold)
        else:  # what lies around the field is its mirror image
            seen = foreground[resize_mask(inside, (foreground.shape[0], foreground.shape[1]))]
            note = lost_note(seen, labels[inside], self.params.foreground_threshold)
        notes += [note] if note else []
        note = negative_note(image_hwc, labels > 0)
        notes += [note] if note else []
        with clock("measure"):
            table = measure(labels)
            if inside is not None:
                table.columns["touches_border"] |= edges(labels, inside, len(table)).any(axis=1)
        return Segmentation(
            labels, probabilities, table, scale, clock.seconds, tuple(notes), inside, self._model_cell_px(scale)
        )

    def _model_cell_px(self, scale: float) -> float:
        """Area of the model's typical cell in px of an image at ``scale``."""
        return float(np.pi / 4 * (self.backend.spec.cell_diameter_px / scale) ** 2)

    def find_scale(
        self,
        images: Iterable[npt.NDArray[np.uint8]],
        network: Network | None = None,
        clock: StageClock | None = None,
        *,
        field: Field = "auto",
    ) -> ScaleChoice:
        """The scale at which the cells of ``images``, uint8 RGB (h, w, 3), are as large as the model's; see
        ``cells.scale``. Of each image a part is kept; those after the first ``SAMPLE_IMAGES`` are not asked for.

        The model's own scale where the cells are nearly as large (``TOLERANCE``), and, with a note, where there are too
        few to tell. Raises as ``segment``.
        """
        spec, network, clock = self.backend.spec, network or self._alone(), clock or StageClock()
        most = round(spec.tile_size * max(scales.SEARCH_DIAMETERS_PX) / spec.cell_diameter_px)
        parts = list[npt.NDArray[np.uint8]]()
        for image_hwc in islice(images, scales.SAMPLE_IMAGES):
            _check_image(image_hwc)
            with clock("resize"):
                inside = find_field(image_hwc) if field == "auto" else None
                whole = image_hwc if inside is None else without_surround(image_hwc, inside)
                parts.append(whole[scales.crop_of((whole.shape[0], whole.shape[1]), most, 0)].copy())
        views = []
        for diameter in scales.SEARCH_DIAMETERS_PX:
            view, seen = scales.empty_view(spec.cell_diameter_px / diameter), set[str]()
            for index in range(scales.SEARCH_CROPS if parts else 0):
                view = self._with_crop(view, parts, index, network, clock, seen)
            views.append(view)
        best = scales.surest(views, spec.cell_diameter_px)
        if best is None:
            note = scales.too_few_note(spec.cell_diameter_px, spec.image_scale)
            return ScaleChoice(spec.image_scale, note, len(parts))
        for index in range(scales.SEARCH_CROPS, len(parts)):
            if len(best.areas_px) < scales.ENOUGH_CELLS:
                best = self._with_crop(best, parts, index, network, clock, set())
        found = best.scale * spec.cell_diameter_px / best.median_px
        is_near = max(found / spec.image_scale, spec.image_scale / found) <= scales.TOLERANCE
        return ScaleChoice(spec.image_scale if is_near else found, images=len(parts))

    def _with_crop(
        self,
        view: View,
        parts: Sequence[npt.NDArray[np.uint8]],
        index: int,
        network: Network,
        clock: StageClock,
        seen: set[str],
    ) -> View:
        """``view`` with crop ``index`` of ``parts``, which take turns, unless it is among those ``seen``."""
        spec, turn = self.backend.spec, index % len(parts)
        part = parts[turn]
        crop = scales.crop_of((part.shape[0], part.shape[1]), int(spec.tile_size / view.scale), index)
        if (name := f"{turn} {crop}") in seen:
            return view
        seen.add(name)
        probabilities, labels = self._labels(part[crop], view.scale, network, clock, None, at_model_scale=True)
        return view.with_crop(probabilities[list(spec.channels).index("foreground")], labels)

    def overlapped(self, jobs: Sequence[Job[T]], threads: ThreadPlan) -> Overlapped[T]:
        """Runs ``jobs``, which call ``segment`` with the network they are given, side by side; see ``batching``."""
        return Overlapped(
            jobs,
            self.backend.predict,
            batch=self.batch_size,
            step=self.backend.batch_step,
            helpers=threads.helpers,
            exclusive=threads.exclusive,
        )

    def results(self, jobs: Sequence[Job[T]], threads: ThreadPlan) -> Generator[T, None, None]:
        """What ``jobs`` return, in order; the first error of one is raised and ends all. Close it before the segmenter,
        if it may be left early (``contextlib.closing``): its threads use the backend."""
        with single_threaded_libraries(), self.overlapped(jobs, threads) as outcomes:
            for outcome in outcomes:
                yield outcome.get()

    def _alone(self) -> Network:
        return alone(self.backend.predict, self.batch_size)

    def bytes_in_flight(self, pixels: int, scale: float | None = None) -> int:
        """Bytes that an image of ``pixels`` px holds between its first step and its last: itself and its labels, and
        at model scale the image and its probabilities. A stage may hold more for a moment."""
        model_pixels = round(pixels * (self.scale if scale is None else scale) ** 2)
        return pixels * (3 + 4) + model_pixels * (3 + 4 * len(self.backend.spec.channels))

    def _labels(
        self,
        image_hwc: npt.NDArray[np.uint8],
        scale: float,
        network: Network,
        clock: StageClock,
        inside: Mask | None,
        *,
        at_model_scale: bool = False,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Probabilities at ``scale`` and labels at the image's own size, or ``at_model_scale``."""
        probabilities = self._probabilities(image_hwc, scale, network, clock)
        with clock("label"):
            labels = segment(
                probabilities,
                self.backend.spec.channels,
                self.params,
                cell_diameter_px=self.backend.spec.cell_diameter_px,
                out_hw=None if at_model_scale else (image_hwc.shape[0], image_hwc.shape[1]),
                border_cells=self.border_cells,
            )
            if inside is not None:
                rel = self.params.min_border_area_rel
                if self.border_cells == "visible":
                    rel = min(rel, VISIBLE_AREA_REL)
                largest_px = MAX_AREA * self._model_cell_px(scale)
                labels = inside_field(labels, inside, min_edge_area_rel=rel, max_area_px=largest_px)
        return probabilities, labels

    def _probabilities(
        self, image_hwc: npt.NDArray[np.uint8], scale: float, network: Network, clock: StageClock
    ) -> npt.NDArray[np.float32]:
        spec = self.backend.spec
        with clock("resize"):
            scaled = resize(image_hwc, scale)
        tiles = ImageTiles(scaled, tile_size=spec.tile_size, halo=self.halo, n_channels=len(spec.channels), clock=clock)
        del scaled  # the tiles have it, as long as they last
        network(tiles)
        with clock("tile"):
            return _checked_range(tiles.out_khw)

    def probabilities(self, image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities (K, h', w') float32 of ``image_hwc`` at model scale, before any labelling."""
        _check_image(image_hwc)
        return self._probabilities(image_hwc, self.scale, self._alone(), StageClock())

    def close(self) -> None:
        """Close the backend."""
        self.backend.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resize(image_hwc: npt.NDArray[np.uint8], scale: float) -> npt.NDArray[np.uint8]:
    """``image_hwc`` (h, w, 3) at ``scale`` output px per input px, at least 1 x 1: by area down, bilinear up.

    The same interpolation as in training. Raises ``DataError`` if the result would be too large.
    """
    import cv2

    if scale == 1:
        return image_hwc
    height, width = (max(1, round(side * scale)) for side in image_hwc.shape[:2])
    if height * width > _MAX_MODEL_PIXELS:
        raise DataError(
            f"at scale {scale:g} the image becomes {width} x {height} px, more than {_MAX_MODEL_PIXELS} pixels; "
            "check --scale or --cell-diameter"
        )
    if (height, width) == image_hwc.shape[:2]:
        return image_hwc
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_hwc, (width, height), interpolation=method), np.uint8)


def resize_mask(mask: Mask, hw: tuple[int, int]) -> Mask:
    """``mask`` (h, w) at the size ``hw``."""
    import cv2

    return np.asarray(cv2.resize(mask.astype(np.uint8), hw[::-1], interpolation=cv2.INTER_NEAREST)) > 0


def _as_array(image: Any) -> npt.NDArray[np.uint8]:
    """A PIL image as RGB; an array as it is."""
    if isinstance(image, np.ndarray):
        return image
    if type(image).__module__.partition(".")[0] == "PIL":
        return np.asarray(image.convert("RGB"))
    raise UsageError(
        f"image must be a uint8 RGB array (h, w, 3), a path or a PIL image, got {type(image).__name__}; "
        "call the segmenter once for each image, or run_folder for many"
    )


def _check_image(image_hwc: npt.NDArray[np.uint8]) -> None:
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[2] != 3 or image_hwc.size == 0:
        raise UsageError(
            f"image must be uint8 RGB (h, w, 3), got {image_hwc.dtype} {image_hwc.shape}; "
            "cellseg_deploy.images.read.read_image reads files to that"
        )


def _checked_range(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Clip rounding at 0 and 1 in place; raise ``ModelError`` where it is no rounding."""
    low, high = float(probabilities.min()), float(probabilities.max())
    if not (low >= -_PROBABILITY_SLACK and high <= 1 + _PROBABILITY_SLACK):
        raise ModelError(
            f"the network answered with values from {low:g} to {high:g} where probabilities were expected; "
            "was the model exported without its sigmoid? Export it again with cellseg-export"
        )
    return np.clip(probabilities, 0, 1, out=probabilities)
