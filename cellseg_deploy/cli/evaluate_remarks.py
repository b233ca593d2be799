"""Remarks of an evaluation on its images, by kind as in ``cellseg-infer``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cellseg_deploy.cells.notes import kind_of
from cellseg_deploy.cli import console


class Remarks:
    """Remarks on images; threads may add them in any order."""

    def __init__(self) -> None:
        self._of_image = dict[str, tuple[str, ...]]()

    def add(self, image: str, notes: Iterable[str]) -> None:
        """Keep the warnings among ``notes``."""
        self._of_image[image] = tuple(note for note in notes if kind_of(note) != "conversion")

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Kind of warning -> number of images with it, and the first by name with its text; as in ``run.json``."""
        found = dict[str, dict[str, Any]]()
        for image, notes in sorted(self._of_image.items()):
            for kind, note in {kind_of(note): note for note in reversed(notes)}.items():
                one = found.setdefault(kind, {"images": 0, "first": {"image": image, "warning": str(note)}})
                one["images"] += 1
        return found

    def say(self) -> None:
        """Print a line per kind on stderr."""
        for kind, found in self.by_kind().items():
            images, first = found["images"], found["first"]
            console.say(
                f"warning: {kind}, {images} image{'s' if images > 1 else ''}: {console.printable(first['image'])}: "
                f"{console.printable(first['warning'])}"
            )
