"""Label image -> table of cells: position, size and shape.

Definitions (pixels are unit squares, centres at whole numbers: the top left pixel is at (0, 0))
    ``area_px`` A: number of pixels. ``equivalent_diameter_px``: of the disc of that area, sqrt(4 A / pi).
    ``centroid_*_px``: mean of the pixel centres. ``bbox_*_px``: first column and row, number of columns and rows.
    ``major_axis_px``, ``minor_axis_px``: full axes of the ellipse with the same second central moments as the pixel
    centres, 4 sqrt(eigenvalue). ``eccentricity``: of that ellipse, sqrt(1 - minor^2 / major^2); 0 = circle.
    ``perimeter_px`` P: Crofton's formula with four directions (Legland, Kieu and Devaux, Computation of Minkowski
    measures on 2D and 3D binary images, Image Anal. Stereol. 26 (2007) 83-92): how often lines cross the outline.
    Unlike the length of a pixel staircase it is right on average for smooth outlines; outlines of holes count too.
    ``circularity``: 4 pi A / P^2. 1 for a disc (digital ones: 0.97 to 1.01), lower for rough or long cells.
    ``solidity``: A / pixels in the convex hull of the pixel centres; 1 for every digitally convex cell.
    ``touches_border``: a pixel is in the first or last row or column, so the cell may be cut.
Area, centroid, box, axes, eccentricity and perimeter are those of ``skimage.measure.regionprops`` (its
``perimeter_crofton``); solidity is skimage's with ``convex_hull_image(offset_coordinates=False)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Ints, Runs, bands, row_runs

COLUMNS: tuple[str, ...] = (
    "label",
    "area_px",
    "centroid_x_px",
    "centroid_y_px",
    "bbox_left_px",
    "bbox_top_px",
    "bbox_width_px",
    "bbox_height_px",
    "equivalent_diameter_px",
    "major_axis_px",
    "minor_axis_px",
    "eccentricity",
    "perimeter_px",
    "circularity",
    "solidity",
    "touches_border",
)

UM_COLUMNS: tuple[str, ...] = (
    "area_um2",
    "equivalent_diameter_um",
    "major_axis_um",
    "minor_axis_um",
    "perimeter_um",
)
"""Columns for lengths and areas where the pixel size is known."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CellTable:
    """One row per cell, in label order. ``columns``: name -> array (n,); int64, float64, or bool (touches_border)."""

    columns: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["label"])

    @property
    def boxes(self) -> Ints:
        """Left, top, width, height of each cell in px, int64 (n, 4)."""
        return np.stack([self.columns[f"bbox_{side}_px"] for side in ("left", "top", "width", "height")], axis=1)


def measure(
    labels: npt.NDArray[np.integer[Any]],
    *,
    top_left: tuple[int, int] = (0, 0),
    image_hw: tuple[int, int] | None = None,
    runs: Runs | None = None,
) -> CellTable:
    """Measure every label > 0 of ``labels`` (h, w), any integer type; numbers may have gaps.

    ``top_left``, ``image_hw``: if ``labels`` are a part of an image, its place (y, x) and the size of the image. A cell
    that lies in the part then has the same row as in the table of the whole image. ``runs``: ``row_runs(labels)``, if
    they are known.

    Raises ``UsageError`` for anything that is not a label image.
    """
    runs = _sorted_by_label(row_runs(labels) if runs is None else runs)
    runs = replace(runs, row=runs.row + top_left[0], start=runs.start + top_left[1], stop=runs.stop + top_left[1])
    first_run = np.flatnonzero(np.diff(runs.label, prepend=0))
    label = runs.label[first_run]
    if not len(label):
        return CellTable({name: np.zeros(0, _dtype(name)) for name in COLUMNS})

    length = runs.length
    area = np.add.reduceat(length, first_run)
    left, right = np.minimum.reduceat(runs.start, first_run), np.maximum.reduceat(runs.stop, first_run)
    top, bottom = np.minimum.reduceat(runs.row, first_run), np.maximum.reduceat(runs.row, first_run) + 1
    centroid_x, centroid_y, major, minor = _moments(runs, first_run, area, left, top)
    perimeter = crofton_perimeters(labels, label)
    height, width = labels.shape if image_hw is None else image_hw
    columns: dict[str, npt.NDArray[Any]] = {
        "label": label,
        "area_px": area,
        "centroid_x_px": centroid_x,
        "centroid_y_px": centroid_y,
        "bbox_left_px": left,
        "bbox_top_px": top,
        "bbox_width_px": right - left,
        "bbox_height_px": bottom - top,
        "equivalent_diameter_px": np.sqrt(4 * area / np.pi),
        "major_axis_px": major,
        "minor_axis_px": minor,
        "eccentricity": np.sqrt(1 - np.divide(minor, major, out=np.ones_like(major), where=major > 0) ** 2),
        "perimeter_px": perimeter,
        "circularity": 4 * np.pi * area / perimeter**2,
        "solidity": area / _convex_areas(runs, first_run),
        "touches_border": (left == 0) | (top == 0) | (right == width) | (bottom == height),
    }
    return CellTable(columns)


