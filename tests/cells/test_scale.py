"""The scale of images: from settings, or from a search over scales (``--cell-diameter auto``)."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from cellseg_deploy import Segmenter
from cellseg_deploy.cells.metrics import score_image
from cellseg_deploy.cells.scale import (
    MANY_CELLS,
    MIN_CELLS,
    MIN_MEASURED,
    View,
    crop_of,
    empty_view,
    fixed_scale,
    lost_share_note,
    scale_from_cells,
    search,
    size_note,
    surest,
)
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file
from cellseg_deploy.samples import SmearParams, make_smear


def discs(n: int, diameter: int, *, cut: int = 0) -> np.ndarray:
    """Label image with ``n`` discs in a row apart from the border, and ``cut`` half discs twice as wide at its top."""
    pitch = 2 * diameter + 4
    labels = np.zeros((3 * diameter, pitch * max(n, cut) + 4), np.int32)
    for k in range(cut):
        cv2.circle(labels, (pitch // 2 + k * pitch, 0), diameter, n + k + 1, -1)
    for k in range(n):
        cv2.circle(labels, (pitch // 2 + k * pitch, 2 * diameter), diameter // 2, k + 1, -1)
    return labels


def test_the_scale_follows_from_the_median_cell() -> None:
    choice = scale_from_cells(discs(12, 60), 45.0, 0.5)
    assert choice.note == ""
    assert choice.scale == pytest.approx(45 / 61, rel=0.03)


def test_cells_at_the_border_do_not_count() -> None:
    assert scale_from_cells(discs(12, 60, cut=20), 45.0, 0.5) == scale_from_cells(discs(12, 60), 45.0, 0.5)


@pytest.mark.parametrize(("times", "again"), [(0.84, True), (0.9, False), (1.1, False), (1.2, True)])
def test_a_second_pass_only_where_sizes_differ(times: float, again: bool) -> None:
    labels = discs(12, 60)
    diameter = math.sqrt(4 / math.pi * np.count_nonzero(labels) / 12)
    first = 45.0 / diameter * times
    assert (scale_from_cells(labels, 45.0, first).scale != first) is again


def test_too_few_cells_keep_the_scale_and_say_so() -> None:
    choice = scale_from_cells(discs(MIN_CELLS - 1, 60, cut=3), 45.0, 0.5)
    assert choice.scale == 0.5
    assert f"only {MIN_CELLS - 1} whole cells" in choice.note
    assert scale_from_cells(discs(MIN_CELLS, 60), 45.0, 0.5).note == ""
    assert scale_from_cells(np.zeros((4, 4), np.int32), 45.0, 0.5).scale == 0.5


@pytest.mark.parametrize(
    ("times", "said"), [(0.7, "60 px wide, the model expects 42"), (0.85, ""), (1.2, ""), (1.4, "60")]
)
def test_cells_of_an_unexpected_size_are_remarked_upon(times: float, said: str) -> None:
    labels = discs(12, 60)
    diameter = math.sqrt(4 / math.pi * np.count_nonzero(labels) / 12)
    note = size_note(labels, 45.0, 45.0 / (diameter * times))
    assert said in note if said else note == ""
    assert size_note(discs(MIN_CELLS - 1, 60), 45.0, 5.0) == ""


def test_a_size_that_was_given_is_not_remarked_upon() -> None:
    """Unless it is the model's own: whether that was typed is not recorded, and nothing may depend on it."""
    smear = make_smear(SmearParams(size_hw=(450, 600), cell_diameter_px=45, n_cells=50), 3)
    notes = list[tuple[str, ...]]()
    spec = read_model_file(default_model_path()).spec
    own = {"scale": spec.image_scale}, {"cell_diameter_px": spec.cell_diameter_px / spec.image_scale}
    for given in ({"scale": 0.6}, {"cell_diameter_px": 80.0}, {}, *own):
        with Segmenter.load(**{"scale": None, **given}) as segmenter:  # type: ignore[arg-type]
            notes.append(segmenter(smear.image_hwc).notes)
    assert notes[:2] == [(), ()]
    assert notes[2:] == [notes[2]] * 3
    assert "`cell_diameter_px='auto'`" in notes[2][0]


