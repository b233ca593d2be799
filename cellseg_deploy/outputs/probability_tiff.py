"""The network's probabilities as a 16-bit TIFF with one plane per channel, at the scale the network worked at.

0..65535 stands for 0..1. ImageJ and Fiji read that from the file: the status bar and measurements show probabilities
(straight-line calibration ``c0 + c1 * value``), and the planes are named after the channels. Scale and sizes are in the
image's info (Image > Show Info) as JSON; in Python, ``tifffile.TiffFile(path).imagej_metadata["Info"]``.
"""

from __future__ import annotations

import io

import msgspec
import numpy as np

from cellseg_deploy.outputs.segmented import SegmentedImage
from cellseg_deploy.outputs.tables import utf8

FULL = 65535
"""Value that stands for probability 1."""


def encode(image: SegmentedImage) -> bytes:
    """Encode ``image.probabilities_khw`` as an ImageJ TIFF (K, h', w') uint16; rounding error is at most 1 / 131070.

    Strips with fast zlib: the planes are smooth, so a higher level gains little. No date inside.
    """
    import tifffile

    height, width = image.labels.shape
    info = {
        "image": utf8(image.name),
        "channels": image.channels,
        "probability": f"value / {FULL}",
        "model_px_per_image_px": image.scale,
        "image_width_px": width,
        "image_height_px": height,
        "pixel_size_um": None if image.pixel_size_um is None else image.pixel_size_um / image.scale,
        "model": image.model,
        "task": image.task,
    }
    metadata = {
        "axes": "TZCYXS",  # all of ImageJ's: with fewer, a plane one px wide is misread
        "Labels": list(image.channels),
        "Info": msgspec.json.encode(info).decode(),
        "cf": 0,  # straight line
        "c0": 0.0,
        "c1": 1 / FULL,
        "vunit": "probability",
        "min": 0.0,  # shown as black
        "max": float(FULL),
    }
    resolution = None
    if image.pixel_size_um is not None:
        resolution = (image.scale / image.pixel_size_um,) * 2
        metadata["unit"] = "um"
    planes = np.rint(image.probabilities_khw * np.float32(FULL)).astype(np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        planes[None, None, ..., None],
        imagej=True,
        metadata=metadata,
        resolution=resolution,
        compression="zlib",
        compressionargs={"level": 1},
        rowsperstrip=256,
        maxworkers=1,  # see the module threads; any other number gives the same bytes
        software="cellseg-deploy",
        datetime=None,
    )
    return buffer.getvalue()
