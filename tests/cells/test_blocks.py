"""Labels made block by block are those of the whole image, pixel for pixel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellseg_deploy.cells import blocks, enlarge
from cellseg_deploy.cells.blocks import BlockSettings
from cellseg_deploy.cells.classes import classify
from cellseg_deploy.cells.instances import BorderCells, segment
from cellseg_deploy.cells.label_runs import Runs, paint
from cellseg_deploy.cells.measure import measure
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.models.spec import BoundaryParams, DistanceParams, InstanceParams, ThresholdParams

Planes = npt.NDArray[np.float32]
CLASSES = ("red", "platelet")
CHANNELS = ("foreground", "boundary", "distance", *CLASSES)
METHODS: list[InstanceParams] = [BoundaryParams(), DistanceParams(), ThresholdParams()]


def random_planes(seed: int, hw: tuple[int, int], *, density: float) -> Planes:
    """Probabilities (5, h, w) like a network's: blobs of all sizes that touch, holes, specks, lines, plateaus."""
    import cv2

    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(5, *hw)).astype(np.float32)
    sigmas = (2.5, 2, 3, 4, 4)
    planes = np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane, sigma in zip(noise, sigmas, strict=True)])
    planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-6
    planes[0] += density
    probabilities = 1 / (1 + np.exp(np.clip(-3 * planes, -30, 30)))
    probabilities[1] *= 0.5
    speckle = rng.random(hw) < 0.01
    probabilities[0][speckle] = 1 - probabilities[0][speckle]
    return np.clip(np.round(probabilities, 2), 0, 1).astype(np.float32)  # rounded: many equal values


def read_from(planes: Planes) -> blocks.ReadPlanes:
    return lambda rows, columns: planes[:, rows, columns].copy()


def in_memory(labels: npt.NDArray[np.int32]) -> Callable[[], npt.NDArray[np.int32]]:
    return labels.copy


def streamed(planes: Planes, asked: BlockSettings) -> tuple[npt.NDArray[np.int32], list[blocks.BlockCells]]:
    """Labels painted from blocks, numbered by first pixel; and the cells."""
    read = read_from(planes)
    found = list(blocks.cells(read, asked, blocks.first_pass(read, asked, in_memory)))
    first = np.concatenate([np.zeros(0, np.int64), *(part.first for part in found)])
    assert len(np.unique(first)) == len(first), "a cell was returned twice"
    rank = np.argsort(np.argsort(first)) + 1
    numbers = np.split(rank, np.cumsum([len(part.first) for part in found])[:-1]) if found else []
    runs = [
        (part.runs.row, part.runs.start, part.runs.stop, number[part.runs.label - 1])
        for part, number in zip(found, numbers, strict=True)
    ]
    if not runs:
        return np.zeros(asked.out_hw, np.int32), found
    row, start, stop, label = (np.concatenate(values) for values in zip(*runs, strict=True))
    order = np.lexsort((start, row))
    return paint(Runs(label[order], row[order], start[order], stop[order], asked.out_hw), label[order]), found


def whole(planes: Planes, asked: BlockSettings) -> npt.NDArray[np.int32]:
    return segment(
        planes,
        asked.channels,
        asked.params,
        cell_diameter_px=asked.cell_diameter_px,
        out_hw=asked.out_hw,
        border_cells=asked.border_cells,
        classes=asked.classes,
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    hw=st.tuples(st.integers(1, 150), st.integers(1, 110)),
    density=st.floats(-1.5, 1.0),
    block_rows=st.integers(1, 80),
    overlap_rows=st.integers(0, 60),
    params=st.sampled_from(METHODS),
    zoom=st.sampled_from([1.0, 3.083, 1.5, 0.6]),
    border_cells=st.sampled_from(["visible", "model"]),
    classes=st.sampled_from([(), CLASSES]),
    diameter=st.sampled_from([8.0, 16.0]),
)
def test_blocks_give_the_labels_of_the_whole_image(
    seed: int,
    hw: tuple[int, int],
    density: float,
    block_rows: int,
    overlap_rows: int,
    params: InstanceParams,
    zoom: float,
    border_cells: BorderCells,
    classes: tuple[str, ...],
    diameter: float,
) -> None:
    planes = random_planes(seed, hw, density=density)
    out_hw = (max(1, round(hw[0] * zoom)), max(1, round(hw[1] * zoom)))
    asked = BlockSettings(
        CHANNELS, params, diameter, hw, out_hw, border_cells, classes, block_rows=block_rows, overlap_rows=overlap_rows
    )
    assert np.array_equal(streamed(planes, asked)[0], whole(planes, asked))


def test_a_lone_row_of_a_band_is_enlarged_as_among_others() -> None:
    """Of 233 rows of 2254 px, the last is a band of its own in the whole image, and not in a block."""
    planes = random_planes(4, (43, 16), density=0.3)
    asked = BlockSettings(CHANNELS, ThresholdParams(), 16.0, (43, 16), (233, 2254), block_rows=21, overlap_rows=19)
    assert len(enlarge.bands(asked.out_hw)) == 2
    assert np.array_equal(streamed(planes, asked)[0], whole(planes, asked))


