"""Pointers and drawn marks are no cells; cells, hairs' look-alikes and rims stay."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from test_field_of_view import H, W, disc, fluorescence, smear, surrounded

from cellseg_deploy.cells.field_marks import find_pointer, without_drawn, without_pointer
from cellseg_deploy.cells.field_of_view import find_field, without_surround
from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.outputs import overlay
from cellseg_deploy.segmenter import Segmenter

CENTRES = [(x, y) for x in range(140, 680, 40) for y in range(40, 580, 40)]


def needle() -> np.ndarray:
    """A pointer from the right side to the middle, bool (h, w); it tapers."""
    corners = np.array([(420, 290), (422, 296), (W + 20, 440), (W + 20, 410)], np.int32)
    return cv2.fillConvexPoly(np.zeros((H, W), np.uint8), corners, 1) > 0


def pointed(picture: np.ndarray, level: int = 14) -> np.ndarray:
    """``picture`` with the pointer, a little out of focus."""
    weight = cv2.GaussianBlur(needle().astype(np.float32), (0, 0), 1.0)[..., None]
    return np.asarray(picture * (1 - weight) + level * weight).round().astype(np.uint8)


@pytest.mark.parametrize("surround", [False, True])
def test_a_pointer_is_found_and_painted_over(surround: bool) -> None:
    picture = pointed(smear())
    if surround:
        picture[~disc(280)] = 0
    field = find_field(picture)
    found = find_pointer(picture, field)
    assert (field is not None) == surround
    assert found is not None
    true = needle() if field is None else needle() & field
    assert np.count_nonzero(found & true) >= 0.9 * np.count_nonzero(true)
    assert np.count_nonzero(found) <= 4 * np.count_nonzero(true)
    painted = without_pointer(picture, found)
    inner = np.ones_like(found) if field is None else cv2.erode(field.astype(np.uint8), np.ones((21, 21))) > 0
    assert painted[found & inner].max(axis=1).min() > 3 * 14
    assert np.array_equal(painted[~found], picture[~found])


def chain() -> np.ndarray:
    """Dark cells side by side from the border on, as in a roll of coins."""
    return draw_discs((H, W), [(x, 300) for x in range(0, 400, 22)], radius=24)


def barred() -> np.ndarray:
    picture = smear()
    cv2.rectangle(picture, (600, 550), (760, 558), (0, 0, 0), -1)
    return picture


NO_POINTER: dict[str, Callable[[], np.ndarray]] = {
    "smear": smear,
    "chain of cells": chain,
    "scale bar": barred,
    "rim of a turned photograph": lambda: surrounded("turned photograph, black")[0],
    "dark last rows": lambda: np.pad(smear()[5:], ((0, 5), (0, 0), (0, 0))),
    "fluorescence": fluorescence,
    "tiny": lambda: np.zeros((3, 4, 3), np.uint8),
}


@pytest.mark.parametrize("name", NO_POINTER)
def test_what_is_no_pointer_stays(name: str) -> None:
    picture = NO_POINTER[name]()
    assert find_pointer(picture, find_field(picture)) is None


def test_cells_are_counted_as_if_there_were_no_pointer() -> None:
    plain = draw_discs((H, W), CENTRES)
    segmenter = Segmenter(DarknessBackend())
    found = segmenter(pointed(plain))
    assert found.count == pytest.approx(segmenter(plain).count, abs=4)
    assert [kind_of(note) for note in found.notes if "pointer" in note] == ["field of view"]
    whole = segmenter(pointed(plain), field="full")
    assert abs(whole.count - segmenter(plain).count) > 4
    assert not any("pointer" in note for note in whole.notes)


def lettered(colour: tuple[int, int, int]) -> np.ndarray:
    """Discs above, a bar and letters below."""
    picture = draw_discs((H, W), [(x, y) for x in range(60, 780, 60) for y in range(60, 420, 60)], radius=20)
    cv2.rectangle(picture, (500, 560), (760, 570), colour, -1)
    cv2.putText(picture, "20 um", (540, 540), cv2.FONT_HERSHEY_SIMPLEX, 2.0, colour, 6)
    _, file = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR))


@pytest.mark.parametrize("colour", [(0, 0, 0), (0, 0, 230), (230, 0, 0)])
def test_bars_and_letters_are_no_cells(colour: tuple[int, int, int]) -> None:
    picture = lettered(colour)
    segmenter = Segmenter(DarknessBackend())
    found = segmenter(picture)
    assert found.count == 72
    assert found.labels[:420].max() == 72
    notes = [note for note in found.notes if "scale bars and letters" in note]
    assert [kind_of(note) for note in notes] == ["field of view"]
    assert notes[0][0].isdigit()
    assert segmenter(picture, field="full").count > 72


def test_numbers_stay_in_order_and_cells_are_never_drawn() -> None:
    labels = np.zeros((60, 90), np.int32)
    picture = np.full((60, 90, 3), 230, np.uint8)
    colours = [(60, 20, 90), (0, 0, 0), (40, 30, 110), (20, 10, 28)]  # a nucleus, a mark, another, the darkest
    for number, colour in enumerate(colours, start=1):
        where = slice(10, 30), slice(20 * number - 15, 20 * number)
        labels[where], picture[where] = number, colour
    kept, gone = without_drawn(picture, labels)
    assert gone == 1
    assert [int(kept[15, 20 * n - 10]) for n in (1, 2, 3, 4)] == [1, 0, 2, 3]
    dim = (picture // 5).astype(np.uint8)  # what is black in a dark picture is no mark
    assert without_drawn(dim, labels)[1] == 0
    cast = picture.copy()
    cast[picture == 230] = np.resize((0, 20, 250), (picture == 230).sum())
    assert without_drawn(cast, labels)[1] <= 1


def test_the_surround_becomes_the_mirror_image_of_the_field() -> None:
    picture = smear()
    field = np.zeros((H, W), np.bool_)
    field[100:500] = True
    black = np.where(field[..., None], picture, 0).astype(np.uint8)
    filled = without_surround(black, field)
    assert np.array_equal(filled[field], picture[field])
    assert np.array_equal(filled[99::-1], picture[101:201])  # row 100 is the mirror
    assert np.array_equal(filled[500:], picture[498:398:-1])


@pytest.mark.parametrize("name", ["eyepiece", "turned photograph, black"])
def test_no_rim_of_the_surround_is_mirrored(name: str) -> None:
    picture, _ = surrounded(name)
    field = find_field(picture)
    assert field is not None
    filled = without_surround(picture, field)
    near = cv2.dilate(field.astype(np.uint8), np.ones((41, 41), np.uint8)) > 0
    assert filled[near].max(axis=1).min() > 40
    assert filled[near & ~field].std() > 8  # cells, not a plain colour


def test_the_hatching_is_seen_on_black_and_on_white() -> None:
    field = disc(200)
    for level in (0, 255):
        picture = smear()
        picture[~field] = level
        drawn = overlay.draw(picture, np.zeros((H, W), np.int32), field=field)
        corner = drawn[-60:, -60:].astype(int)
        assert corner.max() - corner.min() >= 60
