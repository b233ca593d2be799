"""Classes of cells: means over each cell's pixels, which class follows, which classes count."""

from __future__ import annotations

import numpy as np
import pytest

from cellseg_deploy.cells import label_runs
from cellseg_deploy.cells.classes import CellClasses, class_means, classify, counting_classes
from cellseg_deploy.cells.count_rules import counted
from cellseg_deploy.cells.instances import segment
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import BoundaryParams, ThresholdParams
from cellseg_deploy.samples.params import SmearParams
from cellseg_deploy.samples.smear import make_smear

NAMES = ("red", "white", "platelet")


def smear_labels(hw: tuple[int, int] = (150, 200)) -> np.ndarray:
    return make_smear(SmearParams(size_hw=hw, n_cells=20, cell_diameter_px=24), 3).labels_hw


def planes(hw: tuple[int, int], k: int = 3) -> np.ndarray:
    """Numbers that differ from pixel to pixel, (k, h, w)."""
    return np.random.default_rng(7).random((k, *hw)).astype(np.float32)


def test_at_the_images_own_scale_it_is_the_mean_over_the_pixels() -> None:
    labels = smear_labels()
    values = planes(labels.shape)
    expected = [[plane[labels == label].mean(dtype=np.float64) for plane in values] for label in range(1, 21)]
    assert class_means(labels, values, int(labels.max())) == pytest.approx(
        np.array(expected)[: labels.max()], abs=1e-12
    )


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.7, 2.0])
def test_at_another_scale_it_is_the_mean_over_the_pixels_whose_centre_lies_in_the_cell(scale: float) -> None:
    labels = smear_labels()
    height, width = (round(side * scale) for side in labels.shape)
    values = planes((height, width))
    y = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    x = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    there = labels[np.ix_(y, x)]
    expected = [[plane[there == label].mean(dtype=np.float64) for plane in values] for label in range(1, 21)]
    assert class_means(labels, values, int(labels.max())) == pytest.approx(
        np.array(expected)[: labels.max()], abs=1e-12
    )


def test_bands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = smear_labels()
    values = planes((75, 100))
    whole = class_means(labels, values, int(labels.max()))
    monkeypatch.setattr(label_runs, "BAND_PIXELS", 700)
    assert class_means(labels, values, int(labels.max())) == pytest.approx(whole, abs=1e-12)


def test_a_cell_between_the_networks_pixels_takes_the_one_at_its_centroid() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[0, 0], labels[39, 39], labels[13, 27] = 1, 3, 2
    values = planes((5, 5))
    expected = np.stack([values[:, 0, 0], values[:, 1, 3], values[:, 4, 4]])
    assert np.array_equal(class_means(labels, values, int(labels.max())), expected)


def test_the_most_probable_class_is_taken_and_of_equal_ones_the_first() -> None:
    labels = np.repeat(np.array([[1, 1, 0, 2, 2, 0, 3]], np.int32), 2, axis=0)
    values = np.zeros((4, 2, 7), np.float32)
    values[0] = 0.9  # the foreground
    values[1, :, :2], values[2, :, :2] = [0.25, 0.75], [0.75, 0.25]
    values[3, :, 3:5] = [0.5, 1.0]
    found = classify(labels, values, NAMES, ("red", "white"))
    assert found is not None
    assert found.index.tolist() == [0, 2, 0]
    assert found.probability.tolist() == [0.5, 0.75, 0.0]
    assert found.counts.tolist() == [True, False, True]
    assert found.columns["class"].tolist() == ["red", "platelet", "red"]
    assert found.columns["class_probability"].tolist() == [0.5, 0.75, 0.0]
    assert found.numbers(np.array([True, True, False])) == {"red": 1, "white": 0, "platelet": 1}


def test_no_cell_and_no_class() -> None:
    nothing = np.zeros((10, 12), np.int32)
    found = classify(nothing, planes((5, 6), 4), NAMES, NAMES)
    assert isinstance(found, CellClasses)
    assert found.numbers(found.counts) == {"red": 0, "white": 0, "platelet": 0}
    assert found.columns["class"].tolist() == []
    assert classify(nothing, planes((5, 6), 1), (), ()) is None


def test_which_classes_count() -> None:
    assert counting_classes(NAMES, None) == ("red", "white")
    assert counting_classes(NAMES, ["platelet", "red"]) == ("red", "platelet")
    assert counting_classes((), None) == ()
    assert counting_classes(("healthy", "infected"), None) == ("healthy", "infected")
    with pytest.raises(UsageError, match="has no class 'blue'; it has red, white, platelet"):
        counting_classes(NAMES, ["red", "blue"])
    with pytest.raises(UsageError, match="no class to count; give some of red, white, platelet"):
        counting_classes(NAMES, [])
    with pytest.raises(UsageError, match="sequence of names, got 'red'"):
        counting_classes(("red", "white"), "red")
    with pytest.raises(UsageError, match="does not distinguish classes of cells, so red cannot be counted alone"):
        counting_classes((), ["red"])


