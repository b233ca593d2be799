"""Masks that are read once: the areas of all objects are wanted before the first image is judged, the labels then.

What was read is kept in memory, deflated: some 40 kB for a smear of 1600 x 1200 px, which is back in milliseconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.ignored import without_ignored
from cellseg_deploy.evaluate.specks import areas_of
from cellseg_deploy.images.find import Pair
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import read_labels

Labels = npt.NDArray[np.int32]
_LEVEL = 1  # of zlib: labels are long runs, and higher levels take three times as long for a third less


class Truths:
    """The masks of some pairs.

    ``areas``: in px, of all objects in them, int64 (n,).
    """

    def __init__(self, pairs: Sequence[Pair], foreground: MaskForeground) -> None:
        """Read the masks of ``pairs``; ``foreground`` as in ``read_labels``. Raises ``DataError`` naming a bad mask."""
        self._kept: dict[Path, tuple[tuple[int, ...], bytes]] = {}
        self.areas = areas_of(without_ignored(self._read(pair.mask, foreground)) for pair in pairs)

    def labels_of(self, pair: Pair) -> Labels:
        """True labels (h, w) of ``pair``, ignored pixels marked (see ``read_labels``), a new array each time."""
        shape, deflated = self._kept[pair.mask]
        return np.frombuffer(bytearray(zlib.decompress(deflated)), np.int32).reshape(shape)

    def _read(self, mask: Path, foreground: MaskForeground) -> Labels:
        labels = read_labels(mask, foreground=foreground, keep_ignored=True)
        self._kept[mask] = labels.shape, zlib.compress(labels.tobytes(), _LEVEL)
        return labels