@pytest.mark.parametrize(
    ("seen", "kept", "said"),
    [
        (0.34, 0.0, "34% of the image was classified as cell, but the cells reported cover only 0%"),
        (0.36, 0.15, "15%"),
        (0.36, 0.2, ""),
        (0.009, 0.0, ""),
    ],
)
def test_cells_that_the_network_sees_and_nobody_counts_are_remarked_upon(seen: float, kept: float, said: str) -> None:
    note = lost_share_note(seen, kept)
    assert said in note if said else note == ""


def test_a_smear_of_cells_too_small_for_the_model_says_so() -> None:
    smear = make_smear(SmearParams(size_hw=(600, 800), cell_diameter_px=90, n_cells=30), 3).image_hwc
    small = cv2.resize(smear, (80, 60), interpolation=cv2.INTER_AREA)
    with Segmenter.load(scale=None) as segmenter:
        assert segmenter(smear).notes == ()
        result = segmenter(small)
    assert result.count < 10
    assert any("of the image was classified as cell" in note for note in result.notes)


def test_settings() -> None:
    assert fixed_scale(0.5, 45.0, scale=None, cell_diameter_px="auto") == 0.5
    assert fixed_scale(0.5, 45.0, scale=None, cell_diameter_px=90.0) == 0.5
    with pytest.raises(UsageError, match="exclude each other"):
        fixed_scale(0.5, 45.0, scale=1.0, cell_diameter_px="auto")
    with pytest.raises(UsageError, match="a number of pixels or 'auto'"):
        fixed_scale(0.5, 45.0, scale=None, cell_diameter_px="large")  # type: ignore[arg-type]


@pytest.mark.parametrize("diameter", [45, 170])
def test_a_smear_at_another_magnification(diameter: int) -> None:
    """Half and nearly twice the size of the training cells: no worse than before, and the result says the scale."""
    zoom = diameter / 90
    params = SmearParams(size_hw=(round(900 * zoom), round(1200 * zoom)), cell_diameter_px=diameter, n_cells=50)
    smear = make_smear(params, 3)
    with Segmenter.load() as auto, Segmenter.load(scale=None) as plain:
        found, without = auto(smear.image_hwc), plain(smear.image_hwc)
        model_diameter = auto.backend.spec.cell_diameter_px
    score, before = (score_image(smear.labels_hw, result.labels, min_area_px=0) for result in (found, without))
    assert found.scale == pytest.approx(model_diameter / diameter, rel=0.15)
    assert found.notes == ()
    assert without.notes == (size_note(without.labels, model_diameter, without.scale),)
    assert "`cell_diameter_px='auto'`" in without.notes[0]
    assert score.n_predicted == pytest.approx(score.n_true, rel=0.12)
    # Not F1: at a wrong scale slivers at the image border are counted, which this truth holds for cells as well.
    assert score.merges + score.splits <= before.merges + before.splits


def view(scale: float, diameter: float, sure: int, n: int = MIN_MEASURED) -> View:
    return View(scale, np.full(n, round(math.pi / 4 * diameter**2)), sure, 1000)


def test_the_surest_of_the_fitting_scales_is_taken() -> None:
    nuclei, right, near, piles = view(2, 25, 990), view(1, 50, 900), view(0.5, 30, 800), view(0.25, 90, 990, MANY_CELLS)
    assert surest([nuclei, right, near, piles], 48.0) is right
    assert surest([nuclei, view(1, 100, 900), near], 48.0) is None  # 30 px and 100 px in one image
    assert surest([nuclei, piles, empty_view(1)], 48.0) is None
    assert surest([near, right, nuclei], 48.0) is right