HW = (260, 220)


def scene() -> Planes:
    """A large ring with cells inside, cells on seams, an arch, a tall line, a chain of touching cells, a hole."""
    import cv2

    plane, boundary = np.zeros(HW, np.float32), np.zeros(HW, np.float32)
    cv2.circle(plane, (60, 70), 55, 0.9, 6)
    inner, on_seams = [(60, 70, 8), (40, 60, 4), (75, 90, 7)], [(150, 64, 9), (180, 66, 8), (150, 128, 9), (200, 32, 8)]
    for x, y, radius in [*inner, *on_seams, (134, 15, 7)]:
        cv2.circle(plane, (x, y), radius, 0.95, -1)
    cv2.line(plane, (213, 0), (213, HW[0] - 1), 0.9, 3)
    cv2.ellipse(plane, (60, 205), (40, 50), 0, 180, 360, 0.9, 5)  # one object with two feet
    for x in range(8, 190, 12):
        cv2.circle(plane, (x, 232 + x % 5), 7, 0.8, -1)
        cv2.line(boundary, (x + 6, 222), (x + 6, 244), 1.0, 2)
    cv2.circle(plane, (160, 175), 9, 0.9, 3)
    plane[175, 160] = 0.9  # a speck in a hole that is filled
    return np.stack([plane, boundary, cv2.GaussianBlur(plane, (0, 0), 3), plane * 0.6, plane * 0.4]).astype(np.float32)


@pytest.mark.parametrize(("block_rows", "overlap_rows"), [(1, 0), (7, 3), (64, 0), (64, 30), (33, 200), (500, 0)])
@pytest.mark.parametrize(("zoom", "fused"), [(1, True), (3.083, True), (3.083, False)])
def test_objects_larger_than_a_block_are_not_cut(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, overlap_rows: int, zoom: float, fused: bool
) -> None:
    if not fused:  # as on a processor on which OpenCV computes in other steps
        monkeypatch.setattr(enlarge, "_has_fused_sums", lambda: False)
    planes = scene()
    out_hw = (round(HW[0] * zoom), round(HW[1] * zoom))
    asked = BlockSettings(
        *(CHANNELS, BoundaryParams(), 16.0, HW, out_hw),
        classes=CLASSES,
        block_rows=block_rows,
        overlap_rows=overlap_rows,
    )
    labels, found = streamed(planes, asked)
    expected = whole(planes, asked)
    assert expected.max() > 20
    assert np.array_equal(labels, expected)
    if block_rows < 33:
        assert any(part.window.planes_khw.shape[2] < HW[1] for part in found), "no object needed a window of its own"


def test_cells_of_a_part_have_the_rows_of_the_whole_image() -> None:
    planes = scene()
    asked = BlockSettings(CHANNELS, ThresholdParams(), 16.0, HW, (802, 678), block_rows=64, overlap_rows=20)
    labels = whole(planes, asked)
    table = measure(labels)
    classes = classify(labels, planes, CLASSES, CLASSES)
    assert classes is not None
    table.columns.update(classes.columns)
    rows = slice(100, 802)
    part_of = np.where(labels[rows] > 0, labels[rows], 0)
    inside = table.columns["bbox_top_px"] > 105
    part_of = np.where(np.append(False, inside)[part_of], part_of, 0)
    part = measure(part_of, top_left=(100, 0), image_hw=(802, 678))
    for name in part.columns:
        tolerance = 1e-13 if name in ("perimeter_px", "circularity") else 0  # BLAS sums in another order
        np.testing.assert_allclose(part.columns[name], table.columns[name][inside], rtol=tolerance, err_msg=name)


def test_an_object_too_large_for_memory_is_refused_not_cut() -> None:
    asked = BlockSettings(*(CHANNELS, ThresholdParams(), 16.0, HW, HW), block_rows=32, overlap_rows=8, most_px=6000)
    read = read_from(scene())
    with pytest.raises(DataError, match=r"never cut.*times the memory"):
        blocks.first_pass(read, asked, in_memory)


def test_blocks_of_no_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 row"):
        BlockSettings(CHANNELS, ThresholdParams(), 16.0, (9, 9), (9, 9), block_rows=0)


@pytest.mark.parametrize("block_rows", range(10, 30))
def test_a_neighbour_just_outside_the_window_is_seen(block_rows: int) -> None:
    """At the image's size the lower cell takes pixels of the upper one, two rows away: its number is larger."""
    planes = np.zeros((len(CHANNELS), 80, 60), np.float32)
    planes[0, 8:27, 20:40], planes[0, 27, 20:40], planes[0, 28:60, 20:40] = 0.95, 0.49, 0.95
    asked = BlockSettings(
        CHANNELS, ThresholdParams(), 16.0, (80, 60), (247, 185), block_rows=block_rows, overlap_rows=0
    )
    expected = whole(planes, asked)
    assert expected.max() == 2
    assert np.array_equal(streamed(planes, asked)[0], expected)
