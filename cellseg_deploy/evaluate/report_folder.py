"""Report folders: files with fixed names, including a record that names the program. Other files are left alone.

A report is made in a workspace within its folder and then moved out of it, its record last. An evaluation that fails or
is killed before the move leaves the earlier report unchanged; one that is killed during the move leaves a record that
says ``"complete": false``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cellseg_deploy.errors import OutputError
from cellseg_deploy.evaluate import contact_sheet
from cellseg_deploy.files import atomic
from cellseg_deploy.files.json_record import was_written_by
from cellseg_deploy.files.lock import LOCK_NAME, exclusive
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.files.workspace import workspace


@contextmanager
def report_folder(out: Path, program: str, names: Sequence[str]) -> Iterator[Path]:
    """Yield a folder to write a report into; when the block ends, its files are moved to ``out``.

    ``out`` is created, checked and held first: before hours of work, not after. ``names``: possible files of a report
    of ``program``, the record first, which the block must write. Files in ``names`` from an earlier report that are
    missing from this one are removed. Files under other names and in sub-folders are added to the existing ones.

    Raises ``OutputError`` if ``out`` cannot be written or holds a file of ``names`` not written by ``program``,
    ``OutputInUseError`` if another process writes there.
    """
    atomic.make_folder(out)
    with exclusive(out):
        atomic.remove_stale(out)
        there = [name for name in names if os.path.lexists(out / name)]
        if there and not was_written_by(program, out / names[0]):
            raise OutputError(
                f"{out / there[0]}: not written by {program}, so it is not replaced; choose another output folder"
            )
        for name in there:
            _refuse_linked_folder(out / name)
        with workspace(out) as place:
            yield place
            with deferred_signals():
                _publish(place, out, program, names)


def _publish(place: Path, out: Path, program: str, names: Sequence[str]) -> None:
    """Move the files of ``place`` to ``out``; until all are moved, the record marks the report as incomplete."""
    record = out / names[0]
    files = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file()]
    files = [file for file in files if str(file) not in (LOCK_NAME, names[0])]
    for folder in {file.parts[0] for file in files if len(file.parts) > 1}:
        _refuse_linked_folder(out / folder)
    atomic.write_bytes(record, json.dumps({"program": program, "complete": False}).encode() + b"\n")
    for name in names[1:]:
        if name == contact_sheet.FOLDER:
            contact_sheet.remove_earlier(out)
        elif Path(name) not in files:
            atomic.remove(out / name)
    for file in files:
        atomic.make_folder((out / file).parent)
        atomic.move(place / file, out / file)
    atomic.move(place / names[0], record)


def _refuse_linked_folder(path: Path) -> None:
    if path.is_symlink() and path.is_dir():
        raise OutputError(f"{path}: a link that leads outside the output folder; remove it or choose another folder")
