"""Blank tiles: bare glass, or nothing scanned. The network is asked once per colour in a band, not once per tile.

A tile, with its context, is blank if no channel varies in it by more than ``contrast`` levels: in its own pixels, or in
those of a smaller copy (``sparse_region``). Its answer is that of the network for a tile of one colour, the middle
between the tile's darkest and brightest. With a contrast of 0 that is the tile itself, so no result changes. With a
larger one it is an assumption: that the tile holds nothing to count.

Nothing is remembered from band to band: which tiles share a batch depends on the band alone, wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Network
from cellseg_deploy.cells.image_tiles import ImageTiles, Probabilities, Tiles
from cellseg_deploy.cells.label_runs import Ints
from cellseg_deploy.files.atomic import write_bytes, writing

EXACT, SKIP = 0, 24
"""Contrast up to which tiles are blank: by default, and with ``skip_blank``."""

Flags = npt.NDArray[np.bool_]


Colours = list[bytes | None]
"""RGB of each blank tile of a band; None for those that the network has to be asked about."""


def extremes(image_hwc: Tiles) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Darkest and brightest value of each channel of ``image_hwc`` (h, w, 3)."""
    return image_hwc.min(axis=0).min(axis=0), image_hwc.max(axis=0).max(axis=0)  # both axes at once: 100 times slower


def colour_of(image_hwc: Tiles, contrast: int) -> bytes | None:
    """RGB in the middle between the extremes of ``image_hwc`` (h, w, 3), None if they differ by over ``contrast``."""
    low, high = extremes(image_hwc)
    return (low + (high - low) // 2).tobytes() if bool((high - low <= contrast).all()) else None


def colours_in(tiles: ImageTiles, contrast: int) -> Colours:
    """Colours of the blank ones of ``tiles``, by their own pixels."""
    return [colour_of(tiles.cut(index, 1)[0], contrast) for index in range(len(tiles))]


def answer(tiles: ImageTiles, network: Network, colours: Colours) -> bytes:
    """Answer the ``tiles`` of a band, by ``network`` where it has to be asked; return a byte per tile: 1 if blank."""
    asked = [index for index, colour in enumerate(colours) if colour is None]
    blanks = {index: colour for index, colour in enumerate(colours) if colour is not None}
    some = _Asked(tiles, asked, [*dict.fromkeys(blanks.values())])
    if len(some):
        network(some)
    for index, colour in blanks.items():
        tiles.stitch(index, some.of_colour[colour][np.newaxis])
    return bytes(index in blanks for index in range(len(tiles)))


class BlankFlags:
    """Which tiles were blank, in the file ``path``: a byte per tile, ``per_band`` of them for each band.

    They are written before the answers of their band are. ``bands_done``: bands whose answers an earlier run left;
    flags of others are dropped. The attribute of that name: those of them whose flags are there; others have to be
    computed again.
    """

    def __init__(self, path: Path, *, per_band: int, bands_done: int) -> None:
        self._path, self._per_band = path, per_band
        with writing(path):
            kept = path.read_bytes() if path.exists() else b""
        self.bands_done = min(bands_done, len(kept) // per_band)
        write_bytes(path, kept[: per_band * self.bands_done])

    def append(self, flags: bytes) -> None:
        """Add the flags of the next band."""
        with writing(self._path), self._path.open("ab") as file:
            file.write(flags)

    @property
    def blank(self) -> Flags:
        """Whether each tile of the bands so far is blank, bool (bands, tiles of a band)."""
        return np.fromfile(self._path, np.bool_).reshape(-1, self._per_band)

    def on_overview(self, hw: tuple[int, int], steps: tuple[float, float], edges: tuple[Ints, Ints]) -> Flags:
        """Whether each pixel of an overview of ``hw`` lies in a blank tile, bool (h, w).

        ``steps``: from one pixel to the next, in px of the tiles' image. ``edges``: last row and column of each tile
        plus one.
        """
        rows, columns = (
            np.minimum(np.searchsorted(edge, np.arange(n) * step, side="right"), len(edge) - 1)
            for n, step, edge in zip(hw, steps, edges, strict=True)
        )
        return self.blank[rows][:, columns]


class _Asked(ImageTiles):
    """Some of ``tiles`` by their ``indices``, and after them a tile of each of ``colours``."""

    def __init__(self, tiles: ImageTiles, indices: Sequence[int], colours: Sequence[bytes]) -> None:
        self.clock, self._tiles, self._indices, self._colours = tiles.clock, tiles, indices, colours
        self.of_colour = dict[bytes, Probabilities]()

    def __len__(self) -> int:
        return len(self._indices) + len(self._colours)

    def cut(self, start: int, most: int) -> Tiles:
        """As ``ImageTiles.cut``."""
        chosen = range(start, min(start + most, len(self)))
        return np.concatenate([self._one(number) for number in chosen])

    def _one(self, number: int) -> Tiles:
        if number < len(self._indices):
            return self._tiles.cut(self._indices[number], 1)
        some = self._tiles.cut(0, 1)
        some[:] = np.frombuffer(self._colours[number - len(self._indices)], np.uint8)
        return some

    def stitch(self, start: int, probabilities_nkhw: Probabilities) -> None:
        """As ``ImageTiles.stitch``; the answers for colours are kept in ``of_colour``."""
        for number, answer in enumerate(probabilities_nkhw, start=start):
            if number < len(self._indices):
                self._tiles.stitch(self._indices[number], answer[np.newaxis])
            else:
                self.of_colour[self._colours[number - len(self._indices)]] = answer.copy()
