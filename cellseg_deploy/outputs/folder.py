"""The output folder of a run: made, locked, and never taken from somebody else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.outputs.atomic import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, make_folder, remove_stale
from cellseg_deploy.outputs.lock import LOCK_NAME, exclusive
from cellseg_deploy.outputs.per_image import OUTPUTS
from cellseg_deploy.outputs.workspace import remove_abandoned

RUN_JSON = "run.json"
PROGRAM = "cellseg-infer"
_TABLES = ("cells.csv", "images.csv", RUN_JSON)  # run.json last: without it the rest is not recognised as ours


@contextmanager
def output_folder(out: Path, *, overwrite: bool) -> Iterator[None]:
    """``out`` existing, empty and held by this process alone.

    With ``overwrite`` the files of an earlier run are removed first: tables, outputs of images, and nothing else.
    Raises ``OutputInUseError`` if another run writes there, ``OutputError`` if it holds other things.
    """
    make_folder(out)
    with exclusive(out):
        _make_room(out, overwrite)
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
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("program") == program


def _make_room(out: Path, overwrite: bool) -> None:
    remove_stale(out)  # a run that was killed before it could write anything leaves nothing else
    remove_abandoned(out)
    there = sorted(path.name for path in out.iterdir() if path.name != LOCK_NAME)
    if not there:
        return
    if not was_written_by(PROGRAM, out / RUN_JSON):
        raise OutputError(
            f"{out}: the folder is not empty (it holds {_some(there)}) and no earlier run of {PROGRAM} made it; "
            "choose an empty or new folder"
        )
    if not overwrite:
        raise OutputError(
            f"{out}: holds the results of an earlier run; choose another folder, or replace them with --overwrite"
        )
    try:
        _remove_earlier_run(out)
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed ({error.strerror}); check permissions") from error


def _remove_earlier_run(out: Path) -> None:
    for output in OUTPUTS:
        folder = out / output.folder
        if folder.is_symlink():
            raise OutputError(f"{folder}: a link out of the output folder; remove it or choose another output folder")
        for path, _, files in os.walk(folder, topdown=False):  # links to folders are not entered
            for file in files:
                if file.endswith(output.suffix) or _is_temporary(file):
                    Path(path, file).unlink()
            if not any(Path(path).iterdir()):
                Path(path).rmdir()
    for name in _TABLES:
        (out / name).unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
