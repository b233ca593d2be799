"""A hidden folder in which to create a file that other programs must be able to open before it gets its final name.

It lies next to the final file, so that a rename completes the file, and is locked while its process lives. The next
process recognises a folder orphaned by a killed process by its unheld lock, and removes it.
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
    """Create a folder within ``folder`` (which exists), and remove it with its content when the block ends.

    Other users have no access to it. Raises ``OutputError`` if it cannot be created.
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
    """Remove orphaned workspaces of killed processes in ``folder``; workspaces of running processes stay."""
    for place in folder.glob(f"{TEMPORARY_PREFIX}*/"):
        try:
            if not _is_ours(place) or _may_be_new(place):
                continue
            with exclusive(place):
                shutil.rmtree(place, ignore_errors=True)
        except OSError:  # already removed by its own process
            continue
        except OutputError:  # in use: not ours to remove
            continue
        shutil.rmtree(place, ignore_errors=True)  # for systems on which an open lock file cannot be removed


def _is_ours(place: Path) -> bool:
    """Whether ``place`` is a folder of this user: where all may write, as in /tmp, others can create such names."""
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and (sys.platform == "win32" or found.st_uid == os.getuid())


def _may_be_new(place: Path) -> bool:
    """Whether a process may be about to lock ``place``: it exists for a moment before it is locked, and is then empty
    except for the lock file."""
    lock = place / LOCK_NAME
    inside = [path for path in place.iterdir() if path != lock]
    made = (lock if lock.exists() else place).stat().st_mtime
    return not inside and time.time() - made < _NEW_SECONDS
