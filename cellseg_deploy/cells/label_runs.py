"""A label image as horizontal runs: the common basis of counting, renumbering and measuring.

A photograph of 1600 x 1200 pixels with a hundred cells has two million pixels but only some twenty thousand runs.
Areas, overlaps, moments and connected pieces are sums over runs, so everything after one pass over the pixels is
cheap, whatever the number of cells.

    row 0   . . 1 1 1 . 2 2        label 1 2 1 3
    row 1   . 1 1 . 3 3 3 3   ->   row   0 0 1 1
                                   start 2 6 1 4
                                   stop  5 8 3 8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

Labels = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

BAND_PIXELS = 1 << 19
"""Pixels of a large image that are processed at once: few enough for the processor's caches."""


@dataclass(frozen=True)
class Runs:
    """Maximal horizontal runs of one label each, without background, in raster order.

    ``label``, ``row``, ``start``, ``stop``: int64 (n,); a run covers columns ``start <= x < stop`` of ``row``.
    ``image_hw``: size of the image they come from.
    """

    label: Ints
    row: Ints
    start: Ints
    stop: Ints
    image_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def length(self) -> Ints:
        """Pixels in each run."""
        return self.stop - self.start


def row_runs(labels: npt.NDArray[np.integer[Any]]) -> Runs:
    """Runs of ``labels`` (h, w), any integer type, 0 = background.

    Raises ``UsageError`` for other shapes, floats, masks and negative labels.
    """
    check_labels(labels)
    return stacked([_runs_of_band(labels[rows]) for rows in bands((labels.shape[0], labels.shape[1]))])


def bands(image_hw: tuple[int, int], *, at_least: int = 1) -> list[slice]:
    """Split the rows of an image into bands of about ``BAND_PIXELS`` and ``at_least`` rows; one empty band if no rows.

    Temporary arrays then need the size of a band instead of the image.
    """
    height, width = image_hw
    rows = max(at_least, BAND_PIXELS // max(width, 1))
    return [slice(start, min(start + rows, height)) for start in range(0, max(height, 1), rows)]


def areas_of(labels: Labels) -> npt.NDArray[np.intp]:
    """Pixels of each number of ``labels`` (h, w), int32, from 0 to the largest, (largest number + 1,).

    ``np.bincount`` of all of them would copy the image to 64 bits.
    """
    area = np.zeros(int(labels.max(initial=0)) + 1, np.intp)
    for rows in bands((labels.shape[0], labels.shape[1])):
        found = np.bincount(labels[rows].reshape(-1))
        area[: len(found)] += found
    return area


def stacked(parts: Sequence[Runs]) -> Runs:
    """Runs of the image made of ``parts`` stacked vertically; at least one part, all of one width."""
    tops = np.cumsum([0, *(part.image_hw[0] for part in parts)])
    rows = [part.row + top for part, top in zip(parts, tops, strict=False)]
    label, start, stop = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("label", "start", "stop")
    )
    return Runs(label, np.concatenate(rows), start, stop, (int(tops[-1]), parts[0].image_hw[1]))


def _runs_of_band(labels: npt.NDArray[np.integer[Any]]) -> Runs:
    height, width = labels.shape
    if labels.size == 0:
        empty = np.empty(0, np.int64)
        return Runs(empty, empty, empty, empty, (height, width))
    begins = np.empty((height, width), np.bool_)
    begins[:, 0] = True
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    first = np.flatnonzero(begins)
    label = labels.reshape(-1)[first].astype(np.int64)
    if label.min() < 0:
        raise UsageError(f"labels must be 0 (background) or positive, found {label.min()}")
    after = np.append(first[1:], labels.size)
    is_cell = label > 0
    first, after, label = first[is_cell], after[is_cell], label[is_cell]
    row = first // width
    return Runs(label, row, first - row * width, after - row * width, (height, width))


def check_labels(labels: npt.NDArray[Any]) -> None:
    """Raise ``UsageError`` unless ``labels`` is a two-dimensional integer array."""
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"a label image must be a two-dimensional integer array, got {labels.dtype} {labels.shape}; "
            "turn a mask into labels by its connected components first"
        )