def test_half_of_a_cell_is_half_of_one_of_its_class() -> None:
    """Cells of 400, 1600 and 100 px, of each a whole one, two fifths and three fifths."""
    whole = np.array([400, 1600, 100])
    areas = np.concatenate([whole, whole * 2 // 5, whole * 3 // 5])
    boxes = np.array([[5, 5, 10, 10]] * 3 + [[0, 5, 10, 10]] * 6)
    class_of = np.tile([0, 1, 2], 3)
    found = counted(boxes, (99, 99), "half", areas_px=areas, model_cell_px=400.0, class_of=class_of)
    assert found.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    alike = counted(boxes, (99, 99), "half", areas_px=areas, model_cell_px=400.0)
    assert alike.tolist() == [True] * 3 + [False, True, False] + [True, True, False]


def test_half_of_a_cell_without_a_whole_one_of_its_class_is_half_of_the_models() -> None:
    boxes = np.array([[5, 5, 10, 10], [0, 5, 10, 10], [0, 50, 10, 10]])
    areas, class_of = np.array([1600, 210, 190]), np.array([1, 0, 0])
    found = counted(boxes, (99, 99), "half", areas_px=areas, model_cell_px=400.0, class_of=class_of)
    assert found.tolist() == [True, True, False]


# --- platelets are smaller than what is taken for a fragment of other cells

CELL_PX = 24.0  # a disc of 452 px: fragments have fewer than 45, specks at the border fewer than 14


def classed_planes(*discs: tuple[str, float, float, float], hw: tuple[int, int] = (60, 90)) -> np.ndarray:
    """Probabilities of foreground, boundary and ``NAMES`` for discs of a class, x, y and radius; no boundary."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    out = np.zeros((5, *hw), np.float32)
    for name, centre_x, centre_y, radius in discs:
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2
        out[0, inside] = 0.95
        out[2:, inside] = 0.1
        out[2 + NAMES.index(name), inside] = 0.8
    return out


def areas(probabilities: np.ndarray, params: object, names: tuple[str, ...] = NAMES) -> list[int]:
    """Areas of the cells found, sorted."""
    channels = ("foreground", "boundary", *NAMES)
    found = segment(*(probabilities, channels, params), cell_diameter_px=CELL_PX, border_cells="visible", classes=names)
    return sorted(np.bincount(found.ravel())[1:].tolist())


@pytest.mark.parametrize("params", [ThresholdParams(), BoundaryParams()])
def test_a_whole_platelet_is_no_speck(params: object) -> None:
    large = ("red", 25, 30, 12)
    (red,) = areas(classed_planes(large), params)
    assert areas(classed_planes(large, ("platelet", 70, 30, 3)), params) == [29, red]
    assert areas(classed_planes(large, ("red", 70, 30, 3)), params) == [red]
    assert areas(classed_planes(large, ("platelet", 70, 30, 1.5)), params) == [red]  # 9 px
    assert areas(classed_planes(large, ("platelet", 70, 30, 3)), params, ()) == [red]


def test_a_platelet_beside_a_cell_is_no_fragment_of_it() -> None:
    """The two touch; a line of boundary parts them, and gives each of its pixels to one of them."""
    for name, n_cells in (("platelet", 2), ("white", 1)):
        probabilities = classed_planes(("red", 30, 30, 12), (name, 45, 30, 3.5))
        probabilities[1, :, 42] = probabilities[0, :, 42]
        assert len(areas(probabilities, BoundaryParams())) == n_cells


@pytest.mark.parametrize("params", [ThresholdParams(), BoundaryParams()])
@pytest.mark.parametrize("x", [30, 44])
def test_a_platelet_on_a_cell_or_next_to_it_is_a_cell_without_a_boundary(params: object, x: float) -> None:
    alone = areas(classed_planes(("red", 30, 30, 12)), params)
    both = classed_planes(("red", 30, 30, 12), ("platelet", x, 30, 3))
    on_it = int(np.count_nonzero(both[0])) - 29
    assert areas(both, params) == [29, on_it]
    assert areas(both, params, ()) == [on_it + 29]  # without classes they are one cell
    assert areas(classed_planes(("red", 30, 30, 12), ("platelet", 30, 30, 2)), params) == alone  # 13 px


def test_a_platelet_without_a_seed_is_found() -> None:
    """Foreground of 0.6: above the threshold, below that of a seed."""
    planes = classed_planes(("red", 25, 30, 12), ("platelet", 70, 30, 4), ("red", 70, 10, 4))
    planes[0, :, 50:] *= 0.6 / 0.95
    assert areas(planes, BoundaryParams(foreground_threshold=0.5, seed_threshold=0.7)) == [49, 441]
