"""Outlines of cells found block by block: as JSON in a file, read back in order of label."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cellseg_deploy.cells.label_runs import Ints, Labels
from cellseg_deploy.cells.polygons import CellPolygons, cell_polygons
from cellseg_deploy.files.atomic import writing
from cellseg_deploy.outputs.geojson import geometry


class Outlines:
    """Outlines in the file ``path``, which is replaced; 8 bytes per cell are in memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, array("q", [0])
        with writing(path):
            path.write_bytes(b"")

    def add(self, labels: Labels, top_left: tuple[int, int]) -> None:
        """Add the cells 1..n of ``labels`` (h, w), which lies at ``top_left`` (y, x) of the image."""
        shift = (top_left[1], top_left[0])
        with writing(self._path), self._path.open("ab") as file:
            for cell in cell_polygons(labels):
                rings = tuple(tuple(ring + shift for ring in polygon) for polygon in cell.polygons)
                file.write(data := msgspec.json.encode(geometry(CellPolygons(cell.label, rings))))
                self._at.append(self._at[-1] + len(data))

    def geometries(self, order: Ints) -> Iterator[msgspec.Raw]:
        """Yield the geometry of each cell; ``order``: their numbers from 0, as they were added."""
        with self._path.open("rb") as file:
            for number in order.tolist():
                file.seek(self._at[number])
                yield msgspec.Raw(file.read(self._at[number + 1] - self._at[number]))
