"""Cells that look like several in one outline: large and dented.

Measured on the masks of 30 photographs of BBBC041Seg, which leave overlapping cells in one piece, against the boxes of
the Broad: of 1,952 whole objects 80 are flagged, 45 of these (56 %) hold two boxes or more, and so do 61 that are not
flagged. White cells and infected ones are most of the false alarms. A hint where to look, never a reason not to count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

AREA_REL, MAX_SOLIDITY = 1.5, 0.97
"""Least area, as a multiple of the median whole cell of the image, and limit of the solidity."""
_FEW_CELLS = 8


def looks_like_several(
    areas_px: npt.NDArray[Any], solidities: npt.NDArray[np.float64], is_cut: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Whether each cell of an image is large and dented, bool (n,); ``is_cut``: it touches the border, all (n,).

    Only whole cells, in images with at least eight of them: fewer do not say what is large.
    """
    whole = areas_px[~is_cut]
    if len(whole) < _FEW_CELLS:
        return np.zeros(len(areas_px), np.bool_)
    return np.asarray((areas_px >= AREA_REL * np.median(whole)) & (solidities < MAX_SOLIDITY) & ~is_cut)
