"""An image resized row by row has the bytes of the image resized as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.cells.image_tiles import resize
from cellseg_deploy.cells.row_resize import RowResizer, scaled_size


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 0.3243, 0.73, 0.951, 0.02, 1.05, 1.37, 2.0, 3.3])
@pytest.mark.parametrize("hw", [(200, 160), (97, 131), (1, 40), (53, 1)])
def test_rows_are_those_of_the_whole_image(hw: tuple[int, int], scale: float) -> None:
    image = np.random.default_rng(3).integers(0, 256, (*hw, 3), dtype=np.uint8)
    expected = resize(image, scale)
    resizer = RowResizer(lambda start, stop: image[start:stop], hw, scale)
    assert resizer.out_hw == scaled_size(hw, scale) == expected.shape[:2]
    height = expected.shape[0]
    for step in (1, 7, height):
        parts = [resizer.rows(top, min(top + step, height)) for top in range(0, height, step)]
        assert np.array_equal(np.concatenate(parts), expected), (hw, scale, step)
