"""A label image as OME-Zarr (NGFF 0.4): a multiscale image with ``image-label`` metadata, written strip by strip.

Level k holds every 2^k-th row and column of level 0, so a pixel i there is the pixel i * 2^k of the label image, and no
label is mixed with another. Version 0.4 because more programs read it than 0.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.files.atomic import writing

CHUNK_PX = 512
_DEFLATE: Any = {"id": "zlib", "level": 1}  # every reader of Zarr 2 has it
_SMALLEST_PX = 1024
"""No level is added below one whose sides are not longer."""


class ZarrLabels:
    """The label image of size ``hw`` in the new folder ``path``, as uint32 in chunks of 512 x 512 px, Deflate.

    ``pixel_size_um``: side of a pixel, None if unknown; then the unit of the scale is the pixel. Chunks without cells
    are not written; by the format's rule they hold 0. Methods raise ``OutputError``.
    """

    def __init__(self, path: Path, hw: tuple[int, int], *, pixel_size_um: float | None, image: str) -> None:
        import zarr

        self._path, self._arrays, self._rows = path, list[Any](), 0
        with writing(path):
            self._group = zarr.open_group(str(path), mode="w-", zarr_format=2)
            step = 1
            while True:
                self._add_level((-(-hw[0] // step), -(-hw[1] // step)))
                if max(hw) <= _SMALLEST_PX * step:
                    break
                step *= 2
        unit = {} if pixel_size_um is None else {"unit": "micrometer"}
        self._about: dict[str, Any] = {
            "multiscales": [
                {
                    "version": "0.4",
                    "name": f"cells of {image}",
                    "type": "nearest",
                    "axes": [{"name": axis, "type": "space", **unit} for axis in "yx"],
                    "datasets": [
                        {
                            "path": str(level),
                            "coordinateTransformations": [
                                {"type": "scale", "scale": [(pixel_size_um or 1.0) * 2**level] * 2}
                            ],
                        }
                        for level in range(len(self._arrays))
                    ],
                }
            ],
            "image-label": {"version": "0.4"},
        }

    def _add_level(self, hw: tuple[int, int]) -> None:
        array = self._group.create_array(
            str(len(self._arrays)),
            shape=hw,
            chunks=(CHUNK_PX, CHUNK_PX),
            dtype="uint32",
            fill_value=0,
            compressors=_DEFLATE,
            chunk_key_encoding={"name": "v2", "separator": "/"},
            config={"write_empty_chunks": False},
        )
        self._arrays.append(array)

    def add(self, labels: Labels) -> None:
        """Add the next rows, (512, w); fewer at the end."""
        with writing(self._path):
            self._arrays[0][self._rows : self._rows + len(labels)] = labels.astype("uint32")
        self._rows += len(labels)

    def finish(self) -> None:
        """Write the smaller levels, then the metadata, without which the folder is no OME-Zarr."""
        with writing(self._path):
            for larger, smaller in zip(self._arrays, self._arrays[1:], strict=False):
                for top in range(0, smaller.shape[0], CHUNK_PX):
                    for left in range(0, smaller.shape[1], CHUNK_PX):
                        rows, columns = slice(2 * top, 2 * (top + CHUNK_PX)), slice(2 * left, 2 * (left + CHUNK_PX))
                        part = larger[rows, columns][::2, ::2]
                        smaller[top : top + CHUNK_PX, left : left + CHUNK_PX] = part
            self._group.attrs.update(self._about)
