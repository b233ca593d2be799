"""The result for one image, and how to view and save it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.count_rules import DEFAULT_RULE, CountRule, counted
from cellseg_deploy.cells.field_of_view import Mask, edges
from cellseg_deploy.cells.measure import CellTable
from cellseg_deploy.errors import check_types, plural
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.outputs.formats import format_for
from cellseg_deploy.outputs.image_table import ImageTable
from cellseg_deploy.outputs.segmented import SegmentedImage

TABLE_SUFFIX = ".csv"
NO_PROBABILITIES: npt.NDArray[np.float32] = np.zeros((0, 1, 1), np.float32)


@dataclass(frozen=True, repr=False)
class Segmentation:
    """The cells of one image.

    ``labels``: int32 (h, w), 0 background, 1..n the cells in raster order. ``probabilities_khw``: float32 (K, h', w')
    in [0, 1] of ``channels``, at ``scale`` model px per image px. ``measured``: one row per cell, in image px.
    ``pixels_hwc``: the image, uint8 RGB (h, w, 3). ``seconds``: by stage. ``notes``: remarks for the user.
    ``field``: bool (h, w), the field of view, outside of which there are no cells; None if it is the whole image.
    ``model_cell_px``: area of the model's typical cell in px of the image. ``model``, ``task``: their names.
    ``name``: of the image. ``count_rule``: which cells at the border count. ``pixel_size_um``: side of a pixel in
    micrometres, None if unknown; ``pixel_size_source``: its source. ``classes``: of the cells, None if the model
    distinguishes none; with classes ``table`` has the columns ``class`` and ``class_probability``.

    >>> cells = model("smear.png")
    >>> cells.count == len(cells.table) == cells.labels.max().item()
    True
    >>> cells.save("smear.tif")
    >>> cells.overlay("smear.jpg")
    """

    labels: npt.NDArray[np.int32]
    probabilities_khw: npt.NDArray[np.float32]
    measured: CellTable
    scale: float
    seconds: dict[str, float]
    pixels_hwc: npt.NDArray[np.uint8]
    channels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    field: Mask | None = None
    model_cell_px: float | None = None
    model: str = ""
    task: str = ""
    name: str = "image"
    count_rule: CountRule = DEFAULT_RULE
    pixel_size_um: float | None = None
    pixel_size_source: str = ""
    classes: CellClasses | None = None

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Segmentation({self.name!r}, {width} x {height} px, {plural(self.count, 'cell')})"

    @property
    def count(self) -> int:
        """Number of cells found, including cells cut by the border; ``counted`` tells which of them count."""
        return int(self.labels.max(initial=0))

    @property
    def confluence(self) -> float:
        """Share of the field of view that is covered by cells, 0 to 1."""
        size = self.labels.size if self.field is None else np.count_nonzero(self.field)
        return float(np.count_nonzero(self.labels) / size)

    @cached_property
    def table(self) -> ImageTable:
        """The columns of cells.csv, one row per cell; ``table["area_px"]`` is an array (n,)."""
        return ImageTable(self.segmented.columns, self.name)

    def counted(self, rule: CountRule | None = None) -> npt.NDArray[np.bool_]:
        """Return whether each cell counts, bool (n,) in order of label: under ``rule`` (None for ``count_rule``), and
        by its class."""
        by_rule = self.by_rule(rule)
        return by_rule if self.classes is None else by_rule & self.classes.counts

    def by_rule(self, rule: CountRule | None = None) -> npt.NDArray[np.bool_]:
        """Return whether ``rule`` admits each cell, whatever its class, bool (n,); see ``cells.count_rules``."""
        return counted(
            self.measured.boxes,
            (self.labels.shape[0], self.labels.shape[1]),
            self.count_rule if rule is None else rule,
            None if self.field is None else edges(self.labels, self.field, self.count),
            areas_px=self.measured.columns["area_px"],
            model_cell_px=self.model_cell_px,
            class_of=None if self.classes is None else self.classes.index,
        )

    @cached_property
    def segmented(self) -> SegmentedImage:
        """Return this result in the form that output formats take."""
        return SegmentedImage(
            name=self.name,
            pixels_hwc=self.pixels_hwc,
            labels=self.labels,
            table=self.measured,
            counted=self.counted(),
            probabilities_khw=self.probabilities_khw,
            channels=self.channels,
            scale=self.scale,
            pixel_size_um=self.pixel_size_um,
            model=self.model,
            task=self.task,
            pixel_size_source=self.pixel_size_source,
            field=self.field,
            classes=self.classes,
            by_rule=None if self.classes is None else self.by_rule(),
        )

    def save(self, path: str | Path, kind: str | None = None) -> None:
        """Write the result to ``path``, in the format of its suffix, byte-equal to the file that a folder run writes.

        ``.tif`` label image, ``.jpg`` overlay, ``.csv`` table, ``.zip`` ImageJ regions, ``.geojson`` for QuPath,
        ``.json`` COCO. ``kind``: another format with that suffix, by its name for ``run`` (``numbered``,
        ``probabilities``, ``confluence``); pictures that are named by ``kind`` may be ``.png``. The folder must exist.

        Raises ``UsageError`` for an unknown suffix or kind, ``BackendUnavailableError`` if a format needs a package
        that is not installed, ``OutputError`` if the file cannot be written.
        """
        check_types("a path", path=path)
        check_types("a name or None", kind=kind)
        path = Path(path)
        if kind is None and path.suffix.lower() == TABLE_SUFFIX:
            self.table.to_csv(path)
            return
        chosen, suffix = format_for(path, kind)
        write_bytes(path, chosen.encode(self.segmented, suffix))

    def overlay(self, path: str | Path) -> None:
        """Write the image with all outlines and the count to ``path``, a ``.jpg`` or ``.png``. Raises as ``save``."""
        self.save(path, "overlays")


def of_labels(
    labels: npt.NDArray[np.int32],
    measured: CellTable,
    pixels_hwc: npt.NDArray[np.uint8],
    *,
    field: Mask | None,
    classes: CellClasses | None,
    model: str,
    task: str = "",
    name: str = "image",
    scale: float = 1.0,
    model_cell_px: float | None = None,
    notes: Sequence[str] = (),
) -> Segmentation:
    """Return the cells of a label image as a result without the output of a network. Arguments as in ``Segmentation``.

    ``measured``: the table of ``labels``; it gets the cells that the field's edge cuts, and the columns of the classes.
    """
    if field is not None:
        measured.columns["touches_border"] |= edges(labels, field, len(measured)).any(axis=1)
    if classes is not None:
        measured.columns.update(classes.columns)
    return Segmentation(
        labels=labels,
        probabilities_khw=NO_PROBABILITIES,
        measured=measured,
        scale=scale,
        seconds={},
        pixels_hwc=pixels_hwc,
        channels=(),
        notes=tuple(notes),
        field=field,
        model_cell_px=model_cell_px,
        model=model,
        task=task,
        name=name,
        classes=classes,
    )
