"""Small pictures of the images with their outlines, from the overlays that the run wrote."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Labels

_SIZES = ((40, 800), (500, 320))  # up to so many images: longest side in px
_SMALLEST = 240
MAX_BYTES = 40_000_000
"""Of all pictures together, so that the page can still be sent by mail and opened."""
_QUALITY = 75

_log = logging.getLogger(__name__)


def longest_side(n_images: int) -> int:
    """Longest side of each of ``n_images`` thumbnails, in px."""
    return next((side for most, side in _SIZES if n_images <= most), _SMALLEST)


def thumbnails(files: Sequence[tuple[Path | None, Path | None]], threads: int = 2) -> list[str]:
    """Return the picture of each of ``files`` (overlay, label image) as the base64 text of a JPEG, "" if there is none.

    The overlay is reduced; without one, the outlines of the label image are drawn on white. From the image on with
    which all would have more than ``MAX_BYTES``, there are none.
    """
    side, found, total = longest_side(len(files)), list[str](), 0
    with ThreadPoolExecutor(threads) as pool:  # libjpeg releases the lock
        for text in _in_order(pool, files, side):
            total += len(text)
            found.append(text if total <= MAX_BYTES else "")
    return found


def _in_order(pool: ThreadPoolExecutor, files: Sequence[tuple[Path | None, Path | None]], side: int) -> Iterator[str]:
    step = 64  # so that an interrupt does not wait for all
    for start in range(0, len(files), step):
        yield from pool.map(lambda pair: thumbnail(*pair, side=side), files[start : start + step])


def thumbnail(overlay: Path | None, labels: Path | None, *, side: int) -> str:
    """Return one picture of at most ``side`` px; see ``thumbnails``. A file that cannot be decoded is missing."""
    try:
        if overlay is not None and overlay.is_file():
            picture = _reduced_jpeg(overlay.read_bytes(), side)
        elif labels is not None and labels.is_file():
            import tifffile

            picture = _drawn(tifffile.imread(labels, maxworkers=1), side)
        else:
            return ""
    except (OSError, ValueError) as error:
        _log.warning("%s: no picture of it in the report (%s)", overlay or labels, error)
        return ""
    return base64.b64encode(_encode(picture)).decode("ascii")


def _reduced_jpeg(data: bytes, side: int) -> npt.NDArray[np.uint8]:
    """Decode a JPEG file, reduced while it is decoded as far as libjpeg can."""
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    factor = side / max(height, width)
    picture = simplejpeg.decode_jpeg(
        data, "RGB", fastdct=True, min_height=int(height * min(1, factor)), min_width=int(width * min(1, factor))
    )
    return fitted(np.asarray(picture), side)


def fitted(picture_hwc: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Reduce ``picture_hwc`` (h, w, 3) so that no side is longer than ``side``."""
    import cv2

    height, width = picture_hwc.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return picture_hwc
    size_wh = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(picture_hwc, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _drawn(labels: Labels, side: int) -> npt.NDArray[np.uint8]:
    from cellseg_deploy.outputs.overlay import outlines

    step = -(-max(labels.shape) // side)
    small = np.ascontiguousarray(labels[::step, ::step]).astype(np.int32)
    picture = np.full((*small.shape, 3), 255, np.uint8)
    picture[small > 0] = (225, 232, 236)
    picture[outlines(small, thickness=1)] = (0, 90, 140)
    return picture


def _encode(picture_hwc: npt.NDArray[np.uint8]) -> bytes:
    import simplejpeg

    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(picture_hwc), quality=_QUALITY, colorsubsampling="420", fastdct=True
        )
    )


def jpeg_text(picture_hwc: npt.NDArray[np.uint8]) -> str:
    """Return ``picture_hwc`` as the base64 text of a JPEG."""
    return base64.b64encode(_encode(picture_hwc)).decode("ascii")
