"""Regions of Zeiss CZI through pylibCZIrw: grey or BGR of 8 or 16 bit, one channel, time and slice.

All scenes lie in one picture, as on the slide; what was not scanned is white. Where tiles overlap, the one that was
recorded later is seen. Only the tiles that a region touches are read; the last ones that had to be decompressed are
kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.bit_depth import SaidBits
from cellseg_deploy.images.decode import Decoded
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import LoadedImage, as_rgb
from cellseg_deploy.images.resolution import Resolution
from cellseg_deploy.outputs.requirements import require_packages
from cellseg_deploy.slides.czi_structure import structure_of
from cellseg_deploy.slides.region import Pixels, stamp_of

_KEPT_BYTES = 256 << 20
_PIECE = 1024
"""Levels are read in pieces of a fixed grid: libCZI rounds, so a pixel could depend on the region it is read with."""
_DEFAULTS = ReadOptions()


class CziReader:
    """Regions of the slide ``path``.

    Raises ``DataError`` for other data, ``BackendUnavailableError`` without pylibCZIrw.
    """

    def __init__(self, path: Path, options: ReadOptions = _DEFAULTS) -> None:
        require_packages("czi", "pylibCZIrw")
        from pylibCZIrw import czi

        self.name, self._path, self._options = path.name, path, options
        self._about = structure_of(path)
        self.stamp = (*stamp_of(path), options.bit_depth or 0)  # a given depth changes every pixel
        self.levels = tuple(
            (max(1, self._about.height // step), max(1, self._about.width // step)) for step in self._about.steps
        )
        with ExitStack() as stack:
            try:
                kept = czi.CacheOptions(max_memory_usage=_KEPT_BYTES)
                self._czi = stack.enter_context(czi.open_czi(str(path), cache_options=kept))
                metadata = self._czi.metadata if self._about.has_metadata else {}
            except Exception as error:  # libCZI raises RuntimeError, the parser of the metadata others
                raise DataError(f"{path}: damaged CZI: {error}") from error
            self._said_bits, self._resolution = _said_bits(metadata), _resolution(metadata)
            height, width = self.levels[0]
            middle = self._converted(max(0, height // 2 - 128), 0, min(height, 256), min(width, 4096), 0)
            self.pixel_size, self.notes = middle.pixel_size, middle.notes
            self._open = stack.pop_all()

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """As ``RegionReader.read``."""
        if level == 0:
            return self._converted(y, x, h, w, 0).pixels_hwc
        height, width = self.levels[level]
        out = np.empty((h, w, 3), np.uint8)
        for top in range(y // _PIECE * _PIECE, y + h, _PIECE):
            for left in range(x // _PIECE * _PIECE, x + w, _PIECE):
                piece = self._converted(top, left, min(_PIECE, height - top), min(_PIECE, width - left), level)
                y0, y1 = max(y, top), min(y + h, top + _PIECE)
                x0, x1 = max(x, left), min(x + w, left + _PIECE)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = piece.pixels_hwc[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _converted(self, y: int, x: int, h: int, w: int, level: int) -> LoadedImage:
        about, step = self._about, self._about.steps[level]
        white = 1.0
        if about.pixel_type in ("Gray16", "Bgr48"):  # white of the samples that are used
            bits = self._options.bit_depth or (16 if self._said_bits is None else self._said_bits.bits)
            white = (2**bits - 1) / 65535
        try:
            samples: Any = self._czi.read(
                roi=(about.x + x * step, about.y + y * step, w * step, h * step),
                zoom=1 / step,
                pixel_type=about.pixel_type,
                background_pixel=(white, white, white),
            )
        except Exception as error:  # libCZI raises RuntimeError for damaged data of any kind
            raise DataError(f"{self._path}: the region at {x},{y} of level {level} cannot be read: {error}") from error
        is_grey = samples.shape[2] == 1
        samples = samples[..., 0] if is_grey else samples[..., ::-1]  # BGR
        assert samples.shape[:2] == (h, w)
        decoded = Decoded(
            "CZI",
            "grey" if is_grey else "rgb",
            samples,
            samples.dtype.itemsize * 8,
            resolution=self._resolution,
            said_bits=self._said_bits,
        )
        return as_rgb(self._path, decoded, self._options)

    def close(self) -> None:
        """Close the slide."""
        self._open.close()


def _at(node: Any, *names: str) -> Any:
    """The element of the metadata that ``names`` lead to, or None."""
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _said_bits(metadata: Any) -> SaidBits | None:
    """The bits that the camera used of 16."""
    said = _at(metadata, "ImageDocument", "Metadata", "Information", "Image", "ComponentBitCount")
    bits = int(said) if isinstance(said, str) and said.strip().isdecimal() else 16
    return SaidBits(bits, "CZI ComponentBitCount") if 9 <= bits <= 15 else None


def _resolution(metadata: Any) -> tuple[Resolution, ...]:
    """The size of a pixel, which a CZI states in metres whatever unit it shows."""
    found = _at(metadata, "ImageDocument", "Metadata", "Scaling", "Items", "Distance")
    said = {_at(one, "@Id"): _at(one, "Value") for one in (found if isinstance(found, list) else [found])}
    try:
        x, y = (float(Decimal(said[axis]).scaleb(6)) for axis in "XY")
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return ()
    return (Resolution("CZI", (x, y)),) if 0 < x < np.inf and 0 < y < np.inf else ()
