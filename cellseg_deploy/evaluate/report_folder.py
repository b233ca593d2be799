"""The folder of a report: files of fixed names, the last of which says who wrote them; other files are left alone.

A report is whole once its record, a JSON file, is there. Parts without it are of an evaluation that failed or was
stopped: they are removed when that happens, and if it was killed, by the next one, which finds in the lock that it left
what had been begun. So parts that no lock speaks of are somebody else's.
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
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.files.workspace import remove_abandoned


@contextmanager
def report_folder(out: Path, program: str, names: Sequence[str]) -> Iterator[None]:
    """``out`` existing, writable and held by this process: found out before hours of work, not after.

    ``names``: what ``program`` is about to write there, first the record. Parts of a report that has no record are gone
    if the block raises. Raises ``OutputError`` if the folder cannot be written or holds such files that ``program`` did
    not write, ``OutputInUseError`` if another process writes there.
    """
    atomic.make_folder(out)
    with exclusive(out) as held:
        atomic.remove_stale(out)
        remove_abandoned(out)
        _remove_parts(out, program, _begun(held.left_behind, program))
        there = [name for name in names if os.path.lexists(out / name)]
        if there and not was_written_by(program, out / names[0]):
            raise OutputError(
                f"{out / there[0]}: not written by {program}, so it is not replaced; choose another output folder"
            )
        held.note(json.dumps({"program": program, "writes": list(names)}).encode())
        try:
            yield
        except BaseException:
            _remove_parts(out, program, names)
            raise


def _begun(note: bytes, program: str) -> list[str]:
    """Names that a killed run of ``program`` was writing, record first; none if the note is not of one."""
    try:
        content = json.loads(note)
    except ValueError:
        return []
    if (
        not isinstance(content, dict)
        or content.get("program") != program
        or not isinstance(content.get("writes"), list)
    ):
        return []
    # Names in this folder and nothing else, whatever a file that calls itself our lock may say.
    return [name for name in content["writes"] if isinstance(name, str) and Path(name).name == name]


def _remove_parts(out: Path, program: str, names: Sequence[str]) -> None:
    """Remove those of ``names`` that lie in ``out``, unless they belong to a whole report."""
    if not names or was_written_by(program, out / names[0]):
        return
    for name in names:
        path = out / name
        with atomic.writing(path):
            if name == contact_sheet.FOLDER and path.is_dir() and not path.is_symlink():
                contact_sheet.remove_earlier(out)
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.is_file() or path.is_symlink():
                path.unlink()
