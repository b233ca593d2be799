"""The network over a region, band of tiles by band, and its answers in a file.

The file is the only record of what is done: float32, row by row, (h, K, w). A run that was killed continues after the
last complete band in it. The answers are those of ``Segmenter`` for the whole image: the same resized pixels, the same
tiles. Those of a band depend on its own pixels alone, so it does not matter which process computes it, or when.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Network
from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock, checked_probabilities
from cellseg_deploy.cells.row_resize import ReadRows, RowResizer
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import remove, writing
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import blank
from cellseg_deploy.slides.blank import Colours
from cellseg_deploy.slides.region import Pixels

Probabilities = npt.NDArray[np.float32]
_ROWS_READ = 64
_COPIED_BYTES = 1 << 20
_SOURCE_PX = 2_000_000
"""Pixels of the image that are resized at once: in 32-bit floats few enough for the processor's caches."""


class NoDiskError(OutputError):
    """The network's answers for one image do not fit on the disk."""


class ProbabilityFile:
    """Probabilities (K, h, w) of ``n_channels`` and ``hw`` in the file ``path``, whose first rows may be there already.

    Raises ``NoDiskError`` if the disk has no room for them and ``spare_bytes``.
    """

    def __init__(self, path: Path, n_channels: int, hw: tuple[int, int], *, spare_bytes: int = 0) -> None:
        self.path, self.hw, self.n_channels = path, hw, n_channels
        self._row_bytes = 4 * n_channels * hw[1]
        with writing(path):
            path.touch()
            needed = self._row_bytes * hw[0] - path.stat().st_size + spare_bytes
            free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise NoDiskError(
                f"{path.parent}: the network's results need {needed / 1e9:.1f} GB there until the labels are made, and "
                f"{free / 1e9:.1f} GB are free; choose an output folder on a larger disk"
            )

    @property
    def rows_done(self) -> int:
        """Complete rows in the file."""
        return self.path.stat().st_size // self._row_bytes

    def cut_to(self, rows: int) -> None:
        """Remove what a killed process left behind the first ``rows`` rows."""
        with writing(self.path), self.path.open("r+b") as file:
            file.truncate(rows * self._row_bytes)

    def append(self, rows: Probabilities | Path) -> None:
        """Add rows, (rows, K, w), or those that a file holds, which is then removed."""
        if isinstance(rows, Path):
            try:
                source = rows.open("rb")
            except OSError as error:
                raise OutputError(
                    f"{rows}: cannot be read ({error.strerror or error}); run again, which resumes"
                ) from error
            with source, writing(self.path), self.path.open("ab") as file:
                shutil.copyfileobj(source, file, _COPIED_BYTES)
            remove(rows)
        else:
            with writing(self.path), self.path.open("ab") as file:
                file.write(rows.data)

    def read(self, rows: slice, columns: slice) -> Probabilities:
        """Read a part, float32 (K, rows, columns)."""
        out = np.empty((self.n_channels, rows.stop - rows.start, columns.stop - columns.start), np.float32)
        shape = (self.hw[0], self.n_channels, self.hw[1])
        for start in range(rows.start, rows.stop, _ROWS_READ):
            stop = min(start + _ROWS_READ, rows.stop)
            stored = np.memmap(self.path, np.float32, "r", shape=shape)  # mapped pages count as memory: not for long
            out[:, start - rows.start : stop - rows.start] = stored[start:stop, :, columns].transpose(1, 0, 2)
            del stored
        return out

    def share_from(self, channel: int, threshold: float) -> float:
        """Share of the pixels of ``channel`` that are ``threshold`` or more."""
        n, shape = 0, (self.hw[0], self.n_channels, self.hw[1])
        for start in range(0, self.hw[0], _ROWS_READ):
            stored = np.memmap(self.path, np.float32, "r", shape=shape)
            n += int(np.count_nonzero(stored[start : start + _ROWS_READ, channel] >= threshold))
            del stored
        return n / (self.hw[0] * self.hw[1])


def bands_of(hw: tuple[int, int], tile_size: int, halo: int) -> tuple[tiling.Tile, ...]:
    """One tile per band of tiles of an image of ``hw`` px; only their rows have a meaning."""
    return tiling.plan((hw[0], 1), tile_size, halo).tiles


def tiles_in(hw: tuple[int, int], tile_size: int, halo: int) -> int:
    """Number of tiles in an image of ``hw`` px at model scale."""
    return len(bands_of(hw, tile_size, halo)) * len(bands_of((hw[1], 1), tile_size, halo))


@dataclass(frozen=True)
class Band:
    """``rows``: probabilities of the rows that a band of tiles owns, (rows, K, w), or a file of them. ``blank``: see
    ``BlankFlags``. ``seconds``: by stage, as another process measured them."""

    rows: Probabilities | Path
    blank: bytes
    seconds: Mapping[str, float] = field(default_factory=dict)


class BandNetwork:
    """The ``network`` over bands of tiles of an image of ``image_hw`` px at ``scale``; ``read``: rows of the image.

    ``contrast``: see ``slides.blank``. ``judge``: says which tiles of a band are blank, None to look at their pixels.
    The rows of a band that is blank are not read. A band after its neighbour takes the resized rows that both need.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        image_hw: tuple[int, int],
        read: ReadRows,
        scale: float,
        network: Network,
        *,
        contrast: int,
        judge: Callable[[tiling.Tile], Colours] | None = None,
        clock: StageClock,
    ) -> None:
        self._segmenter, self._network, self._clock = segmenter, network, clock
        self._contrast, self._judge = contrast, judge
        self._resizer = RowResizer(read, image_hw, scale)
        self._at, self._strip = 0, np.empty((0, self._resizer.out_hw[1], 3), np.uint8)

    def __call__(self, band: tiling.Tile) -> Band:
        """Compute one of the bands of ``bands_of``."""
        spec, start = self._segmenter.backend.spec, band.read[0].start
        colours = None if self._judge is None else self._judge(band)
        tiles = ImageTiles(
            self._resized(start, min(band.read[0].stop, self._resizer.out_hw[0]), is_blank=_all_blank(colours)),
            tile_size=spec.tile_size,
            halo=self._segmenter.halo,
            n_channels=len(spec.channels),
            clock=self._clock,
        )
        if colours is None:
            colours = blank.colours_in(tiles, self._contrast)
        flags = blank.answer(tiles, self._network, colours)
        rows = slice(band.write[0].start - start, band.write[0].stop - start)
        return Band(np.ascontiguousarray(checked_probabilities(tiles.out_khw)[:, rows].transpose(1, 0, 2)), flags)

    def _resized(self, start: int, stop: int, *, is_blank: bool) -> Pixels:
        """Rows of the resized image; of a blank band any pixels, as nobody looks at them."""
        width = self._resizer.out_hw[1]
        if is_blank:
            return np.zeros((stop - start, width, 3), np.uint8)
        if not self._at <= start <= self._at + len(self._strip):
            self._at, self._strip = start, np.empty((0, width, 3), np.uint8)
        with self._clock("resize"):
            more = _rows(self._resizer, self._at + len(self._strip), stop)
            self._strip = np.concatenate([self._strip[start - self._at :], more])
        self._at = start
        return self._strip


def _all_blank(colours: Colours | None) -> bool:
    return colours is not None and None not in colours


def _rows(resizer: RowResizer, start: int, stop: int) -> Pixels:
    """Rows of the resized image, without all of their originals in memory at once."""
    step = max(1, round(_SOURCE_PX * resizer.scale / resizer.image_hw[1]))
    return np.concatenate([resizer.rows(top, min(top + step, stop)) for top in range(start, stop, step)])
