"""Probabilities to label images: each rule of the methods on a drawing of its own."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skimage.measure import label as skimage_label
from skimage.segmentation import watershed

from cellseg_deploy.cells import label_runs
from cellseg_deploy.cells.instances import drop_small, enlarge, fill_holes, flood, join_fragments, segment
from cellseg_deploy.cells.label_runs import Labels, paint
from cellseg_deploy.cells.metrics import score_image
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import BoundaryParams, DistanceParams, InstanceParams, ThresholdParams

Plane = npt.NDArray[np.float32]
DIAMETER = 20.0
DISC_PX = math.pi / 4 * DIAMETER**2  # 314 px
BOTH = ("foreground", "boundary")


def inside_disc(hw: tuple[int, int], y: float, x: float, radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: hw[0], : hw[1]]
    result: npt.NDArray[np.bool_] = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return result


def planes(*discs: tuple[float, float, float], hw: tuple[int, int] = (60, 80)) -> npt.NDArray[np.float32]:
    """Foreground 0.95 inside discs (y, x, radius), 0.05 outside; boundary 0.9 where two of them meet."""
    owner = np.zeros(hw, np.int32)
    for number, (y, x, radius) in enumerate(discs, start=1):
        owner[inside_disc(hw, y, x, radius) & (owner == 0)] = number
    spread = cv2.dilate(owner.astype(np.float32), np.ones((3, 3), np.uint8))
    line = (owner > 0) & (spread != owner)
    return np.stack([np.where(owner > 0, 0.95, 0.05), np.where(line, 0.9, 0.0)]).astype(np.float32)


def boundary_labels(probabilities: npt.NDArray[np.float32], **settings: float) -> npt.NDArray[np.int32]:
    return segment(probabilities, BOTH, BoundaryParams(**settings), cell_diameter_px=DIAMETER)


def threshold_labels(foreground: Plane, **settings: float) -> npt.NDArray[np.int32]:
    return segment(foreground[None], ("foreground",), ThresholdParams(**settings), cell_diameter_px=DIAMETER)


def random_scene(seed: int, hw: tuple[int, int] = (150, 190), n_cells: int = 45) -> npt.NDArray[np.float32]:
    """Noisy, blurred planes with touching and overlapping cells, cut cells and specks."""
    rng = np.random.default_rng(seed)
    discs = [(rng.uniform(0, hw[0]), rng.uniform(0, hw[1]), rng.uniform(2, 12)) for _ in range(n_cells)]
    smooth = np.stack([cv2.GaussianBlur(plane, (0, 0), 0.8) for plane in planes(*discs, hw=hw)])
    return np.clip(smooth + rng.normal(0, 0.03, smooth.shape), 0, 1).astype(np.float32)


def test_touching_discs_are_one_component_but_two_cells() -> None:
    touching = planes((30, 25, 10), (30, 44, 10))
    assert threshold_labels(touching[0]).max() == 1
    labels = boundary_labels(touching)
    assert labels.max() == 2
    # Grown back to their rims: together they fill the foreground.
    np.testing.assert_array_equal(labels > 0, touching[0] > 0.5)
    assert labels[30, 25] != labels[30, 44]


def test_without_its_weight_the_boundary_parts_nothing() -> None:
    assert boundary_labels(planes((30, 25, 10), (30, 44, 10)), boundary_weight=0.0).max() == 1


def test_numbers_follow_the_first_pixel_in_raster_order() -> None:
    """The lower left disc is larger and starts higher than the right one."""
    probabilities = planes((30, 15, 14), (30, 60, 10), (8, 40, 7))
    for labels in (boundary_labels(probabilities), threshold_labels(probabilities[0])):
        assert (labels[8, 40], labels[30, 15], labels[30, 60]) == (1, 2, 3)
        assert labels.dtype == np.int32


def test_a_cell_without_seed_stays_if_its_foreground_convinces() -> None:
    """A sliver that is boundary all over: the foreground 0.95 passes the seed threshold by itself."""
    probabilities = planes((30, 30, 10))
    probabilities[1] = 0.9
    labels = boundary_labels(probabilities)
    assert labels.max() == 1
    np.testing.assert_array_equal(labels > 0, probabilities[0] > 0.5)


def test_a_doubtful_component_without_seed_is_no_cell() -> None:
    """Foreground 0.6 passes its own threshold everywhere, the seed threshold only on a speck below the seed area."""
    probabilities = planes((30, 30, 10))
    probabilities[0][probabilities[0] > 0.5] = 0.6
    assert boundary_labels(probabilities).max() == 0
    probabilities[0, 28:31, 28:31] = 0.95  # 9 px; a seed needs 3 % of 314 = 9.4
    assert boundary_labels(probabilities).max() == 0
    probabilities[0, 31, 28] = 0.95
    assert boundary_labels(probabilities).max() == 1


def test_specks_of_seed_do_not_split_a_cell() -> None:
    """A line of boundary cuts a crumb of 9 px off the seed; a crumb of 10 px would be a seed of its own."""
    probabilities = planes((30, 30, 10))
    probabilities[1, 24:29, 26:31] = 0.9
    probabilities[1, 25:28, 27:30] = 0
    assert boundary_labels(probabilities).max() == 1
    labels = boundary_labels(probabilities, min_seed_area_rel=8 / DISC_PX, min_area_rel=0.0)
    assert labels.max() == 2


@pytest.mark.parametrize("method", [boundary_labels, lambda p, **s: threshold_labels(p[0], **s)])
def test_small_components_are_dropped_at_the_stated_area(method: object) -> None:
    probabilities = planes((20, 20, 10))
    probabilities[0, 40:45, 50:56] = 0.95  # 30 px
    assert callable(method)
    assert method(probabilities, min_area_rel=30.5 / DISC_PX).max() == 1
    assert method(probabilities, min_area_rel=30 / DISC_PX).max() == 2


def test_pallor_is_filled_and_large_holes_are_not() -> None:
    ring = planes((30, 30, 14))
    ring[0][inside_disc((60, 80), 30, 30, 3)] = 0.1  # 29 px
    for labels in (boundary_labels(ring), threshold_labels(ring[0])):
        assert labels[30, 30] == 1
    for labels in (boundary_labels(ring, max_hole_rel=28 / DISC_PX), threshold_labels(ring[0], max_hole_rel=0.0)):
        assert labels[30, 30] == 0
        assert labels.max() == 1


def test_the_gap_between_cells_is_no_hole() -> None:
    labels = np.array(
        [
            [1, 1, 1, 1, 2, 2, 2],
            [1, 0, 1, 1, 2, 0, 0],
            [1, 1, 1, 0, 2, 2, 2],
            [1, 1, 3, 3, 3, 3, 2],
            [1, 0, 1, 3, 0, 0, 3],
            [1, 1, 0, 3, 3, 3, 3],
        ],
        np.int32,
    )
    expected = labels.copy()
    expected[1, 1] = 1
    expected[4, 4:6] = 3
    # (2, 3) lies between three cells; (1, 5) and (5, 2) reach the border, and (4, 1) is one with (5, 2) by its corner.
    np.testing.assert_array_equal(fill_holes(labels, 2), expected)
    expected[4, 4:6] = 0
    np.testing.assert_array_equal(fill_holes(labels, 1), expected)
    np.testing.assert_array_equal(fill_holes(labels, 0.5), labels)


def test_holes_are_8_connected_and_cells_4_connected() -> None:
    """Two discs that touch at a corner only are two cells."""
    foreground = np.full((20, 20), 0.1, np.float32)
    foreground[2:8, 2:8] = foreground[8:14, 8:14] = 0.9
    assert threshold_labels(foreground).max() == 2


@pytest.mark.parametrize("seed", range(3))
def test_flood_is_the_watershed_of_all_seeds(seed: int) -> None:
    """Leaving out the inside of seeds changes nothing."""
    foreground, boundary = random_scene(seed)
    score = foreground - 0.5 * boundary
    components = skimage_label(foreground >= 0.5, connectivity=1)
    inside = components == np.bincount(components.ravel())[1:].argmax() + 1
    seeds = skimage_label(inside & (score >= 0.7), connectivity=1).astype(np.int32)
    assert seeds.max() > 1
    np.testing.assert_array_equal(flood(score, seeds, inside), watershed(-score, seeds, mask=inside))


@pytest.mark.parametrize("params", [BoundaryParams(), ThresholdParams()])
@pytest.mark.parametrize("out_hw", [None, (300, 380), (233, 401), (75, 95), (151, 190)])
@pytest.mark.parametrize("seed", range(3))
def test_promises_on_random_scenes(params: InstanceParams, out_hw: tuple[int, int] | None, seed: int) -> None:
    """Size, type, numbering and one piece a cell; twice the same input, twice the same labels."""
    probabilities = random_scene(seed)
    channels = BOTH if isinstance(params, BoundaryParams) else ("foreground", "boundary")
    labels = segment(probabilities, channels, params, cell_diameter_px=DIAMETER, out_hw=out_hw)
    assert labels.shape == (out_hw or probabilities.shape[1:])
    assert labels.dtype == np.int32
    n_cells = labels.max()
    assert n_cells > 5
    numbers, first = np.unique(labels, return_index=True)
    assert numbers.tolist() == list(range(n_cells + 1))
    assert (np.diff(first[1:]) > 0).all()
    assert skimage_label(labels, background=0, connectivity=1).max() == n_cells
    again = segment(probabilities.copy(), channels, params, cell_diameter_px=DIAMETER, out_hw=out_hw)
    np.testing.assert_array_equal(labels, again)


@pytest.mark.parametrize("factor", [2, 3, 2.37])
def test_enlarged_cells_are_the_enlarged_truth(factor: float) -> None:
    """Discs found at model scale and enlarged match discs drawn at the final scale, with smooth rims."""
    discs = [(30.0, 25.0, 10.0), (30.0, 45.0, 10.0), (12.0, 65.0, 7.0)]
    probabilities = planes(*discs)
    probabilities[0] = cv2.GaussianBlur(probabilities[0], (0, 0), 1)
    out_hw = (round(60 * factor), round(80 * factor))
    labels = segment(probabilities, BOTH, BoundaryParams(), cell_diameter_px=DIAMETER, out_hw=out_hw)
    truth = np.zeros(out_hw, np.int32)
    for number, (y, x, radius) in enumerate(discs, start=1):
        # Pixel centres lie at whole numbers, so the middle of pixel y is at factor * (y + 0.5) - 0.5.
        centre_y, centre_x = factor * (y + 0.5) - 0.5, factor * (x + 0.5) - 0.5
        truth[inside_disc(out_hw, centre_y, centre_x, radius * factor)] = number
    result = score_image(truth, labels, min_area_px=0, thresholds=(0.5, 0.9))
    assert result.n_predicted == 3
    assert result.matches_at(0.9) == 3


@pytest.mark.parametrize("out_hw", [(120, 160), (180, 240), (143, 190), (61, 83)])
def test_enlarged_rims_are_those_of_the_enlarged_foreground(out_hw: tuple[int, int]) -> None:
    """No rim is lost beyond the pixels that had a label, and none is added."""
    foreground = cv2.GaussianBlur(planes((30, 25, 10), (20, 60, 8))[0], (0, 0), 1.5)
    labels = segment(foreground[None], ("foreground",), ThresholdParams(), cell_diameter_px=DIAMETER, out_hw=out_hw)
    smooth = cv2.resize(foreground, (out_hw[1], out_hw[0]), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(labels > 0, smooth >= 0.5)


def test_enlarging_favours_no_side() -> None:
    """Mirrored input, mirrored output: a shift by part of a pixel would show."""
    probabilities = planes((30, 25, 10), (30, 44, 10))
    labels = boundary_labels(probabilities)
    there = enlarged(labels, probabilities[0], (151, 191))
    back = enlarged(labels[:, ::-1], np.ascontiguousarray(probabilities[0, :, ::-1]), (151, 191))[:, ::-1]
    np.testing.assert_array_equal(there, back)


def test_enlarging_treats_rows_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are enlarged by us, band by band, columns by OpenCV."""
    probabilities = planes((30, 25, 10), (30, 44, 10), (48, 70, 9))
    labels = boundary_labels(probabilities)
    there = enlarged(labels, probabilities[0], (151, 191))
    monkeypatch.setattr(label_runs, "BAND_PIXELS", 7 * 191)
    turned = enlarged(np.ascontiguousarray(labels.T), np.ascontiguousarray(probabilities[0].T), (191, 151))
    np.testing.assert_array_equal(there, turned.T)
    np.testing.assert_array_equal(there, enlarged(labels, probabilities[0], (151, 191)))


