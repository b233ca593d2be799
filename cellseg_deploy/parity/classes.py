"""Whether two forms of a network give the same classes to the cells that both find."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.metrics import overlap_table

Labels = npt.NDArray[np.int32]
Planes = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def class_changes(
    reference: Labels, candidate: Labels, reference_chw: Planes, candidate_chw: Planes
) -> tuple[int, int]:
    """Return the number of cells that both sides find (IoU above 0.5), and how many of them change class.

    ``reference``, ``candidate``: labels (H, W). ``*_chw``: their probabilities of C classes at the model's scale.
    """
    table = overlap_table(reference, candidate)
    union = table.true_area[table.true_index] + table.predicted_area[table.predicted_index] - table.common_px
    same = 2 * table.common_px > union
    before = _classes(reference, reference_chw, table.true_number[table.true_index[same]])
    after = _classes(candidate, candidate_chw, table.predicted_number[table.predicted_index[same]])
    return int(same.sum()), int(np.count_nonzero(before != after))


def _classes(labels: Labels, planes_chw: Planes, numbers: Ints) -> Ints:
    """Return the class number (n,) with the largest sum over the pixels of each of ``numbers`` (n,); labels are sampled
    at the middle of each pixel of ``planes_chw`` (C, h, w)."""
    rows, columns = (
        ((np.arange(small) + 0.5) * large / small).astype(np.int64)
        for small, large in zip(planes_chw.shape[1:], labels.shape, strict=True)
    )
    flat = labels[rows[:, None], columns[None, :]].ravel()
    size = int(labels.max(initial=0)) + 1
    sums = np.stack([np.bincount(flat, weights=plane.ravel(), minlength=size)[numbers] for plane in planes_chw])
    return np.asarray(sums.argmax(axis=0), np.int64)
