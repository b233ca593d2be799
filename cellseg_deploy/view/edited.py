"""The edits of one image: its labels, classes and confirmation after them, with undo and redo.

An edit is a JSON object with ``op``:

    {"op": "delete", "cells": [3, 7]}                       {"op": "merge", "cells": [3, 7]}
    {"op": "split", "cell": 3, "line": [[x, y], ...]}       {"op": "draw", "outline": [[x, y], ...], "class": "red"}
    {"op": "class", "cells": [3], "class": "white"}         {"op": "relabel", "labels": ".base/a.tif", "sha256": "..."}

The same edits from the same labels give the same state, numbers of new cells included, so the journal needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellseg_deploy.cells import edits
from cellseg_deploy.cells.edits import Patch
from cellseg_deploy.cells.label_runs import Labels
from cellseg_deploy.errors import UsageError

BY_HAND = 1.0
"""Probability of a class that a person chose."""
_MOST_POINTS = 20_000

Classes = dict[int, tuple[str, float]]
Edit = Mapping[str, Any]
ReadLabels = Callable[[Edit], tuple[Labels, Classes]]
"""Labels, with numbers 1..n, and classes that a ``relabel`` names."""


@dataclass(frozen=True)
class Step:
    """An edit that was made: what it changed, and the classes by number before and after."""

    edit: Edit
    patch: Patch | None
    classes_before: Classes
    classes_after: Classes

    @property
    def numbers(self) -> list[int]:
        """Numbers of the cells that it changed."""
        return [] if self.patch is None else self.patch.numbers


@dataclass
class EditedImage:
    """``labels`` (h, w): numbers may have gaps. ``classes``: by number. ``done``, ``undone``: steps, the last one last.

    ``class_names``: names that a cell may get. ``read_labels``: for ``relabel``.
    """

    labels: Labels
    classes: Classes
    class_names: Sequence[str]
    read_labels: ReadLabels
    confirmed: bool = False
    done: list[Step] = field(default_factory=list)
    undone: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next = int(self.labels.max(initial=0)) + 1

    def plan(self, edit: Edit) -> Step:
        """Return what ``edit`` changes, without changing it. Raises ``UsageError`` if it cannot be made."""
        patch, classes = self._planned(edit)
        return Step(edit, patch, self.classes, classes)

    def apply(self, step: Step) -> Step:
        """Make the edit of ``step``, which was planned in this state; return it."""
        if step.patch is not None:
            step.patch.apply(self.labels)
            self._next = max(self._next, int(step.patch.after.max(initial=0)) + 1)
        self.classes = step.classes_after
        self.done.append(step)
        self.undone.clear()
        return step

    def undo(self) -> Step:
        """Undo the last edit. Raises ``UsageError`` if there is none."""
        if not self.done:
            raise UsageError("there is nothing to undo")
        step = self.done.pop()
        if step.patch is not None:
            step.patch.revert(self.labels)
        self.classes = step.classes_before
        self.undone.append(step)
        return step

    def redo(self) -> Step:
        """Make the edit again that was undone last. Raises ``UsageError`` if there is none."""
        if not self.undone:
            raise UsageError("there is nothing to redo")
        step = self.undone.pop()
        if step.patch is not None:
            step.patch.apply(self.labels)
        self.classes = step.classes_after
        self.done.append(step)
        return step

    def _planned(self, edit: Edit) -> tuple[Patch | None, Classes]:
        """Return the change of labels and the classes after ``edit``."""
        kept = dict(self.classes)
        match edit:
            case {"op": "delete", "cells": [*cells]}:
                patch = edits.delete(self.labels, _numbers(cells))
                return patch, {number: kept[number] for number in kept if number not in cells}
            case {"op": "merge", "cells": [*cells]}:
                patch = edits.merge(self.labels, _numbers(cells))
                stays = set(np.unique(patch.after).tolist())
                return patch, {number: kept[number] for number in kept if number not in cells or number in stays}
            case {"op": "split", "cell": cell, "line": [*line]} if len(line) <= _MOST_POINTS:
                (number,) = _numbers([cell])
                patch = edits.split(self.labels, number, line, self._next)
                if number in kept:
                    kept |= {new: kept[number] for new in patch.numbers if new >= self._next}
                return patch, kept
            case {"op": "draw", "outline": [*outline]} if len(outline) <= _MOST_POINTS:
                patch = edits.draw(self.labels, outline, self._next)
                if edit.get("class"):
                    kept[self._next] = (self._class(edit["class"]), BY_HAND)
                return patch, kept
            case {"op": "class", "cells": [*cells], "class": str(name)}:
                numbers = _numbers(cells)
                edits.delete(self.labels, numbers)  # raises for a cell that is not there
                return None, kept | dict.fromkeys(numbers, (self._class(name), BY_HAND))
            case {"op": "relabel", "labels": str(), "sha256": str()}:
                labels, classes = self.read_labels(edit)
                new = np.where(labels > 0, labels + (self._next - 1), 0).astype(np.int32)
                patch = edits.replace_all(self.labels, new)
                return patch, {number + self._next - 1: said for number, said in classes.items()}
        raise UsageError("an edit must be delete, merge, split, draw or class, with its fields; see docs/view.md")

    def _class(self, name: object) -> str:
        if name not in self.class_names:
            raise UsageError(f"there is no class {name!r}; expected {', '.join(self.class_names) or 'none'}")
        return str(name)


def _numbers(cells: Sequence[object]) -> list[int]:
    wrong = [cell for cell in cells if not isinstance(cell, int) or isinstance(cell, bool) or cell < 1]
    if wrong or not cells:
        raise UsageError(f"cells must be numbers of cells, got {wrong or 'none'}")
    return [int(str(cell)) for cell in cells]
