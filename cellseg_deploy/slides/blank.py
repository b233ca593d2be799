"""Blank tiles: bare glass, or nothing scanned. The network is asked once per colour, not once per tile.

A tile, with its context, is blank if no channel varies in it by more than ``contrast`` levels. Its answer is that of
the network for a tile of one colour, the middle between the tile's darkest and brightest. With a contrast of 0 that is
the tile itself, so no result changes. With a larger one it is an assumption: that the tile holds nothing to count.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.batching import Predict, alone
from cellseg_deploy.cells.image_tiles import ImageTiles, Probabilities, Tiles
from cellseg_deploy.cells.label_runs import Ints
from cellseg_deploy.files.atomic import writing

EXACT, SKIP = 0, 24
"""Contrast up to which tiles are blank: by default, and with ``skip_blank``."""
_KEPT_ANSWERS = 8

Flags = npt.NDArray[np.bool_]


class BlankTiles:
    """A network for the bands of one image, each of ``per_band`` tiles; ``predict`` is asked what has to be asked.

    Which tiles were blank is kept in the file ``path``, a byte per tile, written before the answers of their band are.
    ``bands_done``: bands whose answers an earlier run left; flags of others are dropped.
    """

    def __init__(
        self, predict: Predict, batch_size: int, contrast: int, path: Path, *, per_band: int, bands_done: int
    ) -> None:
        self._predict, self._contrast = predict, contrast
        self._network = alone(self._answers, batch_size)
        self._path, self._per_band = path, per_band
        self._flags = bytearray()
        self._of_colour = OrderedDict[bytes, Probabilities]()
        with writing(path):
            kept = path.read_bytes()[: per_band * bands_done] if path.exists() else b""
            path.write_bytes(kept.ljust(per_band * bands_done, b"\0"))

    def __call__(self, tiles: ImageTiles) -> None:
        """Answer the tiles of the next band."""
        self._flags.clear()
        self._network(tiles)
        with writing(self._path), self._path.open("ab") as file:
            file.write(self._flags)

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

    def _answers(self, tiles_nhwc: Tiles) -> Probabilities:
        low, high = tiles_nhwc.min(axis=(1, 2)), tiles_nhwc.max(axis=(1, 2))
        blank = (high - low <= self._contrast).all(axis=1)
        self._flags += blank.tobytes()
        if not blank.any():
            return self._predict(tiles_nhwc)
        colours = [colour.tobytes() for colour in (low + (high - low) // 2)[blank]]
        unknown = [colour for colour in dict.fromkeys(colours) if colour not in self._of_colour]
        one_colour = np.frombuffer(b"".join(unknown), np.uint8).reshape(-1, 1, 1, 3)
        size = tiles_nhwc.shape[1:]
        asked = np.concatenate([tiles_nhwc[~blank], np.broadcast_to(one_colour, (len(unknown), *size))])
        answers = self._predict(asked) if len(asked) else None
        for index, colour in enumerate(unknown, start=len(asked) - len(unknown)):
            assert answers is not None
            self._of_colour[colour] = answers[index].copy()
        some = next(iter(self._of_colour.values()))
        out = np.empty((len(tiles_nhwc), *some.shape), np.float32)
        if answers is not None:
            out[~blank] = answers[: len(asked) - len(unknown)]
        for index, colour in zip(np.flatnonzero(blank).tolist(), colours, strict=True):
            out[index] = self._of_colour[colour]
            self._of_colour.move_to_end(colour)
        while len(self._of_colour) > _KEPT_ANSWERS:
            self._of_colour.popitem(last=False)
        return out
