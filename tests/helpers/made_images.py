"""Image files made for tests of reading: small, without symmetry, in any format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

H, W = 40, 60


def picture(channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    """A picture without any symmetry (h, w) or (h, w, channels), full range."""
    top = np.iinfo(dtype).max
    y, x = np.mgrid[:H, :W]
    planes = [(y * W + x) / (H * W - 1), x / (W - 1), y / (H - 1), (x + y) / (H + W - 2)][:channels]
    values = (np.stack(planes, axis=2) * top).round().astype(dtype)
    return values[..., 0] if channels == 1 else values


def save(path: Path, image: Image.Image, **settings: Any) -> Path:
    image.save(path, **settings)
    return path


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **settings)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
