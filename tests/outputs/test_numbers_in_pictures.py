"""Numbers in pictures can be read: white glyphs in a dark rim, on any ground and at any size."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont

from cellseg_deploy.outputs.overlay import write_centred


def on_black_and_white(text: str, scale: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Masks of what is white on a black picture, and of what is dark on a white one: glyphs and rim on any ground."""
    size = (round(60 * scale) + 20, round(40 * scale * len(text)) + 20)
    pictures = [np.full((*size, 3), ground, np.uint8) for ground in (0, 255)]
    for picture in pictures:
        write_centred(picture, text, (size[1] / 2, size[0] / 2), scale)
    return pictures[0][..., 0] > 200, pictures[1][..., 0] < 60


def reference(digit: str) -> npt.NDArray[np.uint8]:
    """The digit as a font's author drew it, 100 px high."""
    picture = Image.new("L", (200, 200))
    ImageDraw.Draw(picture).text((50, 20), digit, 255, font=ImageFont.load_default(size=120))
    return in_box(np.asarray(picture) > 127)


def in_box(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """``mask`` cut to what it holds, at 100 by 60 px."""
    y, x = np.nonzero(mask)
    cut = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
    return np.asarray(cv2.resize(cut.astype(np.uint8), (60, 100), interpolation=cv2.INTER_NEAREST))


@pytest.mark.parametrize(("scale", "alike"), [(0.4, 0.25), (1.0, 0.6), (3.0, 0.85), (10.0, 0.85)])  # hinting, if small
def test_each_digit_is_read_as_itself(scale: float, alike: float) -> None:
    """White strokes have the digit's shape; a rim drawn over them, or as wide as they are, would eat them."""
    known = {digit: reference(digit) for digit in "023456789"}  # a 1 stretched to a box is a bar
    for digit, shape in known.items():
        seen = in_box(on_black_and_white(digit, scale)[0])
        overlap = {other: np.sum(seen & mask) / np.sum(seen | mask) for other, mask in known.items()}
        assert max(overlap, key=lambda other: overlap[other]) == digit, overlap
        assert np.sum(seen & shape) / np.sum(seen | shape) > alike


@pytest.mark.parametrize(("scale", "share"), [(0.4, 0.5), (1.0, 0.7), (3.0, 0.9), (10.0, 0.9)])
def test_white_glyphs_stand_in_a_dark_rim_that_grows_with_them(scale: float, share: float) -> None:
    glyphs, dark = on_black_and_white("188", scale)
    width = max(1, round(2 * scale))
    side = 2 * width + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    rim = (cv2.dilate(glyphs.astype(np.uint8), disc) > 0) & ~glyphs
    assert np.mean(dark[rim]) > share  # the rest is where white turns into black
    stroke = 2 * cv2.distanceTransform(glyphs.astype(np.uint8), cv2.DIST_L2, 5).max()
    assert stroke > width  # the fill is wider than its rim on one side


def test_a_number_at_the_corner_is_cut_and_one_beyond_is_nothing() -> None:
    picture = np.full((20, 20, 3), 128, np.uint8)
    write_centred(picture, "12", (-100.0, -100.0), 1.0)
    assert (picture == 128).all()
    write_centred(picture, "12", (0.0, 0.0), 1.0)
    assert (picture != 128).any()
