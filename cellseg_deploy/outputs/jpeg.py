"""Pictures for viewing, as JPEG.

Full colour resolution and quality 90: on a 1600 x 1200 smear 9 ms and 0.4 MB, against 68 ms and 2.7 MB for PNG; halved
colour resolution would smear thin outlines.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def encode(picture_hwc: npt.NDArray[np.uint8]) -> bytes:
    """Encode an RGB picture (h, w, 3) as a JPEG file; no side may exceed 65,535 px."""
    import imagecodecs  # takes RGB directly; OpenCV would need a copy with swapped channels

    data = imagecodecs.jpeg8_encode(picture_hwc, level=90, colorspace="RGB", outcolorspace="YCBCR", subsampling="444")
    return bytes(data)