def pieces(runs: Runs) -> Ints:
    """Number of the 4-connected piece of one label that each run belongs to, int64 (n,), 0..n_pieces-1."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if len(runs) == 0:
        return np.empty(0, np.int64)
    width = runs.image_hw[1]
    start, stop = runs.row * width + runs.start, runs.row * width + runs.stop
    # Runs are sorted and disjoint, so the runs of the next row that share a column with a run are consecutive.
    below_first = np.searchsorted(stop, start + width, side="right")
    below_stop = np.searchsorted(start, stop + width, side="left")
    count = below_stop - below_first
    upper = np.repeat(np.arange(len(runs)), count)
    lower = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(below_first, count)
    same = runs.label[upper] == runs.label[lower]
    upper, lower = upper[same], lower[same]
    graph = coo_matrix((np.ones(len(upper), np.bool_), (upper, lower)), shape=(len(runs), len(runs)))
    _, piece = connected_components(graph, directed=False)
    return np.asarray(piece, np.int64)


def largest_pieces(runs: Runs) -> Runs:
    """Runs of each label's largest 4-connected piece; the first in raster order wins a tie."""
    piece = pieces(runs)
    if not len(runs) or piece.max() + 1 == len(np.unique(runs.label)):
        return runs
    first_run = np.unique(piece, return_index=True)[1]
    pixels = np.bincount(piece, weights=runs.length).astype(np.int64)
    label = runs.label[first_run]
    order = np.lexsort((first_run, -pixels, label))
    best_of_label = np.ones(len(order), np.bool_)
    best_of_label[1:] = label[order][1:] != label[order][:-1]
    is_kept = np.zeros(len(order), np.bool_)
    is_kept[order[best_of_label]] = True
    kept = is_kept[piece]
    return Runs(runs.label[kept], runs.row[kept], runs.start[kept], runs.stop[kept], runs.image_hw)


def raster_ranks(label: Ints) -> Labels:
    """Table old label -> 1..n in order of first appearance in ``label``; 0 and labels that do not appear become 0.

    ``label``: positive labels of runs in raster order. Returns int32 (largest label + 1,).
    """
    missing = len(label)
    first = np.full(int(label.max(initial=0)) + 1, missing, np.int64)
    # Written backwards, so that the first appearance of a label wins.
    first[label[::-1]] = np.arange(missing)[::-1]
    order = np.argsort(first, kind="stable")
    n_present = int(np.count_nonzero(first < missing))
    table = np.zeros(len(first), np.int32)
    table[order[:n_present]] = np.arange(1, n_present + 1, dtype=np.int32)
    return table


def renumber(labels: npt.NDArray[np.integer[Any]]) -> Labels:
    """Renumber ``labels`` 1..n without gaps, int32, in raster order of each label's first pixel.

    Takes any integer type, including sparse, very large numbers. Raises ``UsageError`` as ``row_runs`` does.
    """
    runs = row_runs(labels)
    # Numbers may be anything a tool writes, so tables are indexed by their ranks, not their values.
    dense = np.unique(runs.label, return_inverse=True)[1].astype(np.int64) + 1
    return paint(runs, raster_ranks(dense)[dense])


def paint(runs: Runs, label: npt.NDArray[np.integer[Any]]) -> Labels:
    """Paint an image (h, w), int32, with each run filled with its number in ``label`` (n,); the rest is 0.

    ``runs``: in raster order.
    """
    height, width = runs.image_hw
    image = np.empty((height, width), np.int32)
    for rows in bands((height, width)):
        low, high = np.searchsorted(runs.row, (rows.start, rows.stop))
        start = (runs.row[low:high] - rows.start) * width + runs.start[low:high]
        # Background gaps and runs alternate: fill the band from left to right by repeating each value.
        edges = np.empty(2 * (high - low) + 1, np.int64)
        edges[0:-1:2] = start
        edges[1:-1:2] = start + (runs.stop[low:high] - runs.start[low:high])
        edges[-1] = (rows.stop - rows.start) * width
        values = np.zeros(len(edges), np.int32)
        values[1:-1:2] = label[low:high]
        image[rows] = np.repeat(values, np.diff(edges, prepend=0)).reshape(rows.stop - rows.start, width)
    return image
