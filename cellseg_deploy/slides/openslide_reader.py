"""Regions of scanners' slides through OpenSlide: SVS, NDPI, MRXS and others; transparent pixels become white."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.resolution import GIVEN, UNKNOWN, PixelSize
from cellseg_deploy.outputs.requirements import require_packages
from cellseg_deploy.slides.region import Pixels, stamp_of

_KEPT_BYTES = 256 << 20
"""Decoded tiles to keep: a row of tiles is read again for the next rows. OpenSlide keeps 32 MB, 32,000 px of a row."""
_DEFAULTS = ReadOptions()


class OpenSlideReader:
    """Regions of the slide ``path``. Raises ``DataError``, or ``BackendUnavailableError`` without OpenSlide."""

    def __init__(self, path: Path, options: ReadOptions = _DEFAULTS) -> None:
        require_packages("slides", "openslide")
        import openslide

        self.name, self._path = path.name, path
        try:
            # The pixels of an MRXS lie in the folder next to it.
            pixels = stamp_of(path.with_suffix("")) if path.suffix.lower() == ".mrxs" else ()
            self.stamp = stamp_of(path) + pixels
            self._slide = openslide.OpenSlide(path)
            self._slide.set_cache(openslide.OpenSlideCache(_KEPT_BYTES))
        except (openslide.OpenSlideError, OSError) as error:
            raise DataError(f"{path}: OpenSlide cannot read it: {error}") from error
        self.levels = tuple((int(h), int(w)) for w, h in self._slide.level_dimensions)
        given = options.pixel_size_um
        self.pixel_size = self._size() if given is None else PixelSize(given, GIVEN)
        self.notes: tuple[str, ...] = ()

    def _size(self) -> PixelSize:
        try:
            x, y = (float(self._slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        except (KeyError, ValueError):
            return UNKNOWN
        if abs(x - y) > 0.01 * x or not 0.01 <= x <= 20:
            return PixelSize(
                note=f"the slide's pixels of {x:.4g} x {y:.4g} micrometres were not used; give `pixel_size_um`"
            )
        return PixelSize(x, "OpenSlide")

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """As ``RegionReader.read``."""
        import openslide

        down = self._slide.level_downsamples[level]
        try:
            rgba = np.asarray(self._slide.read_region((round(x * down), round(y * down)), level, (w, h)))
        except openslide.OpenSlideError as error:
            raise DataError(f"{self._path}: the region at {x},{y} of level {level} cannot be read: {error}") from error
        if int(rgba[..., 3].min()) == 255:
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()
