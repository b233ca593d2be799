"""Open an image for reading by region, whatever its format."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import SLIDES
from cellseg_deploy.images.header import TIFF
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.read import read_image
from cellseg_deploy.slides.region import ArrayReader, RegionReader, stamp_of

_CZI = ".czi"
_DEFAULTS = ReadOptions()


def open_image(path: Path, options: ReadOptions = _DEFAULTS) -> RegionReader:
    """Open ``path``: a scanner's slide by its suffix (``SLIDES``), a folder as OME-Zarr, a TIFF by its content.

    PNG and JPEG cannot be read by region: they are decoded whole, up to ``options.max_pixels``. Others have no limit.

    Raises ``DataError``, or ``BackendUnavailableError`` if the package for a format is missing.
    """
    ending = path.suffix.lower()
    if ending == _CZI:
        from cellseg_deploy.slides.czi_reader import CziReader

        return CziReader(path, options)
    if ending in SLIDES:
        from cellseg_deploy.slides.openslide_reader import OpenSlideReader

        return OpenSlideReader(path, options)
    if path.is_dir():
        from cellseg_deploy.slides.zarr_reader import ZarrReader

        return ZarrReader(path, options)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if head in TIFF:
        from cellseg_deploy.slides.tiff_reader import TiffReader

        return TiffReader(path, options)
    loaded = read_image(path, options)
    return ArrayReader(loaded.pixels_hwc, path.name, loaded.pixel_size, loaded.notes, stamp_of(path))
