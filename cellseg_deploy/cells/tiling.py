"""Cut an image into tiles for a network of fixed input size, and stitch the results. Index arithmetic only.

One axis of an image (length L) with tiles of size T and halo h::

    image  |==========================================|
    tile 0 |-------------------|                         starts flush with the image border
    tile 1            |--------:----------|
    tile 2                        |-------:-----------|  ends flush with it: no padding
    owned  |------0--------|-------1-------|-----2-----|
                       >---<  at least h on each side of a seam

    tile 1            |<  halo  >|  inner region  |<  halo  >|
                       context     written          context

*Halo*: context that the network needs around a pixel for a reliable result. On inner sides it is discarded; at the
image border there is nothing beyond, so the tile is used up to its edge. Neighbours overlap by at least 2 h, and each
pixel of the overlap belongs to the tile whose middle is nearer: every output pixel is *owned by exactly one tile*, so
nothing is blended, and no value depends on the order or the batch in which tiles were computed.

Tiles are spread evenly: their number is the smallest possible, and any overlap beyond 2 h adds context to all seams
instead of one.

*Padding* happens only if the image is smaller than a tile, on its right and lower side, by reflection::

    |==image==:~reflected~|   one tile; its result for the padding is never written
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Tile:
    """``read``: rows and columns of the padded image that the network sees. ``write``: the part of the *image* that
    this tile owns. ``crop``: where that part lies within the tile."""

    read: Window
    crop: Window
    write: Window


@dataclass(frozen=True)
class TilePlan:
    """Tiles in raster order for an image of ``image_hw``; ``padded_hw`` is at least ``tile_size`` on each axis."""

    image_hw: tuple[int, int]
    padded_hw: tuple[int, int]
    tile_size: int
    halo: int
    tiles: tuple[Tile, ...]

    def __len__(self) -> int:
        return len(self.tiles)


@dataclass(frozen=True)
class _Span:
    """One tile along one axis."""

    read: slice
    crop: slice
    write: slice


def plan(image_hw: tuple[int, int], tile_size: int, halo: int) -> TilePlan:
    """Plan square tiles of ``tile_size`` px for an image of ``image_hw`` px, with ``halo`` px of context at seams.

    Raises ``UsageError`` for an empty image, or if ``2 * halo`` leaves nothing of a tile.
    """
    if min(image_hw) < 1:
        raise UsageError(f"an image of {image_hw[0]} x {image_hw[1]} px is empty and cannot be cut into tiles")
    if tile_size < 1 or not 0 <= 2 * halo < tile_size:
        raise UsageError(
            f"a halo of {halo} px does not fit a tile of {tile_size} px: it must be 0 or more and below half the tile"
        )
    rows, columns = (_spans(length, tile_size, halo) for length in image_hw)
    return TilePlan(
        image_hw=(int(image_hw[0]), int(image_hw[1])),
        padded_hw=(max(image_hw[0], tile_size), max(image_hw[1], tile_size)),
        tile_size=tile_size,
        halo=halo,
        tiles=tuple(
            Tile((row.read, column.read), (row.crop, column.crop), (row.write, column.write))
            for row in rows
            for column in columns
        ),
    )


def checked_halo(halo: int, tile_size: int) -> int:
    """Return ``halo``. Raises ``UsageError`` if it does not fit the model's ``tile_size``."""
    if not 0 <= 2 * halo < tile_size:
        raise UsageError(
            f"halo {halo} does not fit the model's tile of {tile_size} px; expected 0 to {(tile_size - 1) // 2}"
        )
    return halo


