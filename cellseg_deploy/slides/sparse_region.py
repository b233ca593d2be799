"""Bare glass, found in a small copy of the image that its pyramid holds, so that the glass itself is never decoded.

The level that judges is the smallest one on which a cell is still ``LEAST_CELL_PX`` wide. A tile is blank if no channel
varies there by more than a contrast, in the tile with all its context. ``SparseRegion`` has the image's own pixels
wherever a tile that is not blank reaches, and those of the small copy, enlarged, everywhere else. Neither depends on
who asks, or in which order: the network, the overview and the workers of a cluster see the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cells.tiling import Tile
from cellseg_deploy.errors import DataError
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank
from cellseg_deploy.slides.blank import Colours
from cellseg_deploy.slides.network import bands_of
from cellseg_deploy.slides.region import Pixels, Region

LEAST_CELL_PX = 8
_CHECKED_TILES = 32
_CHECKED_CELLS = 3
_ROWS_HELD = 256

Spans = npt.NDArray[np.int64]
"""First pixel and pixel after the last, (n, 2)."""


def sparse_region(segmenter: Segmenter, region: Region, scale: float, contrast: int) -> SparseRegion | None:
    """Return ``region`` without the glass, for tiles at ``scale`` model px per px of it.

    ``contrast``: of a blank tile at most. None if tiles have to be judged by their own pixels: with a contrast of 0,
    which promises that no result changes, or if cells are too small on every smaller level.
    """
    levels = region.reader.levels
    cell_px = segmenter.backend.spec.cell_diameter_px / scale
    shrink = [min(n / full for n, full in zip(hw, levels[region.level], strict=True)) for hw in levels]
    fitting = [n for n, by in enumerate(shrink) if n > region.level and by < 1 and by * cell_px >= LEAST_CELL_PX]
    if contrast <= blank.EXACT or not fitting:
        return None
    return SparseRegion(segmenter, region, scale, contrast, min(fitting, key=lambda n: shrink[n]))


class SparseRegion:
    """``region``, whose blank tiles were found on ``level`` of its pyramid; see the module."""

    def __init__(self, segmenter: Segmenter, region: Region, scale: float, contrast: int, level: int) -> None:
        self.level, self._region, self._contrast = level, region, contrast
        spec, out_hw = segmenter.backend.spec, scaled_size(region.hw, scale)
        bands, across = (bands_of((n, 1), spec.tile_size, segmenter.halo) for n in out_hw)
        self._number = {band.write[0].start: number for number, band in enumerate(bands)}
        self._rows, self._columns = (
            _reach(tiles, n_out, n) for tiles, n_out, n in zip((bands, across), out_hw, region.hw, strict=True)
        )
        sizes = (region.reader.levels[level], region.reader.levels[region.level])
        self._small_rows, self._small_columns = (
            _on_small(spans, at, *lengths)
            for spans, at, lengths in zip(
                (self._rows, self._columns), (region.y, region.x), zip(*sizes, strict=True), strict=True
            )
        )
        self._row_at, self._column_at = (
            np.minimum((np.arange(at, at + n) + 0.5) * small / full, small - 1).astype(np.int64)
            for at, n, small, full in zip((region.y, region.x), region.hw, *sizes, strict=True)
        )
        self._checked_px = round(_CHECKED_CELLS * spec.cell_diameter_px / scale)
        self._judged = dict[int, Colours]()
        self._held: tuple[int, Pixels] = (0, np.empty((0, sizes[0][1], 3), np.uint8))

    def colours(self, band: Tile) -> Colours:
        """Colours of the blank tiles of a band of ``bands_of``."""
        return self._colours(self._number[band.write[0].start])

    def rows(self, start: int, stop: int) -> Pixels:
        """As ``Region.rows``, with the pixels of the small copy where only blank tiles reach."""
        out = np.empty((stop - start, self._region.width, 3), np.uint8)
        edges = np.unique(self._rows)
        cuts = [start, *edges[(edges > start) & (edges < stop)].tolist(), stop]
        for top, bottom in pairwise(cuts):
            part, rows = out[top - start : bottom - start], slice(top, bottom)
            wanted = [*_joined(self._columns[self._is_read(top)])]
            if wanted != [(0, self._region.width)]:
                at = self._row_at[top:bottom]
                small = self._small(int(at[0]), int(at[-1]) + 1)
                part[:] = small.take(self._column_at, axis=1).take(at - at[0], axis=0)  # [] takes 14 times as long
            for left, right in wanted:
                part[:, left:right] = self._region.part(rows, slice(left, right))
        return out

    def check(self) -> None:
        """Raise ``DataError`` if the small copy hides what the image shows.

        Reads the image in the middle of up to 32 blank tiles, evenly chosen. Reduced to the pixels of the small copy,
        they may vary by twice the contrast, for what compression does to colours.
        """
        import cv2

        blanks = [
            (band, tile)
            for band in range(len(self._rows))
            for tile, colour in enumerate(self._colours(band))
            if colour is not None
        ]
        for index in np.unique(np.linspace(0, len(blanks) - 1, _CHECKED_TILES).round().astype(int) if blanks else []):
            band, tile = blanks[index]
            rows, columns = (
                _middle(spans[number], self._checked_px)
                for spans, number in ((self._rows, band), (self._columns, tile))
            )
            pixels = self._region.part(rows, columns)
            size = (np.ptp(self._column_at[columns]) + 1, np.ptp(self._row_at[rows]) + 1)
            low, high = blank.extremes(np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)))
            if (high - low > 2 * self._contrast).any():
                region = self._region
                raise DataError(
                    f"{region.reader.name}: level {self.level} of the pyramid shows bare glass around "
                    f"{columns.start + region.x},{rows.start + region.y} px, where level {region.level} does not "
                    f"(contrast of {int((high - low).max())} levels); expected a smaller copy of the picture: save the "
                    "pyramid again, or run without `skip_blank` (into this folder with `overwrite`)"
                )

    def _colours(self, number: int) -> Colours:
        if number not in self._judged:
            rows = self._small(*self._small_rows[number].tolist())
            tiles = (rows[:, left:right] for left, right in self._small_columns.tolist())
            self._judged[number] = [blank.colour_of(tile, self._contrast) for tile in tiles]
        return self._judged[number]

    def _is_read(self, row: int) -> npt.NDArray[np.bool_]:
        """Whether each tile across is not blank in one of the bands that reach ``row``."""
        bands = np.flatnonzero((self._rows[:, 0] <= row) & (row < self._rows[:, 1])).tolist()
        flags = [[colour is None for colour in self._colours(band)] for band in bands]
        return np.asarray(np.array(flags, np.bool_).any(axis=0))

    def _small(self, start: int, stop: int) -> Pixels:
        """Whole rows of the small copy. Some are held: those asked for next usually follow."""
        at, held = self._held
        if not at <= start <= stop <= at + len(held):
            reader = self._region.reader
            height, width = reader.levels[self.level]
            at, more = start, min(max(stop, start + _ROWS_HELD), height)
            held = reader.read(at, 0, more - at, width, self.level)
            self._held = at, held
        return held[start - at : stop - at]


def _reach(tiles: Sequence[Tile], n_out: int, n: int) -> Spans:
    """Pixels of ``n`` that the context of each of ``tiles``, along one axis of ``n_out`` px at the model's scale, is
    made of. A resized pixel is made of the pixels it covers and, when enlarged, of one on each side."""
    read = np.array([(tile.read[0].start, min(tile.read[0].stop, n_out)) for tile in tiles], np.int64)
    return _outward(read, n / n_out, n)


def _on_small(spans: Spans, at: int, small: int, full: int) -> Spans:
    """The same of an axis of ``small`` px, for ``spans`` that begin ``at`` px of ``full``."""
    return _outward(spans + at, small / full, small)


def _outward(spans: Spans, step: float, n: int) -> Spans:
    """``spans`` times ``step``, rounded outward, with one pixel more on each side, within ``n`` px."""
    return (
        np.stack([np.floor(spans[:, 0] * step) - 1, np.ceil(spans[:, 1] * step) + 1], axis=1)
        .clip(0, n)
        .astype(np.int64)
    )


def _joined(spans: Spans) -> Iterator[tuple[int, int]]:
    """Yield ``spans``, sorted by their starts, those that touch or overlap as one."""
    before: tuple[int, int] | None = None
    for left, right in spans.tolist():
        if before is not None and left <= before[1]:
            before = (before[0], right)
            continue
        if before is not None:
            yield before
        before = (left, right)
    if before is not None:
        yield before


def _middle(span: npt.NDArray[np.int64], n: int) -> slice:
    """The ``n`` px in the middle of ``span``, or all of it."""
    start, stop = span.tolist()
    more = max(0, math.floor((stop - start - n) / 2))
    return slice(start + more, min(stop, start + more + n))
