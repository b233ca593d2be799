"""Pictures for the eye as JPEG.

Full colour resolution and quality 90: on a 1600 x 1200 smear 9 ms and 0.4 MB, against 68 ms and 2.7 MB for PNG; halved
colour resolution would smear thin outlines.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def encode(picture_hwc: npt.NDArray[np.uint8]) -> bytes:
    """JPEG file of an RGB picture (h, w, 3); no side may exceed 65,535 px."""
    import cv2

    settings = [
        *(cv2.IMWRITE_JPEG_QUALITY, 90),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    written, data = cv2.imencode(".jpg", cv2.cvtColor(picture_hwc, cv2.COLOR_RGB2BGR), settings)
    if not written:
        raise RuntimeError(f"OpenCV could not encode a picture of {picture_hwc.shape} as JPEG")
    return bytes(data)
