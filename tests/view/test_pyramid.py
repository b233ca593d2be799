"""Tiles of large images: every pixel once, levels halve, the cache keeps what was used last."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cellseg_deploy.errors import UsageError
from cellseg_deploy.view.pyramid import TILE_SIZE, Pyramid, PyramidCache


def flat(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height, x * 200 // width, np.full((height, width), 90)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("hw", [(1100, 1300), (1, 1), (1, 700), (513, 2)])
def test_tiles_of_a_level_make_up_the_image(hw) -> None:
    image = flat(*hw)
    pyramid = Pyramid(image)
    assert pyramid.level(0).shape == (1, 1, 3)
    for level in range(pyramid.top + 1):
        factor = 2 ** (pyramid.top - level)
        assert pyramid.level(level).shape[:2] == tuple(-(-side // factor) for side in hw)
    rows, columns = (-(-side // TILE_SIZE) for side in hw)
    whole = np.zeros_like(image)
    for row in range(rows):
        for column in range(columns):
            tile = np.asarray(Image.open(io.BytesIO(pyramid.tile(pyramid.top, column, row))))
            whole[row * TILE_SIZE :, column * TILE_SIZE :][: tile.shape[0], : tile.shape[1]] = tile
    assert np.abs(whole.astype(int) - image).max() <= 6  # JPEG
    for wrong in ((pyramid.top + 1, 0, 0), (pyramid.top, columns, 0), (pyramid.top, 0, rows), (-1, 0, 0)):
        with pytest.raises(UsageError):
            pyramid.tile(*wrong)


def test_the_cache_decodes_an_image_once_and_drops_the_oldest() -> None:
    loaded: list[str] = []

    def load(key: str) -> np.ndarray:
        loaded.append(key)
        return flat(10, 10)

    cache = PyramidCache(load, most_bytes=2 * 400)
    for key in "aabbcab":
        assert cache[key].width == 10
    assert loaded == ["a", "b", "c", "a", "b"]
