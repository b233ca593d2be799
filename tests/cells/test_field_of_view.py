"""What of a picture is field of view: surrounds are left out, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from conftest import DarknessBackend, draw_discs
from segmented_images import segmented

from cellseg_deploy.cells.count_rules import counted
from cellseg_deploy.cells.field_of_view import edges, find_field, inside_field
from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs import confluence, overlay
from cellseg_deploy.run import tables
from cellseg_deploy.samples import SmearParams, make_smear
from cellseg_deploy.segmenter import Segmenter

H, W = 600, 800


def smear(seed: int = 3) -> np.ndarray:
    return make_smear(SmearParams(size_hw=(H, W), n_cells=50, cell_diameter_px=60), seed).image_hwc


def disc(radius: float) -> np.ndarray:
    y, x = np.ogrid[:H, :W]
    return (y - H / 2) ** 2 + (x - W / 2) ** 2 <= radius**2


def turned() -> np.ndarray:
    box = cv2.boxPoints(((W / 2, H / 2), (600, 420), 12)).astype(np.int32)
    return cv2.fillConvexPoly(np.zeros((H, W), np.uint8), box, 1) > 0


def rows(first: int, last: int) -> np.ndarray:
    return np.repeat((np.arange(H) >= first) & (np.arange(H) < last), W).reshape(H, W)


SURROUNDS: dict[str, tuple[Callable[[], np.ndarray], int]] = {
    "eyepiece": (lambda: disc(280), 5),
    "eyepiece cut by the picture": (lambda: disc(420), 12),
    "phone frame": (lambda: rows(40, 560) & (np.arange(W) >= 90) & (np.arange(W) < 720), 0),
    "black letterbox": (lambda: rows(75, 525), 0),
    "white letterbox": (lambda: rows(75, 525), 255),
    "grey letterbox": (lambda: rows(75, 525), 128),
    "turned photograph, black": (turned, 0),
    "information band": (lambda: rows(0, 540), 0),
    "white information band": (lambda: rows(0, 540), 255),
}


def surrounded(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A smear with the surround, as a JPEG gives it back, and its true field."""
    make, level = SURROUNDS[name]
    field, picture = make(), smear()
    picture[~field] = level
    if "band" in name:
        colour = (255,) * 3 if level == 0 else (0,) * 3
        cv2.putText(picture, "x100  20 um", (30, 585), cv2.FONT_HERSHEY_SIMPLEX, 1.2, colour, 3)
    _, file = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
    return np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR)), field


@pytest.mark.parametrize("name", SURROUNDS)
def test_a_surround_is_left_out(name: str) -> None:
    picture, field = surrounded(name)
    found = find_field(picture)
    assert found is not None
    assert np.count_nonzero(found & ~field) <= 0.002 * field.size
    assert np.count_nonzero(found & field) >= 0.975 * np.count_nonzero(field)


def with_body(centre: tuple[int, int], radius: int, level: int = 20) -> np.ndarray:
    picture = smear()
    cv2.circle(picture, centre, radius, (level, level, level), -1)
    return picture


def fluorescence() -> np.ndarray:
    return 255 - draw_discs((H, W), [(x, y) for x in range(60, W, 120) for y in range(60, H, 120)], radius=35) // 2 * 2


def overexposed() -> np.ndarray:
    return np.clip(smear().astype(np.int64) + 60, 0, 255).astype(np.uint8)


def unevenly_lit() -> np.ndarray:
    """Brighter to the right, smooth: the darker part has nearly one colour, and a straight edge."""
    light = np.linspace(-30, 10, W)[None, :, None] + np.random.default_rng(0).normal(0, 0.5, (H, W, 1))
    return np.clip(draw_discs((H, W), [(650, 100), (600, 400)], radius=35) + light, 0, 255).astype(np.uint8)