def _spans(length: int, tile_size: int, halo: int) -> list[_Span]:
    surplus = max(length - tile_size, 0)
    steps = -(-surplus // (tile_size - 2 * halo))  # rounded up
    starts = [surplus * i // steps for i in range(steps)] + [surplus]
    # A seam lies in the middle of the overlap of two neighbours, so that both keep at least a halo beyond it.
    seams = [(start + following + tile_size) // 2 for start, following in pairwise(starts)]
    edges = [0, *seams, length]
    return [
        _Span(slice(start, start + tile_size), slice(low - start, high - start), slice(low, high))
        for start, (low, high) in zip(starts, pairwise(edges), strict=True)
    ]


def pad(image_hwc: npt.NDArray[np.uint8], plan: TilePlan) -> npt.NDArray[np.uint8]:
    """Pad ``image_hwc`` (h, w, C) on the right and below to ``plan.padded_hw`` by reflection, if it is smaller."""
    _check_size(image_hwc.shape[:2], plan.image_hw, "image")
    if plan.padded_hw == plan.image_hw:
        return image_hwc
    below, right = (padded - size for padded, size in zip(plan.padded_hw, plan.image_hw, strict=True))
    # numpy reflects as often as needed, and repeats the edge of an image that is one pixel wide.
    return np.pad(image_hwc, ((0, below), (0, right), (0, 0)), mode="reflect")


def cut(padded_hwc: npt.NDArray[np.uint8], plan: TilePlan, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Cut tiles ``start`` to ``stop`` (exclusive, may exceed the last) as (n, tile_size, tile_size, C), contiguous."""
    count = len(plan.tiles[start:stop])
    out = np.empty((count, plan.tile_size, plan.tile_size, padded_hwc.shape[2]), padded_hwc.dtype)
    cut_into(out, padded_hwc, plan, start)
    return out


def cut_into(out_nhwc: npt.NDArray[np.uint8], padded_hwc: npt.NDArray[np.uint8], plan: TilePlan, start: int) -> None:
    """Fill ``out_nhwc`` (n, tile_size, tile_size, C) with tiles ``start``, ``start + 1``, ..., in place.

    Raises ``UsageError`` if sizes do not fit the plan.
    """
    _check_size(padded_hwc.shape[:2], plan.padded_hw, "padded image")
    expected = (len(out_nhwc), plan.tile_size, plan.tile_size, padded_hwc.shape[2])
    if out_nhwc.shape != expected or start < 0 or start + len(out_nhwc) > len(plan):
        raise UsageError(
            f"a batch of {out_nhwc.shape} from tile {start} on does not fit a plan of {len(plan)} tiles; "
            f"expected {expected}"
        )
    for tile_hwc, tile in zip(out_nhwc, plan.tiles[start:], strict=False):
        tile_hwc[...] = padded_hwc[tile.read]


def stitch_into(
    out_khw: npt.NDArray[np.floating[Any]], plan: TilePlan, start: int, probs_nkhw: npt.NDArray[np.floating[Any]]
) -> None:
    """Write the results of tiles ``start``, ``start + 1``, ... into ``out_khw`` (K, h, w of the image), in place.

    ``probs_nkhw``: (n, K, tile_size, tile_size). After all tiles, each pixel of ``out_khw`` was written exactly once.
    Raises ``UsageError`` if sizes do not fit the plan.
    """
    _check_size(out_khw.shape[1:], plan.image_hw, "output")
    expected = (len(probs_nkhw), len(out_khw), plan.tile_size, plan.tile_size)
    if probs_nkhw.shape != expected or start < 0 or start + len(probs_nkhw) > len(plan):
        raise UsageError(
            f"{probs_nkhw.shape} probabilities from tile {start} on do not fit a plan of {len(plan)} tiles; "
            f"expected {expected}"
        )
    for tile, probs_khw in zip(plan.tiles[start:], probs_nkhw, strict=False):
        out_khw[(slice(None), *tile.write)] = probs_khw[(slice(None), *tile.crop)]


def _check_size(got: tuple[int, ...], expected: tuple[int, int], what: str) -> None:
    if tuple(got) != expected:
        raise UsageError(f"{what} is {got[0]} x {got[1]} px, the tile plan was made for {expected[0]} x {expected[1]}")
