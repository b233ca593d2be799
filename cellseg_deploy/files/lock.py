"""One writer per output folder. The only module that knows how this operating system locks files.

The lock belongs to the process and ends with it, however it ends; a file with a process ID could outlive it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellseg_deploy.errors import OutputError, OutputInUseError

LOCK_NAME = ".cellseg-lock"


@contextmanager
def exclusive(folder: Path, name: str = LOCK_NAME, *, wait: bool = False) -> Iterator[None]:
    """Lock ``folder`` (which exists) for this process; the lock file is removed afterwards.

    ``name``: name of the lock file; another name locks only a part of the folder. ``wait``: wait until the process
    that holds the lock releases it or ends. Raises ``OutputInUseError`` if another process holds the lock,
    ``OutputError`` if the folder cannot be written.
    """
    path = folder / name
    descriptor = _acquire(path, folder, wait)
    try:
        yield
    finally:
        if os.name == "posix":
            with contextlib.suppress(OSError):  # the disk became read-only: without our process the file locks nothing
                path.unlink(missing_ok=True)  # while still locked; a process that just opened it notices in _acquire
            os.close(descriptor)
        else:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # Windows: another process may already have opened it
                path.unlink(missing_ok=True)


def _acquire(path: Path, folder: Path, wait: bool) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be written ({error.strerror}); choose another folder or check permissions"
            ) from error
        try:
            _lock(descriptor, wait)
        except OSError as error:
            os.close(descriptor)
            raise OutputInUseError(
                f"{folder}: another run is writing there; wait for it to end or choose another folder"
            ) from error
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        # The previous owner may have removed the file between our open and our lock: then our lock has no effect.
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
                return
            except OSError as error:  # LK_LOCK gives up after ten seconds
                if not wait or error.errno != errno.EDEADLK:
                    raise
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
