"""Where counts are lost: each error of an image by kind, with the cells involved.

Kinds, in this order; each true and predicted cell is reported once:

``parted``      a true component that looks like several cells (see ``metrics``) and holds most of two or more predicted
                ones: usually the mask merges overlapping cells. Reported, but not an error.
``merge``       a predicted cell that holds more than half of each of two or more true ones
``split``       a true cell that holds more than half of each of two or more predicted ones
``outline``     an unmatched true and an unmatched predicted cell that share more than half of the smaller one
``miss``        a false negative: a true cell without a match
``invention``   a false positive: a predicted cell without a match

An error of the last five kinds with a cell that touches the image border has ``at_border`` set, and is shown on
separate pages: half a cell is harder to see, and hand-drawn masks are least reliable there. Matches are those of
``metrics`` at IoU >= 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.measure import boxes
from cellseg_deploy.cells.metrics import (
    F1_THRESHOLD,
    MIN_AREA_PX,
    at_least,
    in_clumps,
    looks_like_several,
    match,
    overlap_table,
)

Labels = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Finding:
    """One error. ``true``, ``predicted``: labels of its cells. ``box``: left, top, width, height around them, px."""

    kind: str
    true: tuple[int, ...]
    predicted: tuple[int, ...]
    box: Box
    at_border: bool

    @property
    def group(self) -> str:
        """Pages it is shown on: its kind, or ``border``."""
        return "border" if self.at_border and self.kind != "parted" else self.kind


GROUPS = ("merge", "split", "miss", "invention", "outline", "border", "parted")


def find(true: Labels, predicted: Labels, *, min_area_px: int = MIN_AREA_PX) -> list[Finding]:
    """Find errors of ``predicted`` against ``true``, label images (h, w) of one size; by kind, then by label.

    Objects below ``min_area_px`` are specks and are ignored. Raises ``UsageError`` as ``metrics`` does.
    """
    return list(_Image(true, predicted, min_area_px).findings())


class _Image:
    """One image's overlaps, and which of its cells are already reported."""

    def __init__(self, true: Labels, predicted: Labels, min_area_px: int) -> None:
        table = overlap_table(true, predicted)
        self.table = table
        self.true_open = table.true_area >= min_area_px  # cells not yet reported
        self.predicted_open = table.predicted_area >= min_area_px
        self.clumps = looks_like_several(true, table, self.true_open)
        kept = self.true_open[table.true_index] & self.predicted_open[table.predicted_index]
        self.true_index, self.predicted_index = table.true_index[kept], table.predicted_index[kept]
        self.common = table.common_px[kept]
        self.true_boxes = boxes(true, table.true_number)
        self.predicted_boxes = boxes(predicted, table.predicted_number)
        self.image_hw = true.shape

    def findings(self) -> Iterator[Finding]:
        in_true = 2 * self.common > self.table.predicted_area[self.predicted_index]  # most of the prediction
        in_predicted = 2 * self.common > self.table.true_area[self.true_index]  # most of the truth
        yield from self._several(
            "parted", self.true_index, self.predicted_index, in_true & self.clumps[self.true_index]
        )
        yield from self._several("merge", self.predicted_index, self.true_index, in_predicted, whole_is_true=False)
        yield from self._several("split", self.true_index, self.predicted_index, in_true)
        self._close_matches()
        smaller = np.minimum(self.table.true_area[self.true_index], self.table.predicted_area[self.predicted_index])
        near = 2 * self.common > smaller
        both_open = self.true_open[self.true_index] & self.predicted_open[self.predicted_index]
        for at in match(self.true_index, self.predicted_index, near & both_open):
            yield self._finding("outline", [int(self.true_index[at])], [int(self.predicted_index[at])])
        for index in np.flatnonzero(self.true_open):
            yield self._finding("miss", [int(index)], [])
        for index in np.flatnonzero(self.predicted_open):
            yield self._finding("invention", [], [int(index)])

    def _several(
        self,
        kind: str,
        whole: npt.NDArray[np.int64],
        part: npt.NDArray[np.int64],
        held: Mask,
        *,
        whole_is_true: bool = True,
    ) -> Iterator[Finding]:
        """Yield a finding for each object that holds two or more objects of the other side."""
        whole_open, part_open = (
            (self.true_open, self.predicted_open) if whole_is_true else (self.predicted_open, self.true_open)
        )
        for index in np.flatnonzero(np.bincount(whole[held]) >= 2):
            parts = [int(p) for p in part[held & (whole == index)] if part_open[p]]
            if whole_open[index] and len(parts) >= 2:
                yield self._finding(kind, *(([int(index)], parts) if whole_is_true else (parts, [int(index)])))

    def _close_matches(self) -> None:
        """Close matched cells: they are correct. Cells of a merge or a split are already reported, matched or not."""
        union = self.table.true_area[self.true_index] + self.table.predicted_area[self.predicted_index] - self.common
        for at in match(self.true_index, self.predicted_index, at_least(self.common, union, F1_THRESHOLD)):
            self.true_open[self.true_index[at]] = False
            self.predicted_open[self.predicted_index[at]] = False
        # Predictions inside a clump count neither way, even a single one.
        swallowed = in_clumps(self.table, self.clumps)
        self.predicted_open &= ~swallowed
        self.true_open &= ~self.clumps

    def _finding(self, kind: str, true: list[int], predicted: list[int]) -> Finding:
        self.true_open[true] = False
        self.predicted_open[predicted] = False
        around = np.concatenate([self.true_boxes[true], self.predicted_boxes[predicted]])
        left, top = around[:, 0].min(), around[:, 1].min()
        right, bottom = (around[:, 0] + around[:, 2]).max(), (around[:, 1] + around[:, 3]).max()
        height, width = self.image_hw
        return Finding(
            kind,
            tuple(int(self.table.true_number[i]) for i in true),
            tuple(int(self.table.predicted_number[i]) for i in predicted),
            (int(left), int(top), int(right - left), int(bottom - top)),
            at_border=bool(left == 0 or top == 0 or right == width or bottom == height),
        )


def summary(findings: list[Finding]) -> dict[str, int]:
    """Count the findings per group, including zeros."""
    return {group: sum(finding.group == group for finding in findings) for group in GROUPS}
