"""Class of each cell, from the network's class channels, and which classes count as cells.

A cell's probability of a class is the mean of that channel over the pixels of the network's input whose centre lies in
the cell, or the value at the cell's centroid if the cell is too small to contain any. The most probable class wins, the
first one in a tie. The cost is one pass over the image at the model's scale, whatever the size of the photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.label_runs import Ints, Labels, bands
from cellseg_deploy.cells.measure import centroids
from cellseg_deploy.errors import UsageError, check_types

CLASS, CLASS_PROBABILITY = "class", "class_probability"
CLASS_COLUMNS = (CLASS, CLASS_PROBABILITY)
NOT_COUNTED: tuple[str, ...] = ("platelet",)
"""Classes that are found and labelled but not counted as cells, unless requested."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CellClasses:
    """Classes of the n cells of an image, in label order.

    ``names``: all classes of the model. ``counting``: the classes that count as cells. ``index``: int64 (n,), position
    in ``names`` of each cell's class. ``probability``: float64 (n,) in [0, 1], of that class.
    """

    names: tuple[str, ...]
    counting: tuple[str, ...]
    index: Ints
    probability: Floats

    @property
    def counts(self) -> Bools:
        """Whether each cell's class counts, bool (n,)."""
        return np.array([name in self.counting for name in self.names], np.bool_)[self.index]

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """``CLASS_COLUMNS``, (n,) each: text and float64."""
        return {CLASS: np.array(self.names)[self.index], CLASS_PROBABILITY: self.probability}

    def numbers(self, which: Bools) -> dict[str, int]:
        """Number of cells per class name, among the cells selected by ``which``, bool (n,)."""
        found = np.bincount(self.index[which], minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))


def counting_labels(labels: Labels, classes: CellClasses | None) -> Labels:
    """``labels`` (h, w) without cells of classes that do not count, numbers kept; unchanged without ``classes``."""
    if classes is None or classes.counts.all():
        return labels
    return labels_where(labels, classes.counts)


def labels_where(labels: Labels, which: Bools) -> Labels:
    """``labels`` (h, w) with only the cells of 1..n selected by ``which``, bool (n,); others become 0, numbers stay."""
    kept = np.arange(len(which) + 1, dtype=np.int32)
    kept[1:][~which] = 0
    return np.take(kept, labels)


def counting_classes(known: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes that count as cells, in the order of ``known``, the model's classes: those ``asked`` for, by
    default all but ``NOT_COUNTED``.

    Raises ``UsageError`` if ``asked`` is empty, names an unknown class, or names classes of a model without any.
    """
    if asked is None:
        return tuple(name for name in known if name not in NOT_COUNTED)
    check_types("a sequence of names", classes=asked)
    if not known:
        alone = f", so {', '.join(asked)} cannot be counted alone" if asked else "; leave `classes` out"
        raise UsageError(f"the model does not distinguish classes of cells{alone}")
    if unknown := [name for name in asked if name not in known]:
        raise UsageError(f"the model has no class {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if not asked:
        raise UsageError(f"no class to count; give some of {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def classify(
    labels: Labels, probabilities_khw: npt.NDArray[np.float32], names: Sequence[str], counting: Sequence[str]
) -> CellClasses | None:
    """Classify the cells 1..n of ``labels`` (h, w); None if ``names`` is empty.

    ``probabilities_khw``: (K, h', w') at the model's scale; the last channels are those of ``names``.
    """
    if not names:
        return None
    means = class_means(labels, probabilities_khw[-len(names) :], int(labels.max(initial=0)))
    index = means.argmax(axis=1).astype(np.int64)
    return CellClasses(tuple(names), tuple(counting), index, means[np.arange(len(index)), index])


def class_means(
    labels: Labels,
    planes_khw: npt.NDArray[np.float32],
    count: int,
    *,
    of: tuple[tuple[int, int], tuple[int, int]] | None = None,
    plane_at: tuple[int, int] = (0, 0),
    labels_at: tuple[int, int] = (0, 0),
) -> Floats:
    """Mean of each of ``planes_khw`` (K, h', w') over every cell 1..``count`` of ``labels`` (h, w), float64 (count, K);
    see the module.

    Sums are taken in pixel order, so they depend on the image alone. ``of``: if labels and planes are parts of an
    image, the sizes of its planes and its labels; ``plane_at``, ``labels_at``: where the parts lie (y, x).
    """
    plane_hw, labels_hw = (planes_khw.shape[1:], labels.shape) if of is None else of
    under = [_under_centres(n, n_of) - at for n, n_of, at in zip(plane_hw, labels_hw, labels_at, strict=True)]
    # Planes may show more than the labels do, and the other way round.
    y, x = (
        np.flatnonzero((index[start : start + n] >= 0) & (index[start : start + n] < n_labels))
        for index, start, n, n_labels in zip(under, plane_at, planes_khw.shape[1:], labels.shape, strict=True)
    )
    rows, columns = under[0][plane_at[0] + y], under[1][plane_at[1] + x]
    across = slice(int(x[0]), int(x[-1]) + 1) if len(x) else slice(0)
    pixels = np.zeros(count, np.int64)
    sums = np.zeros((len(planes_khw), count), np.float64)
    for band in bands((len(y), len(x))):
        number = labels[rows[band]][:, columns].reshape(-1)
        inside = np.flatnonzero(number)
        if not len(inside):
            continue
        at = number[inside] - 1
        first = int(at.min())  # a band holds few labels, with nearby numbers
        at -= first
        found = np.bincount(at)
        here = slice(first, first + len(found))
        pixels[here] += found
        for total, plane in zip(sums, planes_khw, strict=True):
            total[here] += np.bincount(at, weights=plane[y[band], across].reshape(-1)[inside])
    missed = np.flatnonzero(pixels == 0)
    if len(missed):
        at_y, at_x = (
            np.clip((middle + 0.5) * (n / n_of), 0, n - 1).astype(np.int64) - start
            for middle, n, n_of, start in zip(
                centroids(labels, missed + 1, top_left=labels_at), plane_hw, labels_hw, plane_at, strict=True
            )
        )
        sums[:, missed] = planes_khw[:, at_y, at_x]
        pixels[missed] = 1
    return np.asarray((sums / pixels).T)


def _under_centres(n: int, n_of: int) -> Ints:
    """Index, among ``n_of`` pixels, of the one under the centre of each of ``n`` over the same length, int64 (n,)."""
    return (2 * np.arange(n, dtype=np.int64) + 1) * n_of // (2 * n)