def test_a_scale_that_no_neighbour_confirms_needs_many_cells() -> None:
    """Raabin's fields of four whole cells: fragments at the finest scale outnumber them."""
    fragments = view(4, 33, 430, 8)
    views = [fragments, view(2, 25, 530, 2), view(1, 289, 890, 1), view(0.5, 71, 888, 4), view(0.25, 35, 839, 4)]
    assert surest(views, 48.0) is views[3]
    assert surest(views[:3], 48.0) is None
    assert surest([view(4, 33, 430, MANY_CELLS), *views[1:3]], 48.0) is not None
    few = [view(0.5, 71, 888, MIN_MEASURED), view(0.25, 35, 839, MIN_MEASURED - 1)]
    assert surest(few, 48.0) is None


@pytest.mark.parametrize("model_diameter", [24.0, 32.0, 64.0])
def test_models_of_any_cell_size_search_alike(model_diameter: float) -> None:
    """The same picture at the same scales of the image's cells, for a model of smaller or larger cells."""
    cells, tile = np.full((900, 900, 3), 220, np.uint8), 336
    for row in range(80, 900, 150):
        for column in range(80, 900, 150):
            cv2.circle(cells, (column, row), 50, (150, 90, 120), -1)

    def look(crop_hwc: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray]:
        """Certain about discs of the model's size, else not."""
        small = cv2.resize(crop_hwc, None, fx=at, fy=at, interpolation=cv2.INTER_AREA)
        inside = small[..., 0] < 190
        off = abs(math.log(100 * at / model_diameter))
        _, labels = cv2.connectedComponents(inside.astype(np.uint8), ltype=cv2.CV_32S)
        return np.where(inside, 0.95 if off < 0.6 else 0.6, 0.0).astype(np.float32), labels

    own = model_diameter / 60
    choice = search([cells], look, tile_size=tile, model_diameter_px=model_diameter, image_scale=own)
    assert choice.note == ""
    assert choice.scale == pytest.approx(model_diameter / 100, rel=0.08)


def test_few_large_cells_outweigh_grains_of_one_size() -> None:
    """Six cells of 200 px, and grains of 18 px that two scales agree on: as found in a photograph at twice its size."""

    def look(crop: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        n, diameter = (6, 200 * scale) if scale < 0.3 else (5, 18 * scale) if scale > 1 else (0, 0)
        labels = discs(n, round(diameter)) if n else np.zeros((9, 9), np.int32)
        return np.where(labels > 0, 0.95 if scale < 0.3 else 0.6, 0.0).astype(np.float32), labels

    part = np.zeros((1344, 1344, 3), np.uint8)
    choice = search([part], look, tile_size=224, model_diameter_px=32, image_scale=0.3243)
    assert 32 / choice.scale == pytest.approx(200, rel=0.05)


def test_crops_lie_in_the_image_at_the_same_places() -> None:
    assert crop_of((100, 300), 60, 0) == (slice(20, 80), slice(120, 180))
    assert crop_of((50, 300), 60, 1)[0] == slice(0, 50)
    for index in range(6):
        rows, columns = crop_of((100, 300), 60, index)
        assert 0 <= rows.start < rows.stop <= 100
        assert 0 <= columns.start < columns.stop <= 300


@pytest.mark.parametrize("diameter", [16, 40, 90, 200])
def test_cells_of_any_size_are_measured(diameter: int) -> None:
    zoom = diameter / 90
    smear = make_smear(SmearParams(size_hw=(900, 1200), cell_diameter_px=90, n_cells=70), 5).image_hwc
    image = cv2.resize(smear, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    with Segmenter.load() as segmenter:
        choice = segmenter.find_scale([image])
        assert segmenter.backend.spec.cell_diameter_px / choice.scale == pytest.approx(diameter, rel=0.2)
    assert (choice.note, choice.images) == ("", 1)


def test_without_cells_the_scale_stays_and_a_note_says_so() -> None:
    with Segmenter.load() as segmenter:
        result = segmenter(np.full((300, 300, 3), 230, np.uint8))
        assert result.scale == segmenter.backend.spec.image_scale
    assert any("whole cells of one size to estimate it from" in note for note in result.notes)