def solidities(labels: npt.NDArray[np.integer[Any]], numbers: npt.NDArray[np.integer[Any]]) -> Floats:
    """Solidity of only the labels ``numbers`` (ascending, all present in ``labels``), float64 (n,); see the module.

    Raises ``UsageError`` for anything that is not a label image.
    """
    if not len(numbers):
        return np.zeros(0)
    runs = _runs_of(labels, numbers)
    first_run = np.flatnonzero(np.diff(runs.label, prepend=0))
    area = np.add.reduceat(runs.length, first_run)
    return np.asarray(area / _convex_areas(runs, first_run), np.float64)


def centroids(
    labels: npt.NDArray[np.integer[Any]], numbers: Ints, *, top_left: tuple[int, int] = (0, 0)
) -> tuple[Floats, Floats]:
    """Centroid y and x, each (n,), of only the labels ``numbers`` (ascending, all present in ``labels``), as in the
    table. ``top_left``: as for ``measure``."""
    runs = _runs_of(labels, numbers)
    runs = replace(runs, row=runs.row + top_left[0], start=runs.start + top_left[1], stop=runs.stop + top_left[1])
    first_run = np.flatnonzero(np.diff(runs.label, prepend=0))
    area = np.add.reduceat(runs.length, first_run)
    left, top = np.minimum.reduceat(runs.start, first_run), np.minimum.reduceat(runs.row, first_run)
    x, y, _, _ = _moments(runs, first_run, area, left, top)
    return y, x


def in_micrometres(table: CellTable, pixel_size_um: float) -> dict[str, Floats]:
    """``UM_COLUMNS`` of ``table``, each (n,): lengths times ``pixel_size_um`` (side of a pixel), areas its square."""
    lengths = {name: table.columns[name.replace("_um", "_px")] * pixel_size_um for name in UM_COLUMNS[1:]}
    return {"area_um2": table.columns["area_px"] * pixel_size_um**2, **lengths}


def boxes(labels: npt.NDArray[np.integer[Any]], numbers: Ints) -> Ints:
    """Left, top, width, height in px of ``numbers`` (ascending, exactly the labels in ``labels``), int64 (n, 4)."""
    runs = row_runs(labels)
    at = np.searchsorted(numbers, runs.label)
    low = np.full((len(numbers), 2), np.iinfo(np.int64).max)
    high = np.zeros((len(numbers), 2), np.int64)
    np.minimum.at(low, at, np.stack([runs.start, runs.row], axis=1))
    np.maximum.at(high, at, np.stack([runs.stop, runs.row + 1], axis=1))
    return np.concatenate([low, high - low], axis=1)


def _dtype(column: str) -> type:
    if column == "touches_border":
        return np.bool_
    return np.int64 if column in ("label", "area_px") or column.startswith("bbox") else np.float64


def _runs_of(labels: npt.NDArray[np.integer[Any]], numbers: npt.NDArray[np.integer[Any]]) -> Runs:
    """Runs of only the labels ``numbers``, sorted by label."""
    runs = row_runs(labels)
    wanted = np.isin(runs.label, numbers)
    return _sorted_by_label(
        Runs(runs.label[wanted], runs.row[wanted], runs.start[wanted], runs.stop[wanted], runs.image_hw)
    )


def _sorted_by_label(runs: Runs) -> Runs:
    order = np.argsort(runs.label, kind="stable")
    return Runs(runs.label[order], runs.row[order], runs.start[order], runs.stop[order], runs.image_hw)


def _moments(runs: Runs, first_run: Ints, area: Ints, left: Ints, top: Ints) -> tuple[Floats, Floats, Floats, Floats]:
    """Centroid x and y, major and minor axis of each cell, from sums over runs in closed form.

    Coordinates are relative to the corner of each cell's box, so that the sums are small integers and exact.
    """
    cell = np.repeat(np.arange(len(first_run)), np.diff(first_run, append=len(runs)))
    length, start, row = runs.length, runs.start - left[cell], runs.row - top[cell]
    last = start + length - 1
    run_x = (start + last) * length // 2
    run_xx = _sum_of_squares(last) - _sum_of_squares(start - 1)

    def total(values: Ints) -> Floats:
        return np.add.reduceat(values, first_run).astype(np.float64)

    mean_x, mean_y = total(run_x) / area, total(row * length) / area
    var_x = total(run_xx) / area - mean_x**2
    var_y = total(row * row * length) / area - mean_y**2
    covariance = total(row * run_x) / area - mean_x * mean_y
    middle, radius = (var_x + var_y) / 2, np.hypot((var_x - var_y) / 2, covariance)
    major, minor = (4 * np.sqrt(np.maximum(eigenvalue, 0)) for eigenvalue in (middle + radius, middle - radius))
    return left + mean_x, top + mean_y, major, minor


