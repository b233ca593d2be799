"""The output folder of a run: create it, lock it, and never take over a folder that is not ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, make_folder, remove
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.outputs.formats import CELLS_CSV, FORMATS, IMAGES_CSV, SUMMARY_CSV, Format
from cellseg_deploy.report.multiqc import GROUPS_MQC, IMAGES_MQC
from cellseg_deploy.report.page import REPORT_HTML
from cellseg_deploy.run.journal import JOURNAL, is_inside

RUN_JSON = "run.json"
PROGRAM = "cellseg-infer"
TABLES = (CELLS_CSV, IMAGES_CSV)
ALWAYS = (*TABLES, SUMMARY_CSV, REPORT_HTML, IMAGES_MQC, GROUPS_MQC)
"""Files of the whole run that it writes whatever it saves; the last three unless the report is not wanted."""

_log = logging.getLogger(__name__)


@contextmanager
def held_folder(out: Path) -> Iterator[None]:
    """Create ``out`` if missing, and hold its lock for this process.

    Raises ``OutputInUseError`` if another run writes there, ``OutputError`` if ``out`` cannot be written.
    """
    make_folder(out)
    with exclusive(out):
        yield


def tells_of(record: Path, totals: Mapping[str, int] | None, shard: Mapping[str, Any] | None) -> bool:
    """Whether ``record``, a run.json, describes a finished run of ``shard`` (see ``shard.record_of``) with these
    ``totals``; None: with any totals."""
    content = content_of(record)
    is_of = content.get("status") == "finished" and totals in (None, content.get("totals"))
    return is_of and {**content.get("shard", {}), **(shard or {})} == content.get("shard", {})


def is_running(record: Path) -> bool:
    """Whether ``record``, a run.json, describes a run that is under way or whose process was killed."""
    return content_of(record).get("status") == "running"


def make_place(out: Path, relative: str) -> Path:
    """Return the path of the output file ``relative`` (posix) in ``out``, after creating its folders.

    Raises ``OutputError`` if the file would lie outside ``out``: because of its name, or of a folder that is a link.
    """
    if not is_inside(relative):
        raise OutputError(f"{relative!r}: would be outside the output folder {out}; expected a path within it")
    path = out / relative
    for parent in path.relative_to(out).parents:
        if parent != Path() and (out / parent).is_symlink():
            raise OutputError(
                f"{out / parent}: a link that leads outside the output folder; remove it or choose another folder"
            )
    make_folder(path.parent)
    return path


def places(formats: Iterable[Format], output_names: Iterable[str]) -> set[str]:
    """Return the paths (posix) in the output folder of the files named ``output_names`` in ``formats``."""
    names = list(output_names)
    return {format.place(name) for format in formats if format.folder for name in names}


def is_temporary(name: str) -> bool:
    """Whether ``name`` is that of an unfinished file."""
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def sweep(out: Path, keep: Collection[str], ours: Collection[str] = ()) -> list[str]:
    """Remove from ``out`` the files in ``ours`` but not in ``keep``, and temporary files; log and return their names.

    Both are paths relative to ``out`` (posix). ``ours`` includes orphaned files, written but not recorded by a killed
    run, which would otherwise look like results. Everything else stays, whatever its name: it may be somebody's work.
    Raises ``OutputError`` before anything is removed if a folder of ours is a link: its target is not ours.
    """
    doomed = set(ours) - set(keep)
    found = [path.relative_to(out).as_posix() for path in _files(out)]
    removed = [name for name in found if name in doomed or is_temporary(name.rpartition("/")[2])]
    for name in removed:
        remove(out / name)
        _log.info("%s: removed (left by an earlier run)", out / name)
    return removed


def remove_earlier_run(out: Path, formats: Sequence[Format], output_names: Collection[str]) -> None:
    """Remove a run that saved files named ``output_names`` in ``formats``, and nothing else.

    Folders that become empty are removed too. Raises ``OutputError``, also for a folder that is a link.
    """
    removed = sweep(out, (), places(formats, output_names))
    folders = {parent for name in removed for parent in PurePosixPath(name).parents} - {PurePosixPath()}
    for folder in sorted(folders, reverse=True):  # subfolders first
        _remove_if_empty(out / folder)
    run_files = [format.run_file for format in formats if format.run_file]
    for name in (*ALWAYS, *run_files, RUN_JSON, JOURNAL):  # last: they mark the folder as ours
        if os.path.lexists(out / name):
            remove(out / name)
            _log.info("%s: removed (left by an earlier run)", out / name)


def check_no_links(out: Path) -> None:
    """Raise ``OutputError`` if a folder of results in ``out`` is a link, as a run there would."""
    for _ in _files(out):
        pass


def _remove_if_empty(path: Path) -> None:
    try:
        if not any(path.iterdir()):
            path.rmdir()
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed ({error.strerror}); check permissions") from error


def _files(out: Path) -> Iterator[Path]:
    """Yield the files in ``out`` itself and, at any depth, in the folders of the formats."""
    yield from (path for path in sorted(out.iterdir()) if path.is_symlink() or path.is_file())
    for folder in sorted({format.folder for format in FORMATS if format.folder}):
        if (out / folder).is_symlink():
            raise OutputError(
                f"{out / folder}: a link that leads outside the output folder; remove it or choose another folder"
            )
        for place, folders, files in os.walk(out / folder):
            linked = [name for name in folders if Path(place, name).is_symlink()]
            if linked:
                raise OutputError(f"{Path(place, linked[0])}: a link that leads outside the output folder; remove it")
            yield from (Path(place, name) for name in sorted(files))
