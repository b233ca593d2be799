"""Cells that look like several in one outline: large and dented.

Measured on the masks of 30 photographs of BBBC041Seg, which leave overlapping cells in one piece, against the boxes of
the Broad: of 1,952 whole objects 80 are flagged, 45 of these (56 %) hold two boxes or more, and so do 61 that are not
flagged. White cells and infected ones were most of the false alarms; with classes, each cell is compared with its own
class. A hint where to look, never a reason not to count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

AREA_REL, MAX_SOLIDITY = 1.5, 0.97
"""Least area, as a multiple of the image's median whole cell of the same class, and limit of the solidity."""
_FEW_CELLS = 8


def looks_like_several(
    areas_px: npt.NDArray[Any],
    solidities: npt.NDArray[np.float64],
    is_cut: npt.NDArray[np.bool_],
    class_of: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether each cell of an image is large and dented, bool (n,). ``is_cut``: it touches the border, ``class_of``:
    number or name of its class, None without classes, all (n,).

    Only whole cells, of classes with at least eight of them in the image: fewer do not say what is large.
    """
    if class_of is None:
        class_of = np.zeros(len(areas_px), np.int64)
    found = (solidities < MAX_SOLIDITY) & ~is_cut
    for name in np.unique(class_of):
        own = class_of == name
        whole = areas_px[own & ~is_cut]
        least = AREA_REL * np.median(whole) if len(whole) >= _FEW_CELLS else np.inf
        found[own] &= areas_px[own] >= least
    return np.asarray(found, np.bool_)
