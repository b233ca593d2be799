"""Probabilities -> label image: from "how likely is this pixel cell" to "which cell is this".

``threshold``: foreground >= threshold, holes filled, 4-connected components, small ones dropped.

``boundary``: touching cells are one component of the foreground, but where two cells meet the network predicts a
boundary. With *score* = foreground - boundary_weight * boundary:

0. With classes: 4-connected pieces of the foreground in which a small class (platelet) is at least 0.5 probable, from
   ``SMALL_AREA_REL`` on, are cells of their own and no longer foreground. Platelets lie on and next to red and white
   cells without a predicted boundary, and many are too small for a seed.
1. Foreground components (4-connected) of ``foreground >= foreground_threshold``.
2. Seeds: 4-connected pieces of ``score >= seed_threshold`` inside the foreground, not below ``min_seed_area_rel``.
3. A component with one seed is one cell. With several, it is flooded from the seeds (watershed) in the order of
   falling score. The score, not the distance to the background, is the relief: the network has seen the line between
   the cells, while distance assumes that cells are convex and of one size. As the seeds are the relief's own peaks,
   every basin continues downhill from its seed and meets its neighbour on the predicted line.
4. A component without a seed is still one cell if the foreground *alone* passes the test of a seed: at least
   ``min_seed_area_rel`` of it reaches ``seed_threshold``. Then the boundary penalty hid the seed, as in slivers at the
   image border and in cells hardly wider than two boundaries; dropping them would lose cells silently. Where the
   foreground itself is doubtful, nothing is counted.
5. Cells below ``min_area_rel`` are fragments. A fragment that touches a cell (the lens between two overlapping cells,
   made a seed of its own by boundaries on all sides) is merged into the neighbour with the longest common border, so
   that the foreground has no hole. An isolated one is a speck and is dropped, and so is one at the image border, the
   end of a cell that lies outside. Cells that touch the image border are dropped below ``min_border_area_rel``.
   With ``border_cells="visible"`` cells at the image border are kept from ``VISIBLE_AREA_REL`` on, and the count rule
   decides which of them count. A fragment there that shares a longer line with a cell than with the border is part of
   that cell, split off like any other; the rest are the ends of cells that lie outside.
   Small pieces from ``VISIBLE_AREA_REL`` on that the network classifies as platelets are neither fragments nor specks:
   they are kept, although they are less than a tenth of a red cell.
6. Holes up to ``max_hole_rel`` inside a single cell are filled (pallor). A gap between several cells is not a hole,
   however small.

``distance``: the same with score = distance, the share of the way from a cell's edge (0) to its middle (1). In step 4
a component without a seed is always one cell: the distance channel says where the middle of a cell is; whether there
is a cell is for the foreground to say.

Areas are relative to the disc of the model's median cell diameter. The limits of step 5 are relative to the image's
own typical cell if that is smaller, so that an image at a lower magnification does not lose its cells as specks.
Numbers are 1..n in raster order of each cell's first pixel. Everything is deterministic: equal probabilities give equal
labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.enlarge import enlarge
from cellseg_deploy.cells.label_runs import Labels, Runs, areas_of, paint, raster_ranks, row_runs
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models.spec import BoundaryParams, DistanceParams, InstanceParams, ThresholdParams, misfit

Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

BorderCells = Literal["visible", "model"]
BORDER_CELLS: tuple[BorderCells, ...] = ("visible", "model")
VISIBLE_AREA_REL = 0.03
"""Least share of the typical cell for a piece at the image border to be labelled: a strip of 7 % of a diameter, 54 px
for a cell of 48 px. Smaller pieces can be noise, and a seed (``min_seed_area_rel``) is not smaller either."""
SMALL_CLASSES: tuple[str, ...] = ("platelet",)
"""Classes whose cells are smaller than the limit for fragments of other cells."""
SMALL_AREA_REL = 0.045
"""Least share of the area of the median cell's disc for a cell of a small class: a fifth of a diameter, 1.6 micrometres
next to red cells of 7.5 (platelets measure 2 to 3). Chosen on the held-out fields of PBC and BCCD."""
_FEW_CELLS = 8


def segment(
    probabilities_khw: npt.NDArray[np.float32],
    channels: Sequence[str],
    params: InstanceParams,
    *,
    cell_diameter_px: float,
    out_hw: tuple[int, int] | None = None,
    border_cells: BorderCells = "model",
    classes: Sequence[str] = (),
) -> Labels:
    """Label image int32 of ``probabilities_khw`` (K, h, w) in [0, 1]; 0 = background, cells 1..n in raster order.

    ``channels``: names of the K channels; the type of ``params`` chooses the method. ``cell_diameter_px``: median cell
    diameter in px of the probabilities. ``out_hw``: size of the labels, by default (h, w). For another size, cells are
    found at (h, w) and resized afterwards, see ``enlarge``. ``border_cells``: which cells cut by the image border to
    keep: all that are visible, or those within the limits of ``params``, as calibration on masks requires.
    ``classes``: names of the last channels, if they are classes of cells.

    Raises ``UsageError`` for invalid shapes, channels or parameters.
    """
    return painted(
        segment_runs(
            probabilities_khw,
            channels,
            params,
            cell_diameter_px=cell_diameter_px,
            out_hw=out_hw,
            border_cells=border_cells,
            classes=classes,
        )
    )


def segment_runs(
    probabilities_khw: npt.NDArray[np.float32],
    channels: Sequence[str],
    params: InstanceParams,
    *,
    cell_diameter_px: float,
    out_hw: tuple[int, int] | None,
    border_cells: BorderCells,
    classes: Sequence[str],
) -> Runs:
    """``segment`` without the last step, ``painted``: the caller may first free the probabilities."""
    _check(probabilities_khw, channels, params, cell_diameter_px, out_hw)
    disc_px = math.pi / 4 * cell_diameter_px**2
    labels = first_labels(probabilities_khw, channels, params, disc_px=disc_px, classes=classes)
    labels = final_labels(
        labels,
        probabilities_khw,
        params,
        disc_px=disc_px,
        typical_px=typical_area(whole_areas(labels), disc_px),
        border_cells=border_cells,
        classes=classes,
    )
    if out_hw is not None and out_hw != labels.shape:
        foreground = _plane(probabilities_khw, channels, "foreground")
        return enlarge(labels, foreground, params.foreground_threshold, out_hw)
    return row_runs(labels)


def painted(runs: Runs) -> Labels:
    """Label image int32 (h, w) of ``runs``, their numbers 1..n in raster order."""
    return paint(runs, raster_ranks(runs.label)[runs.label])


def first_labels(
    probabilities_khw: npt.NDArray[np.float32],
    channels: Sequence[str],
    params: InstanceParams,
    *,
    disc_px: float,
    classes: Sequence[str] = (),
) -> Labels:
    """Steps 0 to 4 of the module: int32 labels (h, w), gaps possible. Each label depends only on the probabilities in
    its own component of the foreground. Components that are one cell come first, then the cells of others, then those
    of step 0; within each, the order is that of their first pixels."""
    foreground = _plane(probabilities_khw, channels, "foreground")
    small = _small_pieces(foreground, probabilities_khw, params, disc_px, classes)
    if small is not None:
        foreground = np.where(small > 0, np.float32(0), foreground)
    if isinstance(params, BoundaryParams):
        boundary = probabilities_khw[list(channels).index("boundary")]
        labels = label_boundary(foreground, boundary, params, disc_px=disc_px)
    elif isinstance(params, DistanceParams):
        distance = probabilities_khw[list(channels).index("distance")]
        labels = label_distance(foreground, distance, params, disc_px=disc_px)
    else:
        labels = label_threshold(foreground, params)
    if small is not None:
        np.copyto(labels, small + labels.max(), where=small > 0)
    return labels


def _small_pieces(
    foreground: Plane,
    probabilities_khw: npt.NDArray[np.float32],
    params: InstanceParams,
    disc_px: float,
    classes: Sequence[str],
) -> Labels | None:
    """Step 0: int32 labels (h, w) of the cells of small classes, None if there are none."""
    planes = [
        plane for name, plane in zip(classes[::-1], probabilities_khw[::-1], strict=False) if name in SMALL_CLASSES
    ]
    if not planes:
        return None
    is_small = (foreground >= params.foreground_threshold) & (np.max(planes, axis=0) >= 0.5)
    pieces = drop_small(components(is_small)[0], SMALL_AREA_REL * disc_px)
    return pieces if pieces.any() else None


def final_labels(
    labels: Labels,
    probabilities_khw: npt.NDArray[np.float32],
    params: InstanceParams,
    *,
    disc_px: float,
    typical_px: float,
    border_cells: BorderCells,
    classes: Sequence[str],
) -> Labels:
    """Steps 5 and 6 of the module for ``labels`` (h, w) of ``first_labels``. ``typical_px``: of ``typical_area``; other
    arguments: see ``segment``. A cell depends on its own component of the foreground and on what lies inside it."""
    least_px, border_px = params.min_area_rel * typical_px, _min_border_rel(params, border_cells) * typical_px
    small = None
    if any(name in SMALL_CLASSES for name in classes):
        planes = probabilities_khw[-len(classes) :]
        small = small_cells(labels, planes, classes, VISIBLE_AREA_REL * typical_px, least_px)
    labels = join_fragments(labels, least_px, at_border=border_cells == "visible", kept=small)
    labels = drop_small(labels, least_px, border_px, kept=small)
    return fill_holes(labels, params.max_hole_rel * disc_px)


def _plane(probabilities_khw: npt.NDArray[np.float32], channels: Sequence[str], name: str) -> Plane:
    return np.ascontiguousarray(probabilities_khw[list(channels).index(name)], np.float32)


def label_threshold(foreground: Plane, params: ThresholdParams) -> Labels:
    """4-connected components of ``foreground`` (h, w) at the threshold, as int32 labels, possibly with gaps."""
    return components(foreground >= params.foreground_threshold)[0]


def label_boundary(foreground: Plane, boundary: Plane, params: BoundaryParams, *, disc_px: float) -> Labels:
    """Cells of ``foreground`` and ``boundary`` (h, w), split as the module describes: int32 labels, gaps possible.

    ``disc_px``: area of the disc of the median cell diameter, in px.
    """
    score = foreground - np.float32(params.boundary_weight) * boundary
    inside = foreground >= params.foreground_threshold
    convinced = inside & (foreground >= params.seed_threshold)
    return _label_seeded(score, inside, convinced, params, params.min_seed_area_rel * disc_px)


def label_distance(foreground: Plane, distance: Plane, params: DistanceParams, *, disc_px: float) -> Labels:
    """Cells of ``foreground`` and ``distance`` (h, w), split as the module describes: int32 labels, gaps possible."""
    inside = foreground >= params.foreground_threshold
    return _label_seeded(distance, inside, inside, params, params.min_seed_area_rel * disc_px)


def _label_seeded(
    score: Plane, inside: Mask, convinced: Mask, params: BoundaryParams | DistanceParams, min_seed_px: float
) -> Labels:
    """Steps 1 to 4 of the module docstring; planes are (h, w). ``convinced``: pixels that count without a seed."""
    component, boxes = components(inside)
    n_components = len(boxes)
    seeds = drop_small(components(inside & (score >= params.seed_threshold))[0], min_seed_px)

    component_of_seed = np.zeros(int(seeds.max(initial=0)) + 1, np.int32)
    component_of_seed[seeds] = component  # every pixel of a seed lies in the same component
    is_seed = np.zeros(len(component_of_seed), np.bool_)
    is_seed[seeds] = True
    is_seed[0] = False
    n_seeds = np.bincount(component_of_seed[is_seed], minlength=n_components)
    convinced_px = np.bincount(component[convinced], minlength=n_components)
    is_cell = (n_seeds == 1) | ((n_seeds == 0) & (convinced_px >= min_seed_px) & (convinced_px > 0))
    is_cell[0] = False

    labels = np.where(is_cell, np.arange(n_components, dtype=np.int32), np.int32(0))[component]
    for number in np.flatnonzero(n_seeds[1:] > 1) + 1:
        left, top, width, height = boxes[number]
        window = np.s_[top : top + height, left : left + width]
        here = component[window] == number
        flooded = flood(score[window], np.where(here, seeds[window], 0), here)
        np.copyto(labels[window], flooded + np.int32(n_components), where=here)
    return labels


def flood(score: Plane, seeds: Labels, inside: Mask) -> Labels:
    """Grow ``seeds`` over ``inside`` in order of falling ``score`` (all (h, w)), 4-connected.

    ``inside`` must be one component that contains every seed; each of its pixels gets the number of a seed.
    """
    import cv2
    from skimage.segmentation import watershed

    # Pixels deep inside a seed cannot grow into their neighbours. Leaving them out of the queue does not change the
    # result, and they are most of the area.
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    deep = cv2.erode((seeds > 0).astype(np.uint8), cross).astype(np.bool_)
    grown = watershed(-score, np.where(deep, 0, seeds), connectivity=1, mask=inside & ~deep)
    return np.where(deep, seeds, grown).astype(np.int32, copy=False)


def whole_areas(labels: Labels) -> npt.NDArray[np.intp]:
    """Area in px of each label of ``labels`` (h, w) that does not touch the image border, in any order."""
    area = areas_of(labels)
    area[0] = 0
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        area[edge] = 0
    return area[area > 0]


def typical_area(areas_px: npt.NDArray[np.integer[Any]], disc_px: float) -> float:
    """Area in px that the limits for small cells refer to: ``disc_px``, or the image's own median cell if smaller.

    ``areas_px``: of all whole labels, (n,). The median is over those of a twentieth of ``disc_px`` or more; with fewer
    than ``_FEW_CELLS`` it is not used. Never below a quarter of ``disc_px``, i.e. half the model's cell diameter.
    """
    cells = areas_px[areas_px >= 0.05 * disc_px]
    if len(cells) < _FEW_CELLS:
        return disc_px
    return float(np.clip(np.median(cells), 0.25 * disc_px, disc_px))


def _min_border_rel(params: InstanceParams, border_cells: BorderCells) -> float:
    """Share of the typical cell below which a cell at the border is dropped."""
    by_model = max(params.min_area_rel, params.min_border_area_rel)
    return by_model if border_cells == "model" else min(VISIBLE_AREA_REL, by_model)


def small_cells(
    labels: Labels, planes_khw: npt.NDArray[np.float32], classes: Sequence[str], min_px: float, max_px: float
) -> Mask:
    """Whether each number of ``labels`` (h, w) is a whole cell of a class with small cells and has at least ``min_px``
    but fewer than ``max_px`` pixels, bool (largest number + 1,). ``planes_khw``: probabilities per class, (K, h, w)."""
    area = areas_of(labels)
    asked = (area >= min_px) & (area < max_px)
    asked[0] = False
    at = np.flatnonzero(asked[labels])
    number = labels.reshape(-1)[at]
    sums = [np.bincount(number, plane.reshape(-1)[at], minlength=len(area)) for plane in planes_khw]
    is_small = np.array([name in SMALL_CLASSES for name in classes], np.bool_)
    return np.asarray(asked & is_small[np.argmax(sums, axis=0)])


def drop_small(
    labels: Labels, min_px: float, min_border_px: float | None = None, *, kept: Mask | None = None
) -> Labels:
    """Drop labels of fewer than ``min_px`` pixels, except those in ``kept``, bool by number; numbers stay.

    For labels with a pixel in the outermost row or column, ``min_border_px`` is the limit if passed.
    """
    area = areas_of(labels)
    large = area >= min_px
    if kept is not None:
        large |= kept[: len(area)]
    if min_border_px is not None:
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            large[edge] = area[edge] >= min_border_px
    number = np.where(large, np.arange(len(area), dtype=np.int32), np.int32(0))
    return np.take(number, labels)


def join_fragments(labels: Labels, min_px: float, *, at_border: bool = False, kept: Mask | None = None) -> Labels:
    """Merge each label below ``min_px`` pixels into the large neighbour with the longest common border.

    Border length: pairs of 4-neighbours; the smaller number wins a tie. A fragment that touches only fragments waits
    until one of them has been merged; one that touches nothing keeps its number. So does one at the image border, which
    is more likely the end of another cell, mostly outside the picture; with ``at_border`` it is merged if its border
    with the neighbour is longer than its line of pixels at the image border. Labels in ``kept``, bool by number, are
    never merged.
    """
    area = areas_of(labels)
    is_cell = area >= min_px
    is_fragment = (area > 0) & ~is_cell
    if kept is not None:
        is_fragment &= ~kept
    edges = np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1]))
    cut_px = np.bincount(edges, minlength=len(area))
    if not at_border:
        is_fragment[edges] = False
    is_fragment[0] = is_cell[0] = False
    if not is_fragment.any():
        return labels
    pairs = [
        np.column_stack((one[meet], other[meet]))
        for a, b in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:]))
        for meet in [(a != b) & (a > 0) & (b > 0) & (is_fragment[a] | is_fragment[b])]
        for one, other in ((a, b), (b, a))
    ]
    pair, border = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    owner = np.arange(len(area), dtype=np.int32)
    while True:
        fragment, neighbour = pair[:, 0], owner[pair[:, 1]]
        fits = is_fragment[fragment] & is_cell[neighbour]
        if not fits.any():
            return np.take(owner, labels)
        fragment, neighbour = fragment[fits], neighbour[fits]
        both, where = np.unique(np.column_stack((fragment, neighbour)), axis=0, return_inverse=True)
        length = np.bincount(where.reshape(-1), weights=border[fits])
        longer = length > cut_px[both[:, 0]]
        if not longer.all():
            both, length = both[longer], length[longer]
            if not len(both):
                return np.take(owner, labels)
        order = np.lexsort((both[:, 1], -length, both[:, 0]))
        given, first = np.unique(both[order, 0], return_index=True)
        owner[given] = both[order[first], 1]
        is_fragment[given] = False


def fill_holes(labels: Labels, max_px: float) -> Labels:
    """Fill holes of at most ``max_px`` pixels with the label of the cell around them, if it is a single cell.

    A hole is an 8-connected piece of background that does not touch the image border. A hole that borders on several
    cells is the gap between them and stays.
    """
    hole, boxes, area = _components_with_area(labels == 0, connectivity=8)
    height, width = labels.shape
    left, top = boxes[:, 0], boxes[:, 1]
    enclosed = (left > 0) & (top > 0) & (left + boxes[:, 2] < width) & (top + boxes[:, 3] < height)
    small = enclosed & (area <= max_px)
    small[0] = False  # component 0 is everything but background
    at = np.flatnonzero(small[hole])
    if not len(at):
        return labels
    number = hole.reshape(-1)[at]
    flat = labels.reshape(-1)
    highest = np.zeros(len(area), np.int32)
    lowest = np.full(len(area), np.iinfo(np.int32).max, np.int32)
    for step in (-width, -1, 1, width):  # no pixel of a hole lies at the border, so each step stays inside
        neighbour = flat[at + step]
        np.maximum.at(highest, number, neighbour)
        np.minimum.at(lowest, number, np.where(neighbour > 0, neighbour, np.iinfo(np.int32).max))
    owned = (highest == lowest)[number]
    filled = labels.copy()
    filled.reshape(-1)[at[owned]] = highest[number[owned]]
    return filled


def components(mask: Mask, connectivity: int = 4) -> tuple[Labels, npt.NDArray[np.int32]]:
    """Component number of each pixel, and left, top, width, height of each component (row 0: the rest)."""
    numbers, boxes, _ = _components_with_area(mask, connectivity)
    return numbers, boxes


def _components_with_area(mask: Mask, connectivity: int) -> tuple[Labels, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    import cv2

    # CV_32S: 16 bits overflow at 65,535 components, which noise reaches early.
    _, numbers, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=connectivity, ltype=cv2.CV_32S
    )
    return numbers, stats[:, :4], stats[:, cv2.CC_STAT_AREA]


def _check(
    probabilities_khw: npt.NDArray[Any],
    channels: Sequence[str],
    params: InstanceParams,
    cell_diameter_px: float,
    out_hw: tuple[int, int] | None,
) -> None:
    if probabilities_khw.ndim != 3 or len(probabilities_khw) != len(channels) or 0 in probabilities_khw.shape:
        raise UsageError(
            f"probabilities must be (K, h, w) with one plane for each of {tuple(channels)}, "
            f"got {probabilities_khw.shape}"
        )
    second = {BoundaryParams: ("boundary",), DistanceParams: ("distance",)}.get(type(params), ())
    needed = ("foreground", *second)
    missing = [name for name in needed if name not in channels]
    if missing:
        raise UsageError(
            f"{type(params).__name__} needs the channel {missing[0]!r}, the network has {tuple(channels)}; "
            f"use ThresholdParams or a model of the {missing[0]} variant"
        )
    if not (math.isfinite(cell_diameter_px) and cell_diameter_px > 0):
        raise UsageError(f"cell_diameter_px must be a positive number, got {cell_diameter_px}")
    if out_hw is not None and min(out_hw) < 1:
        raise UsageError(f"out_hw must be positive, got {out_hw}")
    check_params(params)


def check_border_cells(border_cells: str) -> None:
    """Raise ``UsageError`` if ``border_cells`` is unknown."""
    if border_cells not in BORDER_CELLS:
        raise UsageError(f"border cells must be one of {', '.join(BORDER_CELLS)}, got {border_cells!r}")


def check_params(params: InstanceParams) -> None:
    """Raise ``UsageError`` if a threshold is outside (0, 1) or another setting is negative or NaN."""
    problem = misfit(params)
    if problem:
        raise UsageError(problem)
