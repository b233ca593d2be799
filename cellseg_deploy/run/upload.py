"""Copy the folder of a finished run to a folder in a bucket.

The run itself stays on disk, with its journal and its lock. An object appears whole or not at all, and ``run.json``
last: it is there if, and only if, everything else is. What is missing or differs is copied, by MD5, so the same command
resumes a copy that was interrupted, and no state is kept anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files import urls
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX, temporary_in
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.journal import JOURNAL, UnreadableJournalError
from cellseg_deploy.run.output_folder import RUN_JSON, held_folder
from cellseg_deploy.run.resume import some
from cellseg_deploy.run.streamed import UNFINISHED

_HEAD_BYTES = 1 << 20  # the first line of a journal is shorter

_log = logging.getLogger(__name__)


def check_url(url: Path, inputs: Iterable[Path]) -> None:
    """Raise ``UsageError`` unless ``url`` is a folder in a bucket, apart from ``inputs``."""
    if urls.scheme_of(url) != urls.SCHEME or len(url.parts) < 3:
        raise UsageError(f"`upload` must be a folder in a bucket, s3://BUCKET/FOLDER, got {urls.text_of(url)}")
    for path in inputs:
        if path.is_relative_to(url) or url.is_relative_to(path):
            raise UsageError(
                f"the folders {urls.text_of(url)} of results and {urls.text_of(path)} of images must not contain each "
                "other; choose a separate folder for `upload`"
            )


def check_writable(url: Path, asked: RunIdentity) -> None:
    """Raise ``OutputError`` unless a run ``asked`` can be copied to the folder ``url``: it can be written, and is empty
    or holds a run of the same model, engine and settings."""
    _check_ours(url, asked)
    with _writing(url):
        trial = temporary_in(url)
        urls.write(trial, b"")
        urls.remove(trial)


def _check_ours(url: Path, asked: RunIdentity) -> dict[str, str]:
    """Raise ``OutputError`` as ``check_writable`` does, or return ``urls.checksums`` of ``url``."""
    with _writing(url):
        there = urls.checksums(url)
        names = [name for name in there if not name.startswith(TEMPORARY_PREFIX)]
        if names and JOURNAL not in names:
            raise OutputError(
                f"{urls.text_of(url)}: is not empty (it holds {some(names)}) and no run of cellseg-infer; choose an "
                "empty or new folder"
            )
        if names:
            head = urls.read(url / JOURNAL, first=_HEAD_BYTES).partition(b"\n")[0]
            try:
                theirs = journals.parse(url / JOURNAL, [head + b"\n"]).identity
            except UnreadableJournalError as error:
                raise OutputError(f"{urls.text_of(url)}: its {JOURNAL} is damaged; choose another folder") from error
            if unlike := differences(replace(theirs, saved=asked.saved), asked):
                raise OutputError(
                    f"{urls.text_of(url)}: holds a different run: {'; '.join(unlike)}. Choose another folder"
                )
    return there


def upload(out: Path, url: Path) -> int:
    """Copy the run in ``out`` to ``url`` (see ``check_writable``); return the number of files that were copied.

    Hidden files and ``UNFINISHED`` are left out. Objects that are not in ``out`` stay, with a warning. Raises
    ``OutputError``, also if another run was copied to ``url`` meanwhile.
    """
    with held_folder(out), _writing(url):
        with (out / JOURNAL).open("rb") as file:
            head = file.readline()
        there = _check_ours(url, journals.parse(out / JOURNAL, [head]).identity)
        if JOURNAL not in there:
            _claim(url, head)
        files = sorted(_files(out), key=lambda name: (name != JOURNAL, name == RUN_JSON, name))
        todo = [name for name in files if name not in there or there[name] != _md5(out / name)]
        if extra := sorted(there.keys() - set(files)):
            _log.warning("%s: has files that are not in %s, and stay: %s", urls.text_of(url), out, some(extra))
        if todo and RUN_JSON in there:
            urls.remove(url / RUN_JSON)
            todo = [*(name for name in todo if name != RUN_JSON), RUN_JSON]
        for name in todo:
            urls.write(url / name, out / name)
    return len(todo)


def _claim(url: Path, head: bytes) -> None:
    """Make ``head`` the journal in ``url``: of two runs that begin to copy at the same time, one is refused."""
    try:
        urls.create(url / JOURNAL, head)
    except FileExistsError as error:
        raise OutputError(
            f"{urls.text_of(url)}: another run began to copy there; choose another folder, or run again if it is the "
            "same run"
        ) from error


def _files(out: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(folder, name) != out / UNFINISHED]
        yield from (Path(folder, name).relative_to(out).as_posix() for name in names if not name.startswith("."))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def _writing(url: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = urls.text_of(Path(error.filename)) if error.filename else urls.text_of(url)
        raise OutputError(
            f"{where}: cannot be written ({error.strerror or error}); the run itself is kept: run again, which resumes"
        ) from error
