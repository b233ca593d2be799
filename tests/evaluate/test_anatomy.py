"""Every kind of error told once, at its place, and shown."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from test_metrics_apart import DUMBBELL, HALVES, HW, SINGLE, Labels, image

from cellseg_deploy.evaluate import contact_sheet
from cellseg_deploy.evaluate.anatomy import GROUPS, Finding, find, summary

LEFT, RIGHT = [(70, 10, 10, 10)], [(70, 20, 10, 10)]
BOTH = [*LEFT, *RIGHT]


def kinds(true: Labels, predicted: Labels) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(found.kind, found.true, found.predicted) for found in find(true, predicted, min_area_px=5)]


def test_what_is_right_is_not_told_of() -> None:
    assert find(image(*SINGLE), image(*SINGLE), min_area_px=5) == []
    assert find(image(), image()) == []


@pytest.mark.parametrize(
    ("true", "predicted", "expected"),
    [
        ([LEFT, RIGHT], [BOTH], ("merge", (4, 5), (4,))),
        ([BOTH], [LEFT, RIGHT], ("split", (4,), (4, 5))),
        ([LEFT], [], ("miss", (4,), ())),
        ([], [LEFT], ("invention", (), (4,))),
        ([LEFT], [[(70, 10, 10, 3)]], ("outline", (4,), (4,))),
        ([DUMBBELL], HALVES, ("parted", (4,), (4, 5))),
    ],
)
def test_each_kind(
    true: list[list[tuple[int, int, int, int]]],
    predicted: list[list[tuple[int, int, int, int]]],
    expected: tuple[str, tuple[int, ...], tuple[int, ...]],
) -> None:
    assert kinds(image(*SINGLE, *true), image(*SINGLE, *predicted)) == [expected]


def test_a_clump_left_whole_or_found_in_part_is_no_error() -> None:
    assert kinds(image(*SINGLE, DUMBBELL), image(*SINGLE, DUMBBELL)) == []
    assert kinds(image(*SINGLE, DUMBBELL), image(*SINGLE, HALVES[0])) == []
    assert kinds(image(*SINGLE, DUMBBELL), image(*SINGLE)) == []


def test_a_match_inside_a_merge_is_not_told_twice() -> None:
    """The merged cell is a match of the larger one (IoU 100/120), and swallows the smaller one."""
    true = image(*SINGLE, [(70, 10, 10, 10)], [(70, 20, 10, 2)])
    assert kinds(true, image(*SINGLE, [(70, 10, 10, 12)])) == [("merge", (4, 5), (4,))]


def test_specks_take_no_part() -> None:
    speck = [(90, 90, 2, 2)]
    assert kinds(image(*SINGLE, speck), image(*SINGLE)) == []
    assert kinds(image(*SINGLE), image(*SINGLE, speck)) == []


def test_place_and_border() -> None:
    true = image([(40, 40, 10, 10)], [(0, 90, 10, 20)], [(90, 150, 10, 10)])
    found = find(true, image([(38, 60, 5, 5)]), min_area_px=5)
    assert [(f.kind, f.box, f.at_border, f.group) for f in found] == [
        ("miss", (40, 40, 10, 10), False, "miss"),
        ("miss", (90, 0, 20, 10), True, "border"),
        ("miss", (150, 90, 10, 10), True, "border"),
        ("invention", (60, 38, 5, 5), False, "invention"),
    ]
    assert summary(found) == {**dict.fromkeys(GROUPS, 0), "miss": 1, "border": 2, "invention": 1}
    merged = find(image([(40, 40, 10, 10)], [(40, 51, 10, 10)]), image([(40, 40, 10, 21)]), min_area_px=5)
    assert merged[0].box == (40, 40, 21, 10)


def test_pages_fill_and_show_both_sides(tmp_path: Path) -> None:
    """25 findings are a page of 24 and one of a single crop, beyond the edge of the image too."""
    truth, predicted = image([(0, 0, 30, 30)]), image([(10, 10, 30, 30)])
    photo = np.full((*HW, 3), 200, np.uint8)
    sheets = contact_sheet.ContactSheets(tmp_path)
    finding = Finding("outline", (1,), (1,), (0, 0, 40, 40), at_border=False)
    places = [sheets.add("name", photo, truth, predicted, finding) for _ in range(25)]
    sheets.close()
    assert (places[0], places[-1]) == ("outline-01.jpg, 1", "outline-02.jpg, 1")
    assert sorted(path.name for path in (tmp_path / "anatomy").iterdir()) == ["outline-01.jpg", "outline-02.jpg"]
    page = cv2.imread(str(tmp_path / "anatomy" / "outline-02.jpg"))[..., ::-1].astype(int)
    first = page[34 : 34 + 168, 10 : 10 + 336]

    def has(part: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return bool((np.abs(part - colour).max(axis=2) < 40).sum() > 50)

    left, right = first[:, :166], first[:, 170:]
    assert has(left, contact_sheet.TRUE_RGB)
    assert has(right, contact_sheet.FOUND_RGB)
    assert not has(left, contact_sheet.FOUND_RGB)
    assert not has(right, contact_sheet.TRUE_RGB)
    assert (np.abs(first[4, 4] - 128) < 10).all()  # beyond the image


def test_only_our_own_pages_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "anatomy"
    folder.mkdir()
    for name in ("merge-01.jpg", "border-112.jpg", "merge-plan.jpg", "holiday.jpg"):
        (folder / name).write_bytes(b"")
    contact_sheet.remove_earlier(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["holiday.jpg", "merge-plan.jpg"]


def test_a_crop_beyond_the_edge_keeps_its_place() -> None:
    array = np.arange(1, 7, dtype=np.int32).reshape(2, 3)
    crop = contact_sheet._window(array, -1, -1, 3, fill=0)
    assert crop.tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert contact_sheet._window(array, 1, 1, 3, fill=9).tolist() == [[5, 6, 9], [9, 9, 9], [9, 9, 9]]
