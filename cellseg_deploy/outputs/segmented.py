"""What one image gives: everything an output format may want to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.field_grid import Grid, grid
from cellseg_deploy.cells.measure import CellTable, in_micrometres
from cellseg_deploy.cells.polygons import CellPolygons, cell_polygons

COUNTED = "counted"


@dataclass(frozen=True)
class SegmentedImage:
    """One segmented image.

    ``name``: its name in every output. ``pixels_hwc``: uint8 RGB (h, w, 3). ``labels``: int32 (h, w), 0 background,
    1..n cells. ``table``: a row a cell, in order of label. ``counted``: bool (n,), whether the count rule lets the
    cell in. ``probabilities_khw``: float32 (K, h', w') in [0, 1] of ``channels``, at ``scale`` model px per image px.
    ``pixel_size_um``: side of an image pixel in micrometres, None if unknown; ``pixel_size_source``: who says so.
    ``model``, ``task``: their names. ``field``: bool (h, w), the field of view, None if it is the whole image.
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

    def __post_init__(self) -> None:
        height, width = self.labels.shape
        if self.pixels_hwc.shape != (height, width, 3):
            raise ValueError(f"image {self.pixels_hwc.shape} and labels {self.labels.shape} must be of one size")
        if not len(self.table) == len(self.counted) == int(self.labels.max(initial=0)):
            raise ValueError(
                f"{len(self.table)} rows, {len(self.counted)} counted marks and labels up to "
                f"{self.labels.max(initial=0)}; expected one of each a cell"
            )
        if len(self.probabilities_khw) != len(self.channels):
            raise ValueError(f"{len(self.probabilities_khw)} probability planes for the channels {self.channels}")

    @cached_property
    def field_px(self) -> int:
        """Pixels of the field of view: what confluence and density refer to."""
        return self.labels.size if self.field is None else int(np.count_nonzero(self.field))

    @cached_property
    def polygons(self) -> list[CellPolygons]:
        """Polygons of all cells in order of label; made once, for all formats that want them."""
        return cell_polygons(self.labels)

    @cached_property
    def grid(self) -> Grid:
        """Figures of the squares of the field; made once, for the map and the table of confluence."""
        return grid(self.labels, self.table, self.counted, self.field)

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Columns of cells.csv but the image's name: measurements, ``counted``, and micrometres where known."""
        columns = {**self.table.columns, COUNTED: self.counted}
        return columns if self.pixel_size_um is None else columns | in_micrometres(self.table, self.pixel_size_um)
