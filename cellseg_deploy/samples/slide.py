"""A large image of synthetic smears, written tile by tile: fields of one laboratory next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from cellseg_deploy.errors import UsageError
from cellseg_deploy.samples.params import SmearParams
from cellseg_deploy.samples.smear import make_smear

TILE_PX = 512


def write_slide(
    path: Path, fields: tuple[int, int], params: SmearParams, seed: int, *, distinct: int = 8, um: float = 0.25
) -> int:
    """Write ``fields`` rows and columns of smears of ``params`` to ``path``, a tiled OME-TIFF, and return the number of
    cells, where a cell cut by the border of its field counts in that field.

    ``distinct``: number of different smears, which are repeated in random order. ``um``: pixel size in micrometres. One
    row of fields is in memory at a time. Raises ``UsageError`` for fields whose sides are no multiple of 512 px.
    """
    height, width = params.size_hw
    if height % TILE_PX or width % TILE_PX:
        raise UsageError(f"fields of {width} x {height} px; expected multiples of {TILE_PX} px")
    smears = [make_smear(params, seed + number) for number in range(distinct)]
    order = np.random.default_rng(seed).integers(distinct, size=fields)

    def tiles() -> Iterator[npt.NDArray[np.uint8]]:
        for row in order:
            band = np.hstack([smears[number].image_hwc for number in row])
            for top in range(0, height, TILE_PX):
                for left in range(0, band.shape[1], TILE_PX):
                    yield np.ascontiguousarray(band[top : top + TILE_PX, left : left + TILE_PX])

    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        tiff.write(
            tiles(),
            shape=(fields[0] * height, fields[1] * width, 3),
            dtype=np.uint8,
            tile=(TILE_PX, TILE_PX),
            photometric="rgb",
            compression="zlib",
            compressionargs={"level": 1},
            maxworkers=1,
            metadata={"axes": "YXS", "PhysicalSizeX": um, "PhysicalSizeY": um},
        )
    return sum(smears[number].n_cells for number in order.ravel())
