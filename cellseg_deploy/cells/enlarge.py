"""Label image at the model's scale -> outlines at the image's own size, whole or part by part with the same result."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Labels, Runs, bands, largest_pieces, row_runs, stacked

Plane = npt.NDArray[np.float32]


def enlarge(labels: Labels, foreground: Plane, threshold: float, out_hw: tuple[int, int]) -> Runs:
    """Resize ``labels`` (h, w) to runs at ``out_hw``, outlined where bilinear ``foreground`` crosses ``threshold``.

    Labels are repeated (nearest) and cut by the enlarged foreground, so outlines are smooth while the lines between
    touching cells stay where they were found. Each cell keeps only its largest 4-connected piece. A cell smaller than
    a pixel of the result can vanish. Numbers may have gaps afterwards.
    """
    hw = (labels.shape[0], labels.shape[1])
    return largest_pieces(enlarge_part(labels, foreground, threshold, hw, out_hw, (0, 0)))


def enlarge_part(
    labels: Labels,
    foreground: Plane,
    threshold: float,
    whole_hw: tuple[int, int],
    out_hw: tuple[int, int],
    top_left: tuple[int, int],
) -> Runs:
    """Resize a part of a label image of ``whole_hw`` as ``enlarge`` does, but keep all pieces of each cell.

    ``labels``, ``foreground`` (h, w): the part, which lies at ``top_left`` (y, x). Runs are in the coordinates of
    ``out_hw``. Within two pixels of a side of the part that is not a side of the whole, cells are not complete.
    """
    (top, left), (height, width) = top_left, labels.shape
    outside = foreground < threshold
    grown = np.where((labels == 0) & outside, _neighbour(labels), labels)
    # Filled holes count as certain foreground; anything lower could reopen them where they meet the cell.
    solid = np.where((labels > 0) & outside, np.float32(1), foreground)
    nearest = _nearest_rows(whole_hw[0], out_hw[0]) - top
    above, weight = _linear_rows(whole_hw[0], out_hw[0])
    below = np.minimum(above + 1, whole_hw[0] - 1) - top
    above -= top
    within = np.flatnonzero((above >= 0) & (below < height) & (nearest >= 0) & (nearest < height))
    columns = _Columns(whole_hw[1], out_hw[1], left, width)
    first = int(within[0]) if len(within) else 0
    parts = [_no_runs((first, columns.stop - columns.start))]
    for band in bands((len(within), columns.stop - columns.start)):
        # Rows first, then columns: the enlarged planes are never in memory at once.
        rows = within[band]
        if not len(rows) or columns.stop <= columns.start:
            continue
        low = solid[above[rows]]
        low += (solid[below[rows]] - low) * weight[rows, np.newaxis]
        inside = columns.linear(low) >= threshold
        parts.append(row_runs(np.multiply(columns.nearest(grown[nearest[rows]]), inside, dtype=np.int32)))
    runs = stacked(parts)
    return replace(runs, start=runs.start + columns.start, stop=runs.stop + columns.start, image_hw=out_hw)


class _Columns:
    """Columns of a plane of width ``n``, enlarged to ``n_out`` by OpenCV, for a part of ``width`` columns at ``left``.

    ``start``, ``stop``: the columns of the result that depend on the part alone. OpenCV resizes only whole rows. For a
    narrow part of a wide plane its arithmetic is done here, if that gives the same bits on this processor.
    """

    def __init__(self, n: int, n_out: int, left: int, width: int) -> None:
        self._n, self._n_out, self._left, self._width = n, n_out, left, width
        at = (np.arange(n_out) + 0.5) * (n / n_out) - 0.5
        before = np.floor(at).astype(np.int64)
        weight = (at - before).astype(np.float32)
        weight[(before < 0) | (before >= n - 1)] = 0
        before = np.clip(before, 0, n - 1)
        after, near = np.minimum(before + 1, n - 1), _nearest_rows(n, n_out)
        right = left + width
        within = np.flatnonzero((before >= left) & (after < right) & (near >= left) & (near < right))
        self.start, self.stop = (int(within[0]), int(within[-1]) + 1) if len(within) else (0, 0)
        here = slice(self.start, self.stop)
        self._before, self._after, self._near = (index[here] - left for index in (before, after, near))
        self._weight = weight[here]

    def linear(self, plane: Plane) -> Plane:
        """Columns ``start`` to before ``stop`` of ``plane`` (rows, width), bilinear."""
        if self._width < self._n and _has_fused_sums():
            return _interpolated(plane[:, self._before], plane[:, self._after], self._weight)
        return _resized(self._padded(plane), self._n_out)[:, self.start : self.stop]

    def nearest(self, labels: Labels) -> Labels:
        """Columns ``start`` to before ``stop`` of ``labels`` (rows, width), nearest neighbour."""
        if self._width < self._n:
            return labels[:, self._near]
        import cv2

        size = (self._n_out, len(labels))
        return np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT), np.int32)

    def _padded(self, plane: Plane) -> Plane:
        if self._width == self._n:
            return plane
        return np.pad(plane, ((0, 0), (self._left, self._n - self._left - self._width)))


def _resized(plane: Plane, n_out: int) -> Plane:
    import cv2

    if len(plane) == 1:  # OpenCV computes a lone row in another way, with other last digits
        return _resized(np.repeat(plane, 2, axis=0), n_out)[:1]
    return np.asarray(cv2.resize(plane, (n_out, len(plane)), interpolation=cv2.INTER_LINEAR), np.float32)


def _interpolated(before: Plane, after: Plane, weight: Plane) -> Plane:
    """``before + (after - before) * weight``, product and sum rounded once, as a fused multiply-add does."""
    product = (after - before).astype(np.float64) * weight
    product += before
    return product.astype(np.float32)


@cache
def _has_fused_sums() -> bool:
    """Whether OpenCV computes columns as ``_interpolated`` does, on this processor."""
    plane = np.random.default_rng(0).random((3, 401), dtype=np.float32)
    at = np.clip((np.arange(1237) + 0.5) * (401 / 1237) - 0.5, 0, 400)
    before = at.astype(np.int64)
    weight = (at - before).astype(np.float32)
    ours = _interpolated(plane[:, before], plane[:, np.minimum(before + 1, 400)], weight)
    return bool(np.array_equal(ours, _resized(plane, 1237)))


def _no_runs(image_hw: tuple[int, int]) -> Runs:
    empty = np.empty(0, np.int64)
    return Runs(empty, empty, empty, empty, image_hw)


def _nearest_rows(n: int, n_out: int) -> npt.NDArray[np.int32]:
    """Index of the row among ``n`` nearest to each of ``n_out``, (n_out,), by OpenCV's rule for columns."""
    import cv2

    column = np.arange(n, dtype=np.int32)[:, np.newaxis]
    return np.asarray(cv2.resize(column, (1, n_out), interpolation=cv2.INTER_NEAREST_EXACT), np.int32).reshape(-1)


def _linear_rows(n: int, n_out: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Rows among ``n`` that each of ``n_out`` lies between, pixel centres aligned: index of the upper row and weight of
    the lower one, both (n_out,). Beyond the first and the last row, that row is repeated."""
    at = np.clip((np.arange(n_out) + 0.5) * (n / n_out) - 0.5, 0, n - 1)
    above = at.astype(np.int32)
    return above, (at - above).astype(np.float32)


def _neighbour(labels: Labels) -> Labels:
    """Largest label directly next to each pixel, else the largest diagonal one, else 0.

    Growing by one pixel suffices: bilinear interpolation never looks further.
    """
    height, width = labels.shape
    padded = np.pad(labels, 1)

    def shifted(down: int, right: int) -> Labels:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    beside = np.maximum(np.maximum(shifted(-1, 0), shifted(1, 0)), np.maximum(shifted(0, -1), shifted(0, 1)))
    diagonal = np.maximum(np.maximum(shifted(-1, -1), shifted(-1, 1)), np.maximum(shifted(1, -1), shifted(1, 1)))
    return np.where(beside > 0, beside, diagonal)
