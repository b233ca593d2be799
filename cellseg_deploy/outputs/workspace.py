"""A hidden folder to make a file in that other programs must be able to open before it gets its name.

It lies beside the final file, so that a rename is enough at the end, and is locked while its process lives: what a
killed process left is told by the lock that nobody holds, and removed by the next one.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellseg_deploy.errors import OutputError
from cellseg_deploy.outputs.atomic import TEMPORARY_PREFIX, writing
from cellseg_deploy.outputs.lock import LOCK_NAME, exclusive

_NEW_SECONDS = 60.0


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A new folder within ``folder`` (which exists), gone with all that is in it when the block ends.

    Raises ``OutputError`` if it cannot be made.
    """
    _remove_abandoned(folder)
    place = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    with writing(folder):
        place.mkdir()
    try:
        with exclusive(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)  # the block's own error is the one to report


def _remove_abandoned(folder: Path) -> None:
    for lock in folder.glob(f"{TEMPORARY_PREFIX}*/{LOCK_NAME}"):
        try:
            if _may_be_new(lock):
                continue
            with exclusive(lock.parent):
                pass
        except OSError:  # gone in the meantime: its own process was faster
            continue
        except OutputError:  # in use, or somebody else's: not ours to remove
            continue
        shutil.rmtree(lock.parent, ignore_errors=True)


def _may_be_new(lock: Path) -> bool:
    """Whether its process may be about to lock it: a lock file exists a moment before it is held, and nothing else
    lies there then."""
    return time.time() - lock.stat().st_mtime < _NEW_SECONDS and len(list(lock.parent.iterdir())) == 1