WHOLE: dict[str, Callable[[], np.ndarray]] = {
    "smear": smear,
    "empty field": lambda: np.random.default_rng(0).normal(230, 2, (H, W, 3)).clip(0, 255).astype(np.uint8),
    "constant picture": lambda: np.full((H, W, 3), 230, np.uint8),
    "black picture": lambda: np.zeros((H, W, 3), np.uint8),
    "nucleus in a corner": lambda: with_body((10, 10), 120),
    "nucleus at a side": lambda: with_body((0, 300), 120),
    "fluorescence": fluorescence,
    "one bright body on black": lambda: np.where(disc(200)[..., None], 60, 2).astype(np.uint8).repeat(3, 2),
    "overexposed background": overexposed,
    "uneven light": unevenly_lit,
    "a dark last row": lambda: np.pad(smear()[2:], ((0, 2), (0, 0), (0, 0))),
    "tiny": lambda: np.zeros((3, 4, 3), np.uint8),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_field_stays(name: str) -> None:
    assert find_field(WHOLE[name]()) is None


def stub_picture() -> tuple[np.ndarray, np.ndarray]:
    """Discs in an eyepiece of black, three of them cut by its edge."""
    picture = draw_discs((H, W), [(x, y) for x in range(140, 680, 40) for y in range(40, 580, 40)])
    field = disc(280)
    picture[~field] = 0
    return picture, field


def test_cells_confluence_and_border_refer_to_the_field() -> None:
    picture, field = stub_picture()
    segmenter = Segmenter(DarknessBackend())
    result = segmenter(picture)
    assert result.field is not None
    assert not result.labels[~field].any()
    centres = [(x, y) for x in range(140, 680, 40) for y in range(40, 580, 40)]
    inside = sum(result.field[y, x] for x, y in centres)
    assert int(result.counted().sum()) == pytest.approx(inside, rel=0.05)
    assert result.count > int(result.counted().sum())  # the rest is seen, by less than half
    assert result.confluence == pytest.approx(inside * np.pi * 100 / result.field.sum(), rel=0.05)
    assert not any("was classified as cell" in note for note in result.notes)  # its mirror image is not lost
    assert result.table.columns["touches_border"].any()
    assert [kind_of(note) for note in result.notes if "field of view" in note] == ["field of view"]
    whole = segmenter(picture, field="full")
    assert whole.field is None
    assert whole.labels[0, 0] > 0


def test_a_setting_that_is_none_is_refused() -> None:
    segmenter = Segmenter(DarknessBackend())
    with pytest.raises(UsageError, match=r"field must be one of auto, full, got 'some'"):
        segmenter(smear(), field="some")  # type: ignore[arg-type]


def test_the_edge_of_the_field_is_border_for_every_rule() -> None:
    field = np.zeros((40, 60), np.bool_)
    field[10:30, 10:50] = True
    labels = np.zeros((40, 60), np.int32)
    for number, (y, x) in enumerate([(18, 10), (10, 20), (18, 46), (26, 30), (18, 28)], start=1):
        labels[y : y + 4, x : x + 4] = number
    at_edge = edges(labels, field, 5)
    assert at_edge.tolist() == [[i == side for side in range(4)] for i in range(4)] + [[False] * 4]
    boxes = segmented(labels).table.boxes
    assert counted(boxes, (40, 60), "all", at_edge).tolist() == [True] * 5
    assert counted(boxes, (40, 60), "exclude-border", at_edge).tolist() == [False] * 4 + [True]
    assert counted(boxes, (40, 60), "frame", at_edge).tolist() == [False, True, True, False, True]


def test_at_the_picture_s_own_border_a_cell_touches_with_its_last_pixel() -> None:
    labels = np.zeros((40, 60), np.int32)
    labels[10:20, 1:9], labels[10:20, 52:60] = 1, 2
    assert edges(labels, np.ones((40, 60), np.bool_), 2).tolist() == [[False] * 4, [False, False, True, False]]


def test_huge_outer_and_sliver_objects_are_no_cells() -> None:
    field = np.zeros((100, 100), np.bool_)
    field[:, 20:] = True
    labels = np.zeros((100, 100), np.int32)
    labels[0:10, 40:50] = 1
    labels[15:20, 15:23] = 2  # a sliver at the edge, most of it outside
    labels[30:32, 20:22] = 3  # a sliver at the edge
    labels[40:50, 60:70] = 4
    labels[55:, 30:] = 5  # huge
    kept = inside_field(labels, field, min_edge_area_rel=0.2, max_area_px=1000)
    assert np.array_equal(kept, np.where(labels == 1, 1, np.where(labels == 4, 2, 0)))


def test_tables_and_pictures_refer_to_the_field() -> None:
    labels = np.zeros((320, 640), np.int32)
    labels[100:120, 400:420] = 1
    field = np.zeros((320, 640), np.bool_)
    field[:, 320:] = True
    image = segmented(labels, field=field, pixel_size_um=0.5)
    record = tables.done(image, source=None, output_name="a", outputs=[])
    assert record.result["field_of_view_share"] == 0.5
    assert record.result["confluence"] == 400 / (320 * 320)
    assert record.result["counted_per_mm2"] == pytest.approx(1 / (160 * 160) * 1e6)
    assert np.isnan(image.grid.share[:, :4]).all()
    assert b",None" not in confluence.encode_table(image)
    assert confluence.encode_table(image).splitlines()[1].split(b",")[7] == b""
    for picture in (overlay.draw(image.pixels_hwc, labels, field=field), confluence.draw(image)):
        assert picture[200:, :300].mean() < 110
        assert picture[200:300, 410:470].mean() > 190
