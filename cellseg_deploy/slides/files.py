"""Files of a streamed image, each written part by part, whole or not at all.

Which files there are depends on ``save`` alone, never on the size of the image or the memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.errors import UsageError, check_types
from cellseg_deploy.files.atomic import atomic_file, move, temporary_in, write_bytes, writing
from cellseg_deploy.outputs import picture_file, tables
from cellseg_deploy.outputs.palette import COUNTED_RGB
from cellseg_deploy.outputs.requirements import require_packages

LABELS, ZARR, GEOJSON, PARQUET = "labels.tif", "labels.ome.zarr", "cells.geojson", "cells.parquet"
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "labels": (LABELS, "", ()),
    "zarr": (ZARR, "slides", ("zarr",)),
    "geojson": (GEOJSON, "", ()),
    "parquet": (PARQUET, "outputs", ("pyarrow",)),
}
"""Kinds of files by their name in ``save``: the file in the output folder, and the extra and packages it needs."""
BLANK_RGB = (60, 120, 255)
"""Mixed with tiles that the network was not asked about."""
TILE_PX = 512
_PNG_LEVEL = 1  # of 2048 px: 0.2 s instead of 1.1, an eighth larger


def checked_kinds(save: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of files in ``save``, in the order of ``KINDS``.

    Raises ``UsageError`` for an unknown kind, ``BackendUnavailableError`` if a package for one is not installed.
    """
    check_types("a sequence of names", save=save)
    if unknown := sorted(set(save) - set(KINDS)):
        raise UsageError(f"cannot save {', '.join(unknown)} of a streamed image; expected some of {', '.join(KINDS)}")
    for name, (_, extra, packages) in KINDS.items():
        if name in save:
            require_packages(extra, *packages)
    return tuple(name for name in KINDS if name in save)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the comma-separated kinds in ``text``; ``all`` and ``none`` stand alone. Raises ``UsageError``."""
    chosen = tuple(name.strip() for name in text.split(",") if name.strip())
    if chosen in (("all",), ("none",)):
        return tuple(KINDS) if chosen == ("all",) else ()
    if not chosen or set(chosen) - set(KINDS):
        raise UsageError(f"cannot save {text or 'nothing'}; expected {', '.join(KINDS)}, or all or none alone")
    return chosen


def remove(path: Path) -> None:
    """Remove the file or folder ``path``, if it exists. Raises ``OutputError``."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_labels(
    path: Path, hw: tuple[int, int], strips: Iterable[Labels], *, pixel_size_um: float | None = None
) -> None:
    """Write a label image of ``hw`` as tiled BigTIFF, uint32, Deflate. ``strips``: its rows, 512 at a time.

    The same labels give the same bytes. Raises ``OutputError``.
    """
    import tifffile

    def tiles() -> Iterator[npt.NDArray[np.uint32]]:
        for strip in strips:
            rows = strip.astype(np.uint32)
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
    with atomic_file(path) as file, writing(path):
        file.write(tables.csv_rows([("image", *columns)]))
        for rows in tables.rows_in_parts(columns):
            file.write(tables.csv_rows((image, *row) for row in rows))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file in ``pieces``. Raises ``OutputError``."""
    with atomic_file(path) as file, writing(path):
        for piece in pieces:
            file.write(piece)


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write images.csv with one row. Raises ``OutputError``."""
    with atomic_file(path) as file, writing(path):
        file.write(tables.csv_rows([tuple(row), tuple(row.values())]))


def write_overview(path: Path, image_hwc: npt.NDArray[np.uint8], labels: Labels, blank: npt.NDArray[np.bool_]) -> None:
    """Write a small picture (h, w, 3) with the outlines of its ``labels`` (h, w) as PNG, and ``blank`` (h, w) in blue.

    Raises ``OutputError``.
    """
    framed = np.pad(labels, 1, mode="edge")
    inner = framed[1:-1, 1:-1]
    edge = np.zeros(labels.shape, np.bool_)
    for other in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        edge |= inner != other
    picture = image_hwc.copy()
    picture[blank] = (picture[blank].astype(np.uint16) + BLANK_RGB) // 2
    picture[edge & (labels > 0)] = COUNTED_RGB
    write_bytes(path, picture_file.encode(picture, picture_file.PNG, png_level=_PNG_LEVEL))
