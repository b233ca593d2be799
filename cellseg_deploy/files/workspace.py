"""A hidden folder to make a file in that other programs must be able to open before it gets its name.

It lies beside the final file, so that a rename is enough at the end, and is locked while its process lives: what a
killed process left is told by the lock that nobody holds, and removed by the next one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import TEMPORARY_PREFIX, writing
from cellseg_deploy.files.lock import LOCK_NAME, exclusive

_NEW_SECONDS = 60.0


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A new folder within ``folder`` (which exists), gone with all that is in it when the block ends.

    Nobody else may look into it. Raises ``OutputError`` if it cannot be made.
    """
    remove_abandoned(folder)
    place = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    with writing(folder):
        place.mkdir(mode=0o700)
    try:
        with exclusive(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)  # the block's own error is the one to report


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of their workspaces in ``folder``; those of running ones stay."""
    for place in folder.glob(f"{TEMPORARY_PREFIX}*/"):
        try:
            if not _is_ours(place) or _may_be_new(place):
                continue
            with exclusive(place):
                shutil.rmtree(place, ignore_errors=True)
        except OSError:  # gone in the meantime: its own process was faster
            continue
        except OutputError:  # in use: not ours to remove
            continue
        shutil.rmtree(place, ignore_errors=True)  # where an open lock file cannot be removed


def _is_ours(place: Path) -> bool:
    """Whether it is a folder of this user: where all may write, as in /tmp, anybody may have made one of that name."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and (sys.platform == "win32" or found.st_uid == os.getuid())


def _may_be_new(place: Path) -> bool:
    """Whether its process may be about to lock it: it exists a moment before it is held, and nothing else lies there
    then."""
    lock = place / LOCK_NAME
    inside = [path for path in place.iterdir() if path != lock]
    made = (lock if lock.exists() else place).stat().st_mtime
    return not inside and time.time() - made < _NEW_SECONDS
