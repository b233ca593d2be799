"""Tiled equals untiled, whatever the size of image, tile and batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cellseg_deploy.cells.tiling import TilePlan, cut, cut_into, pad, plan, stitch_into
from cellseg_deploy.errors import UsageError

TILE, HALO = 28, 5
SIZES = [
    (1, 1),
    (1, 40),
    (40, 1),
    (13, 9),
    (28, 28),
    (28, 29),
    (29, 28),
    (27, 100),
    (28, 46),
    (28, 47),
    (46, 46),
    (63, 101),
    (97, 64),
    (13, 5000),
    (5000, 3),
]


def local_network(tiles_nhwc: npt.NDArray[np.uint8], radius: int = HALO) -> npt.NDArray[np.float32]:
    """A stand-in with a receptive field of ``radius`` px: sums over shifted copies, weighted by direction.

    Zero beyond the tile, as a convolution's own padding. Two channels, whole numbers, so that equality can be exact.
    """
    grey = tiles_nhwc.astype(np.float32).sum(axis=-1)
    height, width = grey.shape[1:]
    framed = np.pad(grey, ((0, 0), (radius, radius), (radius, radius)))
    first, second = np.zeros_like(grey), np.zeros_like(grey)
    for down in range(2 * radius + 1):
        for right in range(2 * radius + 1):
            shifted = framed[:, down : down + height, right : right + width]
            first += (1 + down) * shifted
            second += (1 + right) * shifted
    return np.stack([first, second], axis=1)


def run_tiled(image: npt.NDArray[np.uint8], tile_plan: TilePlan, batch: int) -> npt.NDArray[np.float32]:
    padded = pad(image, tile_plan)
    out = np.full((2, *tile_plan.image_hw), np.nan, np.float32)
    for start in range(0, len(tile_plan), batch):
        stitch_into(out, tile_plan, start, local_network(cut(padded, tile_plan, start, start + batch)))
    return out


def random_image(hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(hw[0] * 10007 + hw[1]).integers(0, 256, (*hw, 3), dtype=np.uint8)


@pytest.mark.parametrize("image_hw", SIZES)
def test_tiled_equals_untiled_bit_for_bit(image_hw: tuple[int, int]) -> None:
    image = random_image(image_hw)
    tile_plan = plan(image_hw, TILE, HALO)
    height, width = image_hw
    untiled = local_network(pad(image, tile_plan)[None])[0, :, :height, :width]
    for batch in (1, 4, 16):
        np.testing.assert_array_equal(run_tiled(image, tile_plan, batch), untiled)


def test_receptive_field_beyond_the_halo_shows() -> None:
    """The comparison above can fail: with a halo one pixel too small, seams differ."""
    image = random_image((63, 101))
    tile_plan = plan((63, 101), TILE, HALO - 1)
    untiled = local_network(image[None])[0]
    assert not np.array_equal(run_tiled(image, tile_plan, 4), untiled)


@pytest.mark.parametrize("halo", [0, 1, 6, 13])
@pytest.mark.parametrize("length", [1, 27, 28, 29, 30, 55, 56, 57, 83, 84, 100, 1001])
def test_each_pixel_is_owned_once_and_has_its_halo(length: int, halo: int) -> None:
    tile_plan = plan((length, TILE), TILE, halo)
    owners = np.zeros(length, int)
    for tile in tile_plan.tiles:
        read, crop, write = tile.read[0], tile.crop[0], tile.write[0]
        owners[write] += 1
        assert read.start >= 0
        assert read.stop == read.start + TILE <= tile_plan.padded_hw[0]
        assert crop.stop > crop.start >= 0
        assert (write.start - crop.start, write.stop - crop.stop) == (read.start, read.start)
        assert write.start == 0 or crop.start >= halo
        assert write.stop == length or TILE - crop.stop >= halo
    assert (owners == 1).all()


def test_tiles_are_as_few_as_possible() -> None:
    """Stride 28 - 10 = 18: one tile reaches 28, two 46, three 64."""
    counts = {length: len(plan((length, 1), TILE, HALO)) for length in (28, 29, 46, 47, 64, 65)}
    assert counts == {28: 1, 29: 2, 46: 2, 47: 3, 64: 3, 65: 4}


def test_plan_by_hand() -> None:
    """10 px in tiles of 6 with halo 1: two tiles from 0 and 4; they overlap on 4..6 and the seam is at 5."""
    first, second = plan((10, 6), 6, 1).tiles
    assert (first.read[0], first.crop[0], first.write[0]) == (slice(0, 6), slice(0, 5), slice(0, 5))
    assert (second.read[0], second.crop[0], second.write[0]) == (slice(4, 10), slice(1, 6), slice(5, 10))


def test_padding_reflects_and_only_where_needed() -> None:
    image = np.arange(3, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    padded = pad(image, plan((1, 3), 6, 1))
    assert padded.shape == (6, 6, 3)
    np.testing.assert_array_equal(padded[0, :, 0], [0, 1, 2, 1, 0, 1])
    large = random_image((28, 30))
    assert pad(large, plan((28, 30), TILE, HALO)) is large


def test_the_last_batch_may_be_short() -> None:
    tile_plan = plan((28, 65), TILE, HALO)
    assert cut(random_image((28, 65)), tile_plan, 3, 19).shape == (1, TILE, TILE, 3)


@pytest.mark.parametrize(("tile", "halo"), [(28, 14), (28, -1), (0, 0), (28, 100)])
def test_impossible_halo_is_refused(tile: int, halo: int) -> None:
    with pytest.raises(UsageError, match="does not fit a tile"):
        plan((100, 100), tile, halo)


def test_tiles_are_cut_into_a_part_of_a_batch() -> None:
    tile_plan = plan((28, 65), TILE, HALO)
    image = random_image((28, 65))
    batch = np.full((5, TILE, TILE, 3), 7, np.uint8)
    cut_into(batch[1:3], image, tile_plan, 2)
    assert np.array_equal(batch[1:3], cut(image, tile_plan, 2, 4))
    assert (batch[[0, 3, 4]] == 7).all()
    with pytest.raises(UsageError, match="plan of 4 tiles"):
        cut_into(batch, image, tile_plan, 0)
    with pytest.raises(UsageError, match="expected"):
        cut_into(batch[:2, 1:], image, tile_plan, 0)


def test_wrong_sizes_are_refused() -> None:
    tile_plan = plan((40, 40), TILE, HALO)
    with pytest.raises(UsageError, match="is empty"):
        plan((0, 5), TILE, HALO)
    with pytest.raises(UsageError, match="tile plan was made for 40 x 40"):
        pad(random_image((40, 41)), tile_plan)
    with pytest.raises(UsageError, match="plan of 4 tiles"):
        stitch_into(np.zeros((2, 40, 40), np.float32), tile_plan, 3, np.zeros((2, 2, TILE, TILE), np.float32))
    with pytest.raises(UsageError, match="expected"):
        stitch_into(np.zeros((3, 40, 40), np.float32), tile_plan, 0, np.zeros((2, 2, TILE, TILE), np.float32))
