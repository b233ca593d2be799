"""Label images as TIFF files readable by Fiji, QuPath, napari and every Python library."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_STRIP_ROWS, _LEVEL = 256, 6


def encode(labels: npt.NDArray[np.int32], *, pixel_size_um: float | None = None) -> bytes:
    """Encode ``labels`` (h, w), 0 = background, as a TIFF: uint16 if every label fits, otherwise uint32; never 8 bit.

    ``pixel_size_um``: side of a pixel, None if unknown; with it Fiji and QuPath measure in micrometres.

    Strips with zlib and no predictor, because ImageJ reads no tiles and undoes a predictor only for LZW. No date or
    version inside: the same labels give the same bytes.
    """
    import imagecodecs
    import tifffile

    if labels.ndim != 2 or labels.dtype.kind not in "iu" or int(labels.min(initial=0)) < 0:
        raise ValueError(f"labels must be non-negative integers (h, w), got {labels.dtype} {labels.shape}")
    dtype = np.uint16 if int(labels.max(initial=0)) <= np.iinfo(np.uint16).max else np.uint32

    def strips() -> Iterator[bytes]:
        """Strips as tifffile would compress them, one at a time: a whole image of ``dtype`` is half as large again."""
        for top in range(0, labels.shape[0], _STRIP_ROWS):
            rows = labels[top : top + _STRIP_ROWS].astype(dtype).tobytes()
            yield bytes(imagecodecs.deflate_encode(rows, level=_LEVEL))

    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        strips(),
        shape=labels.shape,
        dtype=dtype,
        photometric="minisblack",
        compression="zlib",
        compressionargs={"level": _LEVEL},
        predictor=False,
        rowsperstrip=_STRIP_ROWS,
        resolution=None if pixel_size_um is None else (10_000 / pixel_size_um,) * 2,
        resolutionunit=None if pixel_size_um is None else "CENTIMETER",
        maxworkers=1,  # see the module threads; any other number gives the same bytes
        metadata=None,
        software="cellseg-deploy",
        datetime=None,
    )
    return buffer.getvalue()
