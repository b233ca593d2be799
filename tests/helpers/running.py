"""``cellseg-infer`` called as on a command line, and what it leaves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from cellseg_deploy.cli import console
from cellseg_deploy.cli.infer import command


def infer(*arguments: object) -> int:
    """Exit code of ``cellseg-infer`` with these arguments."""
    return console.run(command, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> list[str]:
    """Everything under ``folder`` that is no folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def results(out: Path) -> dict[str, bytes]:
    """Content of every file but run.json and the journal, which hold times."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in ("run.json", "journal.jsonl")
    }


def save(path: Path, image_hwc: np.ndarray) -> None:
    """An image file of ``image_hwc`` (h, w, 3), with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_hwc).save(path)
