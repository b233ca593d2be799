"""Resuming a run: what an output folder holds, which images are done, and what to remove before writing to it.

Only ``begin`` removes anything. The caller holds the folder's lock for as long as the answers matter.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.apart import foreign_names
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.files.json_record import was_written_by
from cellseg_deploy.files.workspace import remove_abandoned
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import FORMATS
from cellseg_deploy.outputs.readable import is_readable
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.journal import JOURNAL, Entry, ImageRecord, JournalContent, OutputFile, UnreadableJournalError
from cellseg_deploy.run.output_folder import PROGRAM, RUN_JSON, remove_earlier_run
from cellseg_deploy.run.state import RunState

_log = logging.getLogger(__name__)

FolderKind = Literal["fresh", "resume", "different", "foreign"]


@dataclass(frozen=True)
class FolderState:
    """State of an output folder.

    ``fresh``: empty, or only leftovers of a killed start (our lock, temporary files). ``resume``: a run of ours that
    can be resumed; ``journal`` is set. ``different``: a run of ours, but with other settings or without a readable
    journal; ``reasons`` lists them. ``foreign``: other files, some of which are named in ``reasons``.
    """

    kind: FolderKind
    reasons: tuple[str, ...] = ()
    journal: JournalContent | None = None


def look_at(out: Path) -> FolderState:
    """Return the state of ``out`` regardless of the run requested: any readable journal of ours can be resumed.

    A resumed run can thus keep the recorded backend. Raises ``OutputError`` if the folder cannot be listed.
    """
    try:
        names = [path.name for path in out.iterdir()] if out.exists() else []
    except OSError as error:
        raise OutputError(f"{out}: cannot be listed ({error.strerror}); choose another folder") from error
    strangers = foreign_names(names)
    if JOURNAL not in names:
        if not strangers:
            return FolderState("fresh")
        if was_written_by(PROGRAM, out / RUN_JSON):
            return FolderState("different", ("it was made without a journal",))
        return FolderState("foreign", tuple(strangers))
    if not stat.S_ISREG((out / JOURNAL).lstat().st_mode):
        return FolderState("foreign", (f"{JOURNAL}, which is not a file",))
    try:
        content = journals.read(out / JOURNAL)
    except UnreadableJournalError as error:
        if was_written_by(PROGRAM, out / RUN_JSON):
            return FolderState("different", (str(error),))
        return FolderState("foreign", (str(error),))
    if not content.identity.program.startswith(f"{PROGRAM} "):
        return FolderState("foreign", (f"a run of {content.identity.program}",))
    return FolderState("resume", journal=content)


def classify(out: Path, asked: RunIdentity) -> FolderState:
    """Like ``look_at``, but a run whose identity is not ``asked`` is ``different``, with the differences as reasons."""
    state = look_at(out)
    if state.journal is None:
        return state
    reasons = differences(state.journal.identity, asked)
    return FolderState("different", tuple(reasons), state.journal) if reasons else state


def check_usable(state: FolderState, out: Path) -> None:
    """Raise ``OutputError`` unless a run may begin or be resumed in ``out``."""
    if state.kind == "foreign":
        raise OutputError(
            f"{out}: the folder is not empty (it holds {some(state.reasons)}) and no earlier run of {PROGRAM} made it; "
            "choose an empty or new folder"
        )
    if state.kind == "different":
        raise OutputError(
            f"{out}: contains a different run and cannot be resumed: {'; '.join(state.reasons)}. "
            "Use the same settings, choose another folder, or start over with `overwrite=True`"
        )


def begin(out: Path, asked: RunIdentity, *, overwrite: bool) -> FolderState:
    """Prepare ``out`` for the requested run ``asked``: afterwards ``out`` is ``fresh`` or ``resume``.

    ``overwrite``: first remove an earlier run of ours, that is its tables and the outputs its journal names, and
    nothing else. Raises ``OutputError`` if ``out`` cannot be used.
    """
    remove_abandoned(out)
    state = classify(out, asked)
    if state.kind == "foreign" or not overwrite:
        check_usable(state, out)
        if state.journal is not None and state.journal.damaged:
            lines = some([str(number) for number in state.journal.damaged])
            _log.warning("%s: damaged in line %s; their images will be done again", state.journal.path, lines)
        return state
    saved, names = tuple[str, ...](), set[str]()
    if state.journal is not None:
        saved = state.journal.identity.saved
        names = set(RunState.of(state.journal).output_names.values())
    elif state.kind == "different":
        _log.warning(
            "%s: %s, so files of the earlier run cannot be identified and are left in place",
            out,
            "; ".join(state.reasons),
        )
    remove_earlier_run(out, [format for format in FORMATS if format.name in saved], names)
    return FolderState("fresh")


@dataclass(frozen=True)
class Decision:
    """``skip``: the image is already done; ``work``: it is to be done, for ``reason``.

    A finished image that can no longer be read is skipped, with a ``reason``: its earlier count still holds.
    ``edited``: its files that somebody edited since (see ``check_files``). They are kept in place unless the image
    itself ``is_changed``: then its new files need their names.
    """

    action: Literal["work", "skip"]
    reason: str = ""
    edited: tuple[str, ...] = ()
    is_changed: bool = False


def decide(image: FoundImage, entry: Entry | None, out: Path) -> Decision:
    """Decide whether ``image`` can be skipped: its bytes are unchanged, and its files are present and intact.

    Files are compared by size and SHA-256 (about a second per gigabyte), never by time stamp. An output file that is
    readable but differs was edited; it does not cause its image to be done again.
    """
    if entry is None:
        return Decision("work", "not done yet")
    record = entry.record
    if record.status != "done" or record.input is None:
        return Decision("work", "failed before")
    unreadable = image.problem
    is_changed = False
    try:
        is_changed = not unreadable and not record.input.is_of(image.path)
    except OSError as error:
        unreadable = f"cannot be read now ({error.strerror or error})"
    problem, edited = check_files(record, out)
    if is_changed:
        return Decision("work", "the image was changed", edited, is_changed=True)
    return Decision("work" if problem else "skip", problem or unreadable, edited)


def check_files(record: ImageRecord, out: Path) -> tuple[str, tuple[str, ...]]:
    """Return the problem of the first file of ``record`` that must be made again ("" if none), and the edited files.

    A file is edited if it differs from the one that was written but is readable. A file that is missing, empty,
    unreadable or behind a link must be made again.
    """
    problem, edited = "", list[str]()
    for file in record.outputs:
        if (changed := _changed(out, file)) is None:
            edited.append(file.path)
        elif changed and not problem:
            problem = f"its file {file.path} {changed}"
    return problem, tuple(edited)


def some(names: Collection[str]) -> str:
    """Return the first three of ``names``, and the number of the others."""
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _changed(out: Path, file: OutputFile) -> str | None:
    """Return the problem with a recorded file, "" if there is none, None if the file was edited."""
    path = out / file.path
    if any((out / parent).is_symlink() for parent in Path(file.path).parents) or path.is_symlink():
        return "is behind a link"
    try:
        if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            return None if is_readable(path) else "is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return ""
