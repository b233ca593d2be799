"""``cellseg-infer`` called as on a command line, and what it leaves."""

from __future__ import annotations

import csv
from pathlib import Path

from cellseg_deploy.cli import _common
from cellseg_deploy.cli.infer import command


def infer(*arguments: object) -> int:
    """Exit code of ``cellseg-infer`` with these arguments."""
    return _common.run(command, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> list[str]:
    """Everything under ``folder`` that is no folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
