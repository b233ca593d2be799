"""Files that appear whole or not at all.

Write to a temporary file in the same folder, fsync, rename to the final name, fsync the folder. This order is what is
promised; whether it survives a power cut is up to the disk. About 16 ms per file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cellseg_deploy.errors import OutputError

TEMPORARY_PREFIX = ".cellseg-"
TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing that is named ``path`` when the block ends, and removed if the block raises.

    The folder must exist. A link at ``path`` is replaced, never written through. A path of ``temporary_in`` is written
    in place, for the caller to ``move``: one rename and one fsync of the folder per file.

    Raises ``OutputError`` if the file cannot be created, finished or renamed; errors of the block itself propagate
    unchanged (see ``writing``).
    """
    # A short name of its own: the final name may already have the 255 bytes that a file system allows.
    is_temporary = path.name.startswith(TEMPORARY_PREFIX) and path.name.endswith(TEMPORARY_SUFFIX)
    temporary = path if is_temporary else temporary_in(path.parent)
    with writing(path):
        # 0o666 instead of mkstemp's 0o600, so that the user's umask decides who may read results.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    file = open(descriptor, "wb")  # noqa: PTH123, SIM115  (a descriptor; closed below, where its error is handled)
    try:
        yield file
        with writing(path):
            file.flush()
            os.fsync(descriptor)
            file.close()
            if not is_temporary:
                temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            file.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if not is_temporary:
        with writing(path):
            _sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block, which must only write ``path``, into ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check free space and permissions of the folder"
        ) from error


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to ``path``, whole or not at all. Raises ``OutputError``."""
    with atomic_file(path) as file, writing(path):
        file.write(data)


def move(source: Path, target: Path) -> None:
    """Rename ``source``, a finished file on the same file system; a file or link at ``target`` is replaced.

    Raises ``OutputError``.
    """
    with writing(target):
        source.replace(target)
        _sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove the file ``path`` if it exists. Raises ``OutputError``."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed ({error.strerror or error}); check permissions") from error


def temporary_in(folder: Path) -> Path:
    """Return a new path in ``folder`` with a name that is recognised as unfinished."""
    return folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def set_aside(path: Path) -> Path:
    """Rename ``path``, which somebody edited, to ``NAME.edited-N.EXT`` with the first free number.

    Returns the new path. Raises ``OutputError``.
    """
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.edited-{number}{path.suffix}")):
        number += 1
    try:
        return path.rename(aside)
    except OSError as error:
        raise OutputError(
            f"{path}: was edited since the run, and cannot be renamed to {aside.name} ({error.strerror or error}); "
            "move it to another folder"
        ) from error


def remove_stale(folder: Path) -> None:
    """Remove files that a killed process left unfinished in ``folder``; the caller holds the folder's lock."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create the folder ``path`` and its parents if missing. Raises ``OutputError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: the folder cannot be made ({error.strerror}); choose another one or check permissions"
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder for this
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
