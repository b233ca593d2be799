"""Files of a streamed image: label image, tables, overview. Each is written strip by strip, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.files.atomic import atomic_file, move, temporary_in, write_bytes, writing
from cellseg_deploy.outputs import picture_file, tables
from cellseg_deploy.outputs.palette import COUNTED_RGB

TILE_PX = 512
_ROWS = 10_000
_PNG_LEVEL = 1  # of 2048 px: 0.2 s instead of 1.1, an eighth larger


def write_labels(
    path: Path, hw: tuple[int, int], strip: Callable[[int], Labels], *, pixel_size_um: float | None = None
) -> None:
    """Write a label image of ``hw`` as tiled BigTIFF, uint32, Deflate. ``strip(n)``: rows n * 512 to (n + 1) * 512.

    The same labels give the same bytes. Raises ``OutputError``.
    """
    import tifffile

    def tiles() -> Iterator[npt.NDArray[np.uint32]]:
        for number in range(-(-hw[0] // TILE_PX)):
            rows = strip(number).astype(np.uint32)
            for left in range(0, hw[1], TILE_PX):
                tile = rows[:, left : left + TILE_PX]
                yield np.pad(tile, ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1])))

    temporary = temporary_in(path.parent)  # tifffile wants a path
    try:
        with writing(path):
            tifffile.imwrite(
                temporary,
                tiles(),
                shape=hw,
                dtype=np.uint32,
                bigtiff=True,
                tile=(TILE_PX, TILE_PX),
                photometric="minisblack",
                compression="zlib",
                predictor=False,
                resolution=None if pixel_size_um is None else (10_000 / pixel_size_um,) * 2,
                resolutionunit=None if pixel_size_um is None else "CENTIMETER",
                maxworkers=1,
                metadata=None,
                software="cellseg-deploy",
                datetime=None,
            )
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_cells(path: Path, image: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write cells.csv of one image, ten thousand rows at a time. Raises ``OutputError``."""
    count = len(columns["label"])
    with atomic_file(path) as file, writing(path):
        file.write(tables.csv_rows([("image", *columns)]))
        for start in range(0, count, _ROWS):
            rows = zip(*(column[start : start + _ROWS].tolist() for column in columns.values()), strict=True)
            file.write(tables.csv_rows((image, *row) for row in rows))


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write images.csv with one row. Raises ``OutputError``."""
    with atomic_file(path) as file, writing(path):
        file.write(tables.csv_rows([tuple(row), tuple(row.values())]))


def write_overview(path: Path, image_hwc: npt.NDArray[np.uint8], labels: Labels) -> None:
    """Write a small picture (h, w, 3) with the outlines of its ``labels`` (h, w) as PNG. Raises ``OutputError``."""
    framed = np.pad(labels, 1, mode="edge")
    inner = framed[1:-1, 1:-1]
    edge = np.zeros(labels.shape, np.bool_)
    for other in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        edge |= inner != other
    picture = image_hwc.copy()
    picture[edge & (labels > 0)] = COUNTED_RGB
    write_bytes(path, picture_file.encode(picture, picture_file.PNG, png_level=_PNG_LEVEL))