def enlarged(labels: Labels, foreground: Plane, out_hw: tuple[int, int]) -> Labels:
    rows = enlarge(labels, foreground, 0.5, out_hw)
    return paint(rows, rows.label)


def test_enlarging_keeps_counts_lines_and_filled_holes() -> None:
    probabilities = planes((30, 25, 10), (30, 44, 10))
    probabilities[0][inside_disc((60, 80), 30, 25, 2)] = 0.1
    small = boundary_labels(probabilities)
    large = segment(probabilities, BOTH, BoundaryParams(), cell_diameter_px=DIAMETER, out_hw=(120, 160))
    assert small.max() == large.max() == 2
    assert skimage_label(large == 0, connectivity=2).max() == 1  # no hole came back
    middle = large[1::2, 1::2][small > 0]
    assert (middle == small[small > 0]).mean() > 0.98


def test_a_cell_cut_by_enlarging_keeps_its_largest_piece() -> None:
    """A bridge one pixel wide and just above the threshold falls below it between its pixels."""
    labels = np.zeros((12, 30), np.int32)
    labels[2:10, 2:10] = labels[2:10, 16:28] = labels[6, 10:16] = 1
    foreground = np.where(labels > 0, 0.95, 0.0).astype(np.float32)
    foreground[6, 10:16] = 0.51
    large = enlarged(labels, foreground, (24, 60))
    assert skimage_label(large, connectivity=1).max() == 1
    assert (large[10, 40], large[10, 10]) == (1, 0)


