"""Specks: objects of a truth that are far smaller than its median object, whatever the magnification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.cells.metrics import MIN_AREA_PX
from cellseg_deploy.images.find import Pair
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.images.read import read_labels
from cellseg_deploy.models.spec import MIN_OBJECT_REL, ModelSpec

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class SpeckLimit:
    """``px``: objects below it are specks. ``share``: of the truth's median area, None without objects.

    ``dropped`` of ``total`` true objects are specks.
    """

    px: int
    share: float | None
    dropped: int
    total: int

    @property
    def words(self) -> str:
        """Describe the limit in one line."""
        share = "" if self.share is None else f" ({self.share:.2%} of the median object)"
        return f"objects under {self.px} px{share} are specks: {self.dropped} of {self.total} in the masks dropped"


def object_areas(pairs: Sequence[Pair], foreground: MaskForeground) -> npt.NDArray[np.int64]:
    """Return areas in px of all objects in the masks of ``pairs``, int64 (n,). Raises ``DataError`` for a bad mask."""
    return areas_of(read_labels(pair.mask, foreground=foreground) for pair in pairs)


def areas_of(label_images: Iterable[Labels]) -> npt.NDArray[np.int64]:
    """Return areas in px of all objects in ``label_images``, each (h, w), int64 (n,)."""
    areas = [np.bincount(labels.ravel())[1:] for labels in label_images]
    areas = [area[area > 0] for area in areas]
    return np.concatenate(areas).astype(np.int64) if areas else np.zeros(0, np.int64)


def speck_px(label_images: Iterable[Labels], spec: ModelSpec) -> int:
    """Return the limit in px for a model with ``spec``, by the true ``label_images``."""
    share = MIN_OBJECT_REL if spec.min_object_rel is None else spec.min_object_rel
    return speck_limit(areas_of(label_images), share=share).px


def speck_limit(areas: npt.NDArray[np.int64], *, share: float, given_px: int | None = None) -> SpeckLimit:
    """Return the limit for objects of these ``areas`` (n,) in px: ``given_px``, or else ``share`` of their median.

    The median excludes specks, so that crumbs in a mask do not move it.
    """
    if not len(areas):
        return SpeckLimit(MIN_AREA_PX if given_px is None else given_px, None, 0, 0)
    px = given_px
    median = float(np.median(areas))
    if px is None:
        px = round(share * median)
        while (raised := round(share * (median := float(np.median(areas[areas >= px]))))) > px:
            px = raised
    elif (areas >= px).any():
        median = float(np.median(areas[areas >= px]))
    return SpeckLimit(px, round(px / median, 5), int((areas < px).sum()), len(areas))
