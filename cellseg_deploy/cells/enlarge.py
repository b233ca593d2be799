"""Label image at the model's scale -> outlines at the image's own size, whole or part by part with the same result."""

from __future__ import annotations

from dataclasses import replace

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
    import cv2

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
    is_part = width != whole_hw[1]
    first = int(within[0]) if len(within) else 0
    parts = [_no_runs((first, out_hw[1]))]
    for band in bands((len(within), out_hw[1])):
        # Rows first, then columns by OpenCV: the enlarged planes are never in memory at once.
        rows = within[band]
        low = solid[above[rows]]
        low += (solid[below[rows]] - low) * weight[rows, np.newaxis]
        numbers = grown[nearest[rows]]
        if is_part:  # OpenCV's columns depend on the width of the whole
            around = ((0, 0), (left, whole_hw[1] - left - width))
            low, numbers = np.pad(low, around), np.pad(numbers, around)
        if len(rows):
            out_wh = (out_hw[1], len(rows))
            inside = cv2.resize(low, out_wh, interpolation=cv2.INTER_LINEAR) >= threshold
            image = cv2.resize(numbers, out_wh, interpolation=cv2.INTER_NEAREST_EXACT)
            parts.append(row_runs(np.multiply(image, inside, dtype=np.int32)))
    return replace(stacked(parts), image_hw=out_hw)


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
