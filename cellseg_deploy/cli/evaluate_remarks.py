"""Remarks of an evaluation on its images, by kind as in ``cellseg-infer``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cellseg_deploy.cells.notes import count_warnings, first_warnings
from cellseg_deploy.cli import console


class Remarks:
    """Remarks on images; threads may add them in any order."""

    def __init__(self) -> None:
        self._of_image = dict[str, dict[str, str]]()

    def add(self, image: str, notes: Iterable[str]) -> None:
        """Keep the warnings among ``notes``."""
        self._of_image[image] = first_warnings(notes)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Return ``count_warnings`` of all images, by name, as in ``run.json``."""
        return count_warnings(sorted(self._of_image.items()))

    def say(self) -> None:
        """Print one line per kind on stderr."""
        for kind, found in self.by_kind().items():
            console.say(f"warning: {console.warning_words(kind, found)}")
