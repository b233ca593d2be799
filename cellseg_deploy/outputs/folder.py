"""The output folder of a run: made, locked, and never taken from somebody else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.outputs.atomic import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, make_folder, remove_stale
from cellseg_deploy.outputs.formats import CELLS_CSV, FORMATS, IMAGES_CSV
from cellseg_deploy.outputs.journal import JOURNAL
from cellseg_deploy.outputs.lock import exclusive

RUN_JSON = "run.json"
PROGRAM = "cellseg-infer"
_RUN_FILES = (
    *(CELLS_CSV, IMAGES_CSV),
    *(format.run_file for format in FORMATS if format.run_file),
    *(RUN_JSON, JOURNAL),  # last: without one of these the rest is not recognised as ours
)


@contextmanager
def held_folder(out: Path) -> Iterator[None]:
    """``out``, made if it was not there, and held by this process alone.

    Raises ``OutputInUseError`` if another run writes there, ``OutputError`` if it cannot be written.
    """
    make_folder(out)
    with exclusive(out):
        yield


def check_apart(inputs: Sequence[Path], out: Path) -> None:
    """Raise ``UsageError`` if ``out`` and an input (file or folder) contain each other.

    The outputs of one run would be the input of the next, and replacing the outputs could remove the input.
    """
    folder = out.resolve()
    for path in inputs:
        place = path.resolve() if path.is_dir() else path.parent.resolve()
        if place.is_relative_to(folder) or (path.is_dir() and folder.is_relative_to(place)):
            raise UsageError(
                f"the output folder {out} and the input {path} lie inside each other; choose a folder beside"
            )


def was_written_by(program: str, record: Path) -> bool:
    """Whether ``record``, a JSON file, says that ``program`` wrote it; False if it is missing or something else."""
    return _content(record).get("program") == program


def tells_of(record: Path, totals: Mapping[str, int]) -> bool:
    """Whether ``record``, a run.json, tells of a run that came to its end with these ``totals``."""
    content = _content(record)
    return content.get("status") == "finished" and content.get("totals") == totals


def _content(record: Path) -> dict[str, Any]:
    """Of a JSON file; empty if it is missing or something else."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def make_place(out: Path, relative: str) -> Path:
    """The path of the output file ``relative`` (posix) in ``out``, its folders made.

    Raises ``OutputError`` if one of these folders is a link: the file would appear outside of ``out``.
    """
    path = out / relative
    for parent in path.relative_to(out).parents:
        if parent != Path() and (out / parent).is_symlink():
            raise OutputError(f"{out / parent}: a link out of the output folder; remove it or choose another folder")
    make_folder(path.parent)
    return path


def foreign_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are neither our lock nor temporary files and folders of a run that was killed, sorted."""
    return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))


def suffixes_of_folders() -> dict[str, tuple[str, ...]]:
    """Folders that hold a file an image, and how these files end."""
    folders: dict[str, tuple[str, ...]] = {}
    for format in FORMATS:
        if format.folder:
            folders[format.folder] = (*folders.get(format.folder, ()), format.suffix)
    return folders


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that was never finished."""
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def remove_earlier_run(out: Path) -> None:
    """Remove what a run writes, and nothing else. Raises ``OutputError``, also for a folder that is a link."""
    for name in suffixes_of_folders():
        if (out / name).is_symlink():
            raise OutputError(f"{out / name}: a link out of the output folder; remove it or choose another folder")
    try:
        for name, suffixes in suffixes_of_folders().items():
            for path, _, files in os.walk(out / name, topdown=False):  # links to folders are not entered
                for file in files:
                    if file.endswith(suffixes) or is_temporary(file):
                        Path(path, file).unlink()
                if not any(Path(path).iterdir()):
                    Path(path).rmdir()
        remove_stale(out)
        for name in _RUN_FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed ({error.strerror}); check permissions") from error
