"""Keep an output folder apart from the inputs and from what other programs and people keep there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cellseg_deploy.errors import UsageError
from cellseg_deploy.files import urls
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX


def check_apart(inputs: Sequence[Path], out: Path) -> None:
    """Raise ``UsageError`` if ``out`` and an input (file or folder) contain each other.

    Otherwise the outputs of one run would be the input of the next, and replacing outputs could remove the input.
    """
    folder = Path(os.path.realpath(out))
    for path in inputs:
        if urls.is_url(path):
            continue
        # Not Path's methods: they raise for a path that cannot be inspected, which is one image's problem.
        is_folder = os.path.isdir(path)  # noqa: PTH112
        place = Path(os.path.realpath(path if is_folder else path.parent))
        if place.is_relative_to(folder) or (is_folder and folder.is_relative_to(place)):
            raise UsageError(
                f"the output folder {out} and the input {path} must not contain each other; choose a separate "
                "output folder"
            )


def foreign_names(names: Iterable[str]) -> list[str]:
    """Return those ``names``, sorted, that are neither our lock nor temporary files or folders of a killed run."""
    return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))
