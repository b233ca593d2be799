"""Cells found block by block: their runs on disk, their rows in memory, numbered in raster order at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.blocks import BlockCells, BlockSettings
from cellseg_deploy.cells.classes import CellClasses, class_means
from cellseg_deploy.cells.label_runs import Ints, Labels, Runs, paint
from cellseg_deploy.cells.measure import CellTable, measure
from cellseg_deploy.files.atomic import writing
from cellseg_deploy.slides.outlines import Outlines

STRIP_ROWS = 512


class FoundCells:
    """All cells of a label image of ``settings.out_hw``; their runs lie in ``folder``, one file per strip of rows.

    ``with_outlines``: keep their outlines there too, for ``geometries``.
    """

    def __init__(self, folder: Path, settings: BlockSettings, *, with_outlines: bool = False) -> None:
        self._folder, self._settings = folder, settings
        self._first = [np.zeros(0, np.int64)]
        self._tables = list[dict[str, npt.NDArray[Any]]]()
        self._classes = list[tuple[Ints, npt.NDArray[np.float64]]]()
        self._count = 0
        self._numbers: npt.NDArray[np.int32] | None = None
        self._outlines = Outlines(folder / "outlines.bin") if with_outlines else None
        self._order = np.zeros(0, np.int64)
        self.pixels = 0
        for path in folder.glob("runs-*.bin"):  # of a run that was killed
            path.unlink()

    def add(self, part: BlockCells) -> None:
        """Measure the cells of ``part`` and keep them."""
        runs, settings = part.runs, self._settings
        left, top = int(runs.start.min()), int(runs.row[0])
        hw = (int(runs.row[-1]) + 1 - top, int(runs.stop.max()) - left)
        here = Runs(runs.label, runs.row - top, runs.start - left, runs.stop - left, hw)
        local = paint(here, here.label)
        table = measure(local, top_left=(top, left), image_hw=settings.out_hw, runs=here)
        self._tables.append(table.columns)
        if self._outlines is not None:
            self._outlines.add(local, (top, left))
        if settings.classes:
            window = part.window
            means = class_means(
                local,
                window.planes_khw[-len(settings.classes) :],
                len(table),
                of=(settings.hw, settings.out_hw),
                plane_at=(window.top, window.left),
                labels_at=(top, left),
            )
            index = means.argmax(axis=1).astype(np.int64)
            self._classes.append((index, means[np.arange(len(index)), index]))
        self.pixels += int(runs.length.sum())
        stored = np.stack([runs.label - 1 + self._count, runs.row, runs.start, runs.stop], axis=1).astype(np.int32)
        strip = runs.row // STRIP_ROWS
        for number in np.unique(strip):
            low, high = np.searchsorted(strip, [number, number + 1])
            with writing(self._folder), self._path(int(number)).open("ab") as file:
                file.write(stored[low:high].tobytes())
        self._first.append(part.first)
        self._count += len(part.first)

    def finish(self, counting: Sequence[str]) -> tuple[CellTable, CellClasses | None]:
        """Number the cells 1..n in raster order of their first pixels and return their table and classes."""
        order = self._order = np.argsort(np.concatenate(self._first))
        self._first = []
        self._numbers = np.empty(len(order), np.int32)
        self._numbers[order] = np.arange(1, len(order) + 1, dtype=np.int32)
        if not self._tables:
            empty = measure(np.zeros((1, 1), np.int32))
            self._tables.append(empty.columns)
        columns = {name: np.concatenate([table[name] for table in self._tables])[order] for name in self._tables[0]}
        columns["label"] = np.arange(1, len(order) + 1, dtype=np.int64)
        self._tables = []
        classes = None
        if self._settings.classes:
            index = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in self._classes)])[order]
            share = np.concatenate([np.zeros(0), *(part[1] for part in self._classes)])[order]
            classes = CellClasses(self._settings.classes, tuple(counting), index, share)
            columns.update(classes.columns)
        return CellTable(columns), classes

    def geometries(self) -> Iterator[msgspec.Raw]:
        """Yield the outline of each cell in order of label, as GeoJSON; after ``finish``, if they were kept."""
        assert self._outlines is not None
        return self._outlines.geometries(self._order)

    def strips(self) -> Iterator[Labels]:
        """Yield the labels strip by strip, as ``strip``; after ``finish``."""
        return map(self.strip, range(-(-self._settings.out_hw[0] // STRIP_ROWS)))

    def strip(self, number: int) -> Labels:
        """Labels of the strip of rows ``number``, int32 (rows, w); after ``finish``."""
        assert self._numbers is not None
        top = number * STRIP_ROWS
        hw = (min(STRIP_ROWS, self._settings.out_hw[0] - top), self._settings.out_hw[1])
        path = self._path(number)
        if not path.exists():
            return np.zeros(hw, np.int32)
        stored = np.fromfile(path, np.int32).reshape(-1, 4).astype(np.int64)
        stored = stored[np.lexsort((stored[:, 2], stored[:, 1]))]
        runs = Runs(stored[:, 0], stored[:, 1] - top, stored[:, 2], stored[:, 3], hw)
        return paint(runs, self._numbers[runs.label])

    def _path(self, strip: int) -> Path:
        return self._folder / f"runs-{strip}.bin"
