"""Regions of OME-Zarr (NGFF 0.4 and 0.5): 8-bit grey or RGB, one time and one slice.

A chunk that is not there holds the fill value, by the format's rule; a copy that lost chunks cannot be told from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.errors import DataError
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.images.resolution import GIVEN, UNKNOWN, PixelSize
from cellseg_deploy.outputs.requirements import require_packages
from cellseg_deploy.slides.region import Pixels, stamp_of

_DEFAULTS = ReadOptions()
_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}


class ZarrReader:
    """Regions of the multiscale image in the folder ``path``.

    Raises ``DataError`` for other data, ``BackendUnavailableError`` without zarr.
    """

    def __init__(self, path: Path, options: ReadOptions = _DEFAULTS) -> None:
        require_packages("slides", "zarr")
        import zarr

        self.name, self._path, self.stamp = path.name, path, stamp_of(path)
        try:
            group = zarr.open_group(str(path), mode="r")
            about = dict(group.attrs)
            scales: Any = about.get("ome", about)
            image = scales["multiscales"][0]
            names = [str(axis["name"]) for axis in image["axes"]]
            self._arrays: list[Any] = [group[dataset["path"]] for dataset in image["datasets"]]
        except Exception as error:  # whatever zarr raises for a folder that is something else
            raise DataError(f"{path}: not an OME-Zarr image (no readable multiscales): {error}") from error
        if names[-2:] != ["y", "x"] or not set(names[:-2]) <= {"t", "c", "z"}:
            raise DataError(f"{path}: OME-Zarr with the axes {', '.join(names)}; expected t, c, z, y, x, or fewer")
        for array in self._arrays:
            size = dict(zip(names, array.shape, strict=True))
            if (
                array.dtype != np.uint8
                or size.get("t", 1) != 1
                or size.get("z", 1) != 1
                or size.get("c", 1) not in (1, 3)
            ):
                raise DataError(
                    f"{path}: OME-Zarr of {array.dtype} {dict(size)}; expected uint8, one time, one slice, and 1 or 3 "
                    "channels; save the plane you want as 8-bit RGB"
                )
        self._names = names
        self.levels = tuple((int(array.shape[-2]), int(array.shape[-1])) for array in self._arrays)
        given = options.pixel_size_um
        self.pixel_size = _pixel_size(image) if given is None else PixelSize(given, GIVEN)
        is_grey = "c" not in names or self._arrays[0].shape[names.index("c")] == 1
        self.notes: tuple[str, ...] = ("grey image converted to RGB",) if is_grey else ()

    def read(self, y: int, x: int, h: int, w: int, level: int) -> Pixels:
        """As ``RegionReader.read``."""
        place: list[Any] = [slice(None) if name == "c" else 0 for name in self._names[:-2]]
        try:
            found = np.asarray(self._arrays[level][(*place, slice(y, y + h), slice(x, x + w))])
        except Exception as error:
            raise DataError(f"{self._path}: a chunk at {x},{y} of level {level} cannot be read: {error}") from error
        planes = found.reshape(-1, h, w)
        return np.ascontiguousarray(np.broadcast_to(planes, (3, h, w)).transpose(1, 2, 0))

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""


def _pixel_size(image: Any) -> PixelSize:
    """Of level 0, if both axes have one size in a length."""
    try:
        steps = [one["scale"] for one in image["datasets"][0]["coordinateTransformations"] if one["type"] == "scale"]
        units = [_UM[axis["unit"]] for axis in image["axes"][-2:]]
        y, x = (float(step) * unit for step, unit in zip(steps[0][-2:], units, strict=True))
    except (KeyError, IndexError, TypeError, ValueError):
        return UNKNOWN
    if abs(x - y) > 0.01 * x or not 0.01 <= x <= 20:
        return PixelSize(note=f"the file's pixels of {x:.4g} x {y:.4g} micrometres were not used; give `pixel_size_um`")
    return PixelSize(x, "OME-Zarr")
