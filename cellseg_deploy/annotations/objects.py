"""Marks of one image and of a set of images. Coordinates in px of the upright image; pixel (0, 0) spans 0 to 1, so a
box over the whole image is (0, 0, width, height)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import UsageError

Floats = npt.NDArray[np.float64]
Kind = Literal["boxes", "points"]


@dataclass(frozen=True)
class Boxes:
    """``boxes_xyxy``: float64 (n, 4), left, top, right, bottom. ``classes``: n names, "" for boxes without a class."""

    boxes_xyxy: Floats
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.boxes_xyxy, 4, self.classes)

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.classes)


@dataclass(frozen=True)
class Points:
    """``points_xy``: float64 (n, 2). ``classes``: n names, "" for points without a class."""

    points_xy: Floats
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.points_xy, 2, self.classes)

    def __len__(self) -> int:
        """Number of points."""
        return len(self.classes)


@dataclass(frozen=True)
class Annotations:
    """``by_image``: marks by image name as passed by the caller; images that the file does not name are omitted.
    ``remarks``: what was left out or changed in reading, one sentence each."""

    kind: Kind
    by_image: dict[str, Boxes | Points]
    remarks: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes that occur, sorted."""
        return tuple(sorted({name for marked in self.by_image.values() for name in marked.classes if name}))

    def __str__(self) -> str:
        """Summary such as ``24 images, 1,114 boxes (RBC 1,000, WBC 114)``."""
        classes = Counter(name for marked in self.by_image.values() for name in marked.classes)
        total = classes.total()
        what = {"boxes": "box", "points": "point"}[self.kind] if total == 1 else self.kind
        named = sorted(((n, name) for name, n in classes.items() if name), key=lambda item: (-item[0], item[1]))
        by_class = ", ".join(f"{name} {n:,}" for n, name in named)
        images = len(self.by_image)
        return f"{images:,} image{'s' * (images != 1)}, {total:,} {what}" + (f" ({by_class})" if by_class else "")


def check_classes(annotations: Annotations, wanted: Sequence[str]) -> None:
    """Raise ``UsageError`` for a class of ``wanted`` that no object has."""
    there = annotations.class_names
    unknown = [name for name in wanted if name not in there]
    if unknown:
        known = ", ".join(there) or "none: the file names no classes"
        raise UsageError(f"no {annotations.kind} of class {', '.join(unknown)}; the file has {known}")


def _check(coordinates: Floats, columns: int, classes: tuple[str, ...]) -> None:
    if coordinates.shape != (len(classes), columns) or coordinates.dtype != np.float64:
        raise UsageError(
            f"expected float64 ({len(classes)}, {columns}) for {len(classes)} classes, got {coordinates.dtype} "
            f"{coordinates.shape}"
        )