@pytest.mark.parametrize("hw", [(1, 1), (1, 7), (13, 1), (20, 20)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_uniform_and_tiny_images(hw: tuple[int, int], value: float) -> None:
    probabilities = np.stack([np.full(hw, value), np.zeros(hw)]).astype(np.float32)
    for params in (BoundaryParams(), ThresholdParams()):
        for out_hw in (None, (2 * hw[0] + 1, 3 * hw[1])):
            labels = segment(probabilities, BOTH, params, cell_diameter_px=1.0, out_hw=out_hw)
            assert labels.shape == (out_hw or hw)
            assert (labels == value).all()


def test_more_than_65535_components() -> None:
    """Sixteen-bit labels would overflow."""
    foreground = np.zeros((600, 600), np.float32)
    foreground[::2, ::2] = 1
    assert threshold_labels(foreground, min_area_rel=0.0, min_border_area_rel=0.0, max_hole_rel=0.0).max() == 90_000


def test_drop_small_keeps_numbers() -> None:
    labels = np.array([[0, 3, 3, 0, 7]], np.int32)
    assert drop_small(labels, 2).tolist() == [[0, 3, 3, 0, 0]]


@pytest.mark.parametrize(
    ("shape", "channels", "params", "diameter", "out_hw", "message"),
    [
        ((10, 10), BOTH, BoundaryParams(), 20, None, "one plane for each"),
        ((2, 10, 10), ("foreground",), ThresholdParams(), 20, None, "one plane for each"),
        ((2, 0, 10), BOTH, BoundaryParams(), 20, None, "one plane for each"),
        ((1, 10, 10), ("foreground",), BoundaryParams(), 20, None, "needs the channel 'boundary'"),
        ((2, 10, 10), BOTH, DistanceParams(), 20, None, "needs the channel 'distance'.*model of the distance variant"),
        ((2, 10, 10), BOTH, BoundaryParams(), math.nan, None, "cell_diameter_px"),
        ((2, 10, 10), BOTH, BoundaryParams(), 20, (0, 10), "out_hw"),
        ((2, 10, 10), BOTH, BoundaryParams(seed_threshold=1.0), 20, None, "seed_threshold must lie between 0 and 1"),
        ((2, 10, 10), BOTH, ThresholdParams(foreground_threshold=math.nan), 20, None, "foreground_threshold"),
        ((2, 10, 10), BOTH, BoundaryParams(boundary_weight=-1), 20, None, "boundary_weight must be 0 or more"),
        ((2, 10, 10), BOTH, ThresholdParams(min_area_rel=math.inf), 20, None, "min_area_rel"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    *,
    shape: tuple[int, ...],
    channels: tuple[str, ...],
    params: InstanceParams,
    diameter: float,
    out_hw: tuple[int, int] | None,
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        segment(np.zeros(shape, np.float32), channels, params, cell_diameter_px=diameter, out_hw=out_hw)


def test_slivers_at_the_image_border_need_more_area_than_cells_inside():
    foreground = np.zeros((1, 60, 60), np.float32)
    foreground[0, 20:32, 20:32] = 1  # 144 px inside
    foreground[0, 45:57, 0:12] = 1  # 144 px at the left border
    disc = np.pi / 4 * 20**2  # 314 px

    def count(border: float) -> int:
        params = ThresholdParams(min_area_rel=0.1, min_border_area_rel=border)
        return int(segment(foreground, ("foreground",), params, cell_diameter_px=20).max())

    assert count(143 / disc) == 2
    assert count(145 / disc) == 1


def test_limits_for_small_cells_follow_the_image_where_its_cells_are_smaller():
    foreground = np.zeros((1, 200, 200), np.float32)
    for y in range(20, 180, 20):
        for x in range(20, 180, 20):
            foreground[0, y : y + 10, x : x + 10] = 1  # 100 px, a third of the model's 314
    foreground[0, 182:187, 20:25] = 1  # a speck of 25 px
    params = ThresholdParams(min_area_rel=0.4)
    assert segment(foreground, ("foreground",), params, cell_diameter_px=20).max() == 64
    assert segment(foreground[:, :40], ("foreground",), params, cell_diameter_px=20).max() == 8
    few = foreground.copy()
    few[:, :, 100:] = 0
    few[:, 40:] = 0  # four cells tell nothing of the picture's scale
    assert segment(few, ("foreground",), params, cell_diameter_px=20).max() == 0


def test_a_fragment_goes_to_the_neighbour_of_the_longest_border() -> None:
    """The lens 3 has three neighbours in either cell; 4 is alone, 5 lies at the image border."""
    labels = np.array(
        [
            [0, 0, 0, 0, 0, 0, 0, 5],
            [0, 1, 1, 1, 2, 2, 2, 2],
            [0, 1, 1, 3, 3, 2, 2, 2],
            [0, 1, 1, 1, 2, 2, 2, 2],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 4, 0, 0, 0, 0, 0, 0],
        ],
        np.int32,
    )
    expected = labels.copy()
    expected[2, 3:5] = 1  # three and three: the smaller number
    np.testing.assert_array_equal(join_fragments(labels, 3), expected)
    longer = labels.copy()
    longer[1, 3] = 2
    expected = longer.copy()
    expected[2, 3:5] = 2
    np.testing.assert_array_equal(join_fragments(longer, 3), expected)
    np.testing.assert_array_equal(join_fragments(labels, 1), labels)


def test_fragments_follow_one_another_and_specks_that_only_touch_specks_stay_specks() -> None:
    labels = np.zeros((5, 12), np.int32)
    labels[1:4, 1:4] = 7
    labels[2, 4:8] = [3, 3, 2, 2]  # 2 reaches the cell through 3
    labels[2, 9:11] = [5, 6]
    expected = labels.copy()
    expected[2, 4:8] = 7
    np.testing.assert_array_equal(join_fragments(labels, 3), expected)


def test_the_lens_of_two_overlapping_cells_is_no_hole() -> None:
    """Boundaries drawn around the overlap make it a seed; dropped, it would leave a hole between both cells."""
    probabilities = planes((30, 28, 12), (30, 44, 12))
    inner = inside_disc((60, 80), 30, 28, 12) & inside_disc((60, 80), 30, 44, 12)
    rim = cv2.dilate(inner.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    probabilities[1] = np.where(rim & ~inner, 0.9, 0)
    assert boundary_labels(probabilities, min_area_rel=0.0).max() == 3
    labels = boundary_labels(probabilities, min_area_rel=0.4)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, probabilities[0] > 0.5)


def distance_planes(*discs: tuple[float, float, float], hw: tuple[int, int] = (60, 80)) -> npt.NDArray[np.float32]:
    """Foreground as ``planes`` and the distance to each disc's rim over its radius."""
    rows, columns = np.ogrid[: hw[0], : hw[1]]
    depth = [1 - np.hypot(rows - y, columns - x) / radius for y, x, radius in discs]
    return np.stack([planes(*discs, hw=hw)[0], np.clip(np.max(depth, axis=0), 0, 1)]).astype(np.float32)


def distance_labels(probabilities: npt.NDArray[np.float32], **settings: float) -> npt.NDArray[np.int32]:
    return segment(probabilities, ("foreground", "distance"), DistanceParams(**settings), cell_diameter_px=DIAMETER)


def test_middles_part_touching_discs_of_any_size() -> None:
    discs = ((30, 25, 10), (30, 44, 10), (30, 59, 6))
    probabilities = distance_planes(*discs)
    assert threshold_labels(probabilities[0]).max() == 1
    labels = distance_labels(probabilities)
    assert labels.max() == 3
    np.testing.assert_array_equal(labels > 0, probabilities[0] > 0.5)
    owner = np.array([labels[round(y), round(x)] for y, x, _ in discs])
    nearest = np.argmax([1 - np.hypot(*np.ogrid[-y : 60 - y, -x : 80 - x]) / r for y, x, r in discs], axis=0)
    inside = labels > 0
    assert (labels[inside] == owner[nearest[inside]]).mean() > 0.98  # they meet where both are equally deep


def test_overlap_is_parted_only_below_its_own_depth() -> None:
    """Between discs 14 px apart with radius 10 the ridge lies at 0.3 of the way."""
    probabilities = distance_planes((30, 25, 10), (30, 39, 10))
    assert distance_labels(probabilities, seed_threshold=0.35).max() == 2
    assert distance_labels(probabilities, seed_threshold=0.25).max() == 1


def test_without_a_middle_the_foreground_decides() -> None:
    probabilities = planes((30, 30, 10))
    probabilities[1] = 0.2
    labels = distance_labels(probabilities)
    np.testing.assert_array_equal(labels > 0, probabilities[0] > 0.5)
    assert labels.max() == 1


def test_specks_of_middle_are_no_seeds() -> None:
    probabilities = distance_planes((30, 30, 10))
    probabilities[1, 30, 21:23] = 0.9  # 2 px, less than 1 % of 314
    assert distance_labels(probabilities).max() == 1
    assert distance_labels(probabilities, min_seed_area_rel=0.0, min_area_rel=0.0).max() == 2
