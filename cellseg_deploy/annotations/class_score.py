"""Scores per class, of cells that the model classifies against marks with classes: is a red cell found as a red cell?

``--classes red=RBC,white=WBC`` maps the model's classes to the names in the file of marks. Equal names may be omitted;
one class of the model may stand for several of the file (``red=ring,red=trophozoite``).

Each class is scored as in ``score``: the cells that the model assigns to the class against the marks of that class. So
a cell found but assigned to another class is a false negative in its own class and a false positive in the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cellseg_deploy.annotations.objects import Boxes, Points
from cellseg_deploy.annotations.score import Bools, MarkScore, pool_marks, score_marks
from cellseg_deploy.cells.classes import CellClasses, labels_where
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.errors import UsageError

_FIGURES = ("f1", "precision", "recall", "count_bias", "n_true", "n_predicted")


def names_in_file(asked: Sequence[str]) -> tuple[str, ...]:
    """Names in the file of marks of the requested classes ``asked``."""
    return tuple(name.partition("=")[2].strip() or name for name in asked)


def class_pairs(asked: Sequence[str], of_model: Sequence[str], of_marks: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Map each class of the model, in the model's order, to its names in the marks: by the pairs ``asked`` for, or if
    there are none, the names that model and marks have in common.

    Raises ``UsageError`` for a pair whose first name the model does not know.
    """
    said = [_pair(name) for name in asked or of_marks]
    if unknown := [one for one, other in said if one != other and one not in of_model]:
        known = ", ".join(of_model) or "none"
        raise UsageError(f"the model has no class {', '.join(unknown)}; it has {known}")
    pairs = {name: tuple(other for one, other in said if one == name) for name in of_model}
    return {name: called for name, called in pairs.items() if called}


def _pair(name: str) -> tuple[str, str]:
    first, is_pair, second = name.partition("=")
    return (first.strip(), second.strip()) if is_pair and second.strip() else (name, name)


def score_classes(
    true: Boxes | Points,
    labels: Labels,
    classes: CellClasses,
    pairs: Mapping[str, tuple[str, ...]],
    *,
    min_area_px: int = 0,
    unmarked_hw: Bools | None = None,
) -> dict[str, MarkScore]:
    """Score each class of ``pairs`` in one image. ``labels`` (h, w): 1..n; ``classes``: of these cells.

    ``unmarked_hw``: see ``score_marks``.
    """
    return {
        name: score_marks(
            _of_class(true, called),
            labels_where(labels, classes.index == classes.names.index(name)),
            min_area_px=min_area_px,
            unmarked_hw=unmarked_hw,
        )
        for name, called in pairs.items()
    }


def pool_classes(
    scores: Sequence[Mapping[str, MarkScore]], pairs: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Any]]:
    """Metrics of each class over images: ``f1``, ``precision``, ``recall``, ``count_bias``, ``n_true``,
    ``n_predicted``, and its names in the marks (``marked``)."""
    found = {}
    for name, called in pairs.items():
        pooled = pool_marks([score[name] for score in scores])
        found[name] = {"marked": list(called), **{figure: pooled[figure] for figure in _FIGURES}}
    return found


def _of_class(true: Boxes | Points, called: tuple[str, ...]) -> Boxes | Points:
    which = np.array([each in called for each in true.classes], np.bool_)
    names = tuple(each for each in true.classes if each in called)
    return Boxes(true.boxes_xyxy[which], names) if isinstance(true, Boxes) else Points(true.points_xy[which], names)
