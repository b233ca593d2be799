"""The result for one image, with everything an output format may need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.classes import CellClasses
from cellseg_deploy.cells.field_grid import Grid, grid
from cellseg_deploy.cells.measure import CellTable, in_micrometres
from cellseg_deploy.cells.polygons import CellPolygons, cell_polygons
from cellseg_deploy.cells.several import looks_like_several
from cellseg_deploy.outputs.palette import COUNTED_RGB, NOT_COUNTED_RGB, class_rgb

COUNTED = "counted"
LEFT_OUT_BY = "left_out_by"
"""Why a cell does not count: ``class``, ``border`` (the count rule), or empty. Present only if cells have classes."""
_COUNTED, _NOT_COUNTED = ("Cell", COUNTED_RGB), ("Cell not counted", NOT_COUNTED_RGB)


@dataclass(frozen=True)
class SegmentedImage:
    """One segmented image.

    ``name``: its name in every output. ``pixels_hwc``: uint8 RGB (h, w, 3). ``labels``: int32 (h, w), 0 background,
    1..n cells. ``table``: one row per cell, in order of label. ``counted``: bool (n,), whether the cell counts: by the
    count rule, and by its class. ``probabilities_khw``: float32 (K, h', w') in [0, 1] of ``channels``, at ``scale``
    model px per image px.
    ``pixel_size_um``: side of an image pixel in micrometres, None if unknown; ``pixel_size_source``: its source.
    ``model``, ``task``: their names. ``field``: bool (h, w), the field of view, None if it is the whole image.
    ``classes``: of the cells, None if the model distinguishes none; with classes ``table`` has their columns, and
    ``by_rule``, bool (n,), says whether the count rule admits the cell, whatever its class. ``pixels_are_spare``: the
    overlay may be drawn over ``pixels_hwc``.
    """

    name: str
    pixels_hwc: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    table: CellTable
    counted: npt.NDArray[np.bool_]
    probabilities_khw: npt.NDArray[np.float32]
    channels: tuple[str, ...]
    scale: float
    pixel_size_um: float | None
    model: str
    task: str
    pixel_size_source: str = ""
    field: npt.NDArray[np.bool_] | None = None
    classes: CellClasses | None = None
    by_rule: npt.NDArray[np.bool_] | None = None
    pixels_are_spare: bool = False

    def __post_init__(self) -> None:
        height, width = self.labels.shape
        if self.pixels_hwc.shape != (height, width, 3):
            raise ValueError(f"image {self.pixels_hwc.shape} and labels {self.labels.shape} must be of one size")
        if not len(self.table) == len(self.counted) == int(self.labels.max(initial=0)):
            raise ValueError(
                f"{len(self.table)} rows, {len(self.counted)} counted marks and labels up to "
                f"{self.labels.max(initial=0)}; expected one of each per cell"
            )
        if (self.classes is None) != (self.by_rule is None):
            raise ValueError("classes and the marks of the count rule belong together: give both or neither")
        if len(self.probabilities_khw) != len(self.channels):
            raise ValueError(f"{len(self.probabilities_khw)} probability planes for the channels {self.channels}")

    @cached_property
    def field_px(self) -> int:
        """Pixels of the field of view, the denominator of confluence and density."""
        return self.labels.size if self.field is None else int(np.count_nonzero(self.field))

    @cached_property
    def polygons(self) -> list[CellPolygons]:
        """Polygons of all cells in order of label; computed once for all formats."""
        return cell_polygons(self.labels)

    @cached_property
    def grid(self) -> Grid:
        """Figures per square of the field; computed once for the map and the table of confluence."""
        return grid(self.labels, self.table, self.counted, self.field)

    @cached_property
    def by_class(self) -> dict[str, int]:
        """Number of cells per class that the count rule admits, whether or not the class counts; empty without classes.

        The numbers of the counting classes add up to the number counted.
        """
        return {} if self.classes is None or self.by_rule is None else self.classes.numbers(self.by_rule)

    @cached_property
    def several(self) -> npt.NDArray[np.bool_]:
        """Whether each cell looks like several, bool (n,); cells of classes that do not count never do."""
        return several_of(self.table, self.classes)

    @cached_property
    def classifications(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Name and colour of each cell for programs that group by them, in order of label. With classes, cells that the
        count rule leaves out form groups of their own."""
        return list(classifications(self.counted, self.classes, self.by_rule))

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of cells.csv except the image's name: measurements, ``counted``, and micrometres if known."""
        return columns_of(self.table, self.counted, self.classes, self.pixel_size_um)


def several_of(table: CellTable, classes: CellClasses | None) -> npt.NDArray[np.bool_]:
    """Return ``SegmentedImage.several`` of the same members."""
    counts = np.ones(len(table), np.bool_) if classes is None else classes.counts
    found = np.zeros(len(table), np.bool_)
    areas, solidities, is_cut = (table.columns[name][counts] for name in ("area_px", "solidity", "touches_border"))
    found[counts] = looks_like_several(areas, solidities, is_cut, None if classes is None else classes.index[counts])
    return found


def columns_of(
    table: CellTable, counted: npt.NDArray[np.bool_], classes: CellClasses | None, pixel_size_um: float | None
) -> dict[str, npt.NDArray[Any]]:
    """Return ``SegmentedImage.columns`` of the same members."""
    columns = {**table.columns, COUNTED: counted}
    if classes is not None:
        columns[LEFT_OUT_BY] = np.select([~classes.counts, ~counted], ["class", "border"], "")
    return columns if pixel_size_um is None else columns | in_micrometres(table, pixel_size_um)


def classifications(
    counted: npt.NDArray[np.bool_], classes: CellClasses | None, by_rule: npt.NDArray[np.bool_] | None
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yield ``SegmentedImage.classifications`` of the same members."""
    if classes is None or by_rule is None:
        yield from (_COUNTED if is_counted else _NOT_COUNTED for is_counted in counted)
        return
    for index, is_in in zip(classes.index, by_rule, strict=True):
        name = classes.names[index]
        yield (name, class_rgb(int(index))) if is_in else (f"{name} not counted", NOT_COUNTED_RGB)