def _sum_of_squares(n: Ints) -> Ints:
    """0 + 1 + 4 + ... + n^2; 0 for n = -1."""
    return n * (n + 1) * (2 * n + 1) // 6


def crofton_perimeters(labels: npt.NDArray[np.integer[Any]], label: Ints) -> Floats:
    """Perimeter in px of each number in ``label`` (ascending, all present in ``labels``).

    Every 2 x 2 neighbourhood with more than one label has, for each label in it, one of sixteen patterns with fixed
    weights: which of its four pixels have that label. Only outlines are processed, all cells at once.
    """
    count = np.zeros((len(label), len(_CROFTON)), np.int64)
    height, width = labels.shape
    for rows in bands((height + 1, width)):  # rows of neighbourhoods: one more than the image has
        framed = np.zeros((rows.stop - rows.start + 1, width + 2), labels.dtype)
        inside = slice(max(rows.start - 1, 0), min(rows.stop, height))
        top = inside.start - (rows.start - 1)
        framed[top : top + inside.stop - inside.start, 1:-1] = labels[inside]
        for own, pattern in _patterns(framed):
            at = np.searchsorted(label, own) * len(_CROFTON) + pattern
            first = int(at.min(initial=count.size))  # a band holds few labels, with nearby numbers
            found = np.bincount(at - first)
            count.reshape(-1)[first : first + len(found)] += found
    return count @ _CROFTON


def _patterns(framed: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[npt.NDArray[np.integer[Any]], Ints]]:
    """Labels and patterns of the mixed neighbourhoods of ``framed``, in four parts of (n,) each."""
    corner = framed[:-1, :-1]
    mixed = corner != framed[:-1, 1:]
    mixed |= corner != framed[1:, :-1]
    mixed |= corner != framed[1:, 1:]
    at = np.flatnonzero(mixed)
    at += at // (framed.shape[1] - 1)  # from the grid of neighbourhoods to the framed image, one column wider
    flat = framed.reshape(-1)
    # Order of the pattern's bits: top left 1, bottom left 2, top right 4, bottom right 8 (symmetric in the weights).
    quad = np.stack([flat[at + step] for step in (0, framed.shape[1], 1, framed.shape[1] + 1)])
    for pixel in range(4):
        # Each label of a neighbourhood is handled once, at the first of its pixels.
        is_first = quad[pixel] > 0
        for earlier in range(pixel):
            is_first &= quad[earlier] != quad[pixel]
        own = quad[pixel, is_first]
        bits = [(quad[bit, is_first] == own).astype(np.int64) << bit for bit in range(4)]
        yield own, np.sum(bits, axis=0)


def _crofton_weights() -> Floats:
    """Length in px that each 2 x 2 pattern adds to a perimeter.

    Crofton: P = 1/2 * integral over directions 0..pi of (crossings with parallel lines * their spacing), so with four
    directions pi/8 * sum of spacing * crossings. Rows and columns of pixel centres lie 1 px apart, diagonals 1/sqrt(2).
    Two adjacent pixels belong to two neighbourhoods, so the pair counts half in each.
    """
    weights = np.zeros(16)
    for pattern in range(16):
        top_left, bottom_left, top_right, bottom_right = ((pattern >> bit) & 1 for bit in range(4))
        straight = (top_left != top_right) + (bottom_left != bottom_right)
        straight += (top_left != bottom_left) + (top_right != bottom_right)
        diagonal = (top_left != bottom_right) + (top_right != bottom_left)
        weights[pattern] = math.pi / 8 * (straight / 2 + diagonal / math.sqrt(2))
    return weights


_CROFTON = _crofton_weights()


def _convex_areas(runs: Runs, first_run: Ints) -> Ints:
    """Pixels whose centres lie in the convex hull of each cell's pixel centres.

    The hull's corners are integers, so Pick's theorem counts the points in and on the hull without drawing it:
    area + points on the outline / 2 + 1.
    """
    import cv2

    ends = np.stack([np.concatenate([runs.start, runs.stop - 1]), np.tile(runs.row, 2)], axis=1).astype(np.int32)
    stops = np.append(first_run[1:], len(runs))
    n_points = np.empty(len(first_run), np.int64)
    for cell, (begin, stop) in enumerate(zip(first_run, stops, strict=True)):
        points = np.concatenate([ends[begin:stop], ends[len(runs) + begin : len(runs) + stop]])
        hull = cv2.convexHull(points).reshape(-1, 2).astype(np.int64)
        following = np.roll(hull, -1, axis=0)
        twice_area = abs(int((hull[:, 0] * following[:, 1] - following[:, 0] * hull[:, 1]).sum()))
        step = np.abs(following - hull)
        n_points[cell] = (twice_area + int(np.gcd(step[:, 0], step[:, 1]).sum())) // 2 + 1
    return n_points
