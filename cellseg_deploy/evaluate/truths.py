"""Masks that are read once: all object areas are needed before the first image is judged, the labels during it.

Masks are kept in memory, deflated: about 40 kB for a smear of 1600 x 1200 px, decoded in milliseconds.
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
_LEVEL = 1  # of zlib: labels are long runs; higher levels take three times as long and save a third


class Truths:
    """The masks of some pairs.

    ``areas``: in px, of all their objects, int64 (n,).
    """

    def __init__(self, pairs: Sequence[Pair], foreground: MaskForeground) -> None:
        """Read the masks of ``pairs``; ``foreground`` as in ``read_labels``. Raises ``DataError`` naming a bad mask."""
        self._kept: dict[Path, tuple[tuple[int, ...], bytes]] = {}
        self.areas = areas_of(without_ignored(self._read(pair.mask, foreground)) for pair in pairs)

    def labels_of(self, pair: Pair) -> Labels:
        """Return the true labels (h, w) of ``pair``, ignored pixels marked (see ``read_labels``), as a new array."""
        shape, deflated = self._kept[pair.mask]
        return np.frombuffer(bytearray(zlib.decompress(deflated)), np.int32).reshape(shape)

    def _read(self, mask: Path, foreground: MaskForeground) -> Labels:
        labels = read_labels(mask, foreground=foreground, keep_ignored=True)
        self._kept[mask] = labels.shape, zlib.compress(labels.tobytes(), _LEVEL)
        return labels
