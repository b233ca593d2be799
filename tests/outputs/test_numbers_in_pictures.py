"""Numbers in pictures can be read: white glyphs in a dark rim, on any ground and at any size."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.outputs.overlay import write_centred


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_glyphs_are_white_and_stand_in_a_dark_rim(ground: int, scale: float) -> None:
    picture = np.full((200, 400, 3), ground, np.uint8)
    write_centred(picture, "188", (200, 100), scale)
    glyph, rim = picture[..., 0] > 200, picture[..., 0] < 60
    if ground == 255:
        box = np.argwhere(rim)
        (top, left), (bottom, right) = box.min(axis=0), box.max(axis=0)
        glyph = glyph[top : bottom + 1, left : right + 1]
    # A fill that its rim covers, or is as wide as it, leaves next to nothing of the strokes.
    assert np.count_nonzero(glyph) >= 60 * scale**2
    if ground:
        assert np.count_nonzero(rim) >= 100 * scale**2


def test_a_number_at_the_corner_is_cut_and_one_beyond_is_nothing() -> None:
    picture = np.full((20, 20, 3), 128, np.uint8)
    write_centred(picture, "12", (-100.0, -100.0), 1.0)
    assert (picture == 128).all()
    write_centred(picture, "12", (0.0, 0.0), 1.0)
    assert (picture != 128).any()
