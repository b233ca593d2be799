"""One writer an output folder. The only module that knows how this operating system locks files.

The lock belongs to the process and ends with it, however it ends; a file with a process number in it would not. What
the owner notes in the file outlives it only if it is killed, so that the next one can tell what was left half done.
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
_NOTE_BYTES = 65_536


class Held:
    """A lock that this process holds. ``left_behind``: what a killed owner before it had noted, empty if none was."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.left_behind = os.read(descriptor, _NOTE_BYTES)

    def note(self, text: bytes) -> None:
        """Leave ``text`` for the next owner, should this process be killed. Raises ``OutputError``."""
        if len(text) > _NOTE_BYTES:
            raise ValueError(f"a note of {len(text)} bytes, at most {_NOTE_BYTES} are read back")
        try:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, text)
        except OSError as error:
            raise OutputError(f"the lock file cannot be written ({error.strerror}); check free space") from error


@contextmanager
def exclusive(folder: Path, name: str = LOCK_NAME, *, wait: bool = False) -> Iterator[Held]:
    """Hold ``folder`` (which exists) for this process; the lock file is gone afterwards.

    ``name``: of the lock file; another one holds but a part of the folder. ``wait``: until the other process that
    holds it lets go or ends. Raises ``OutputInUseError`` if another process holds it, ``OutputError`` if the folder
    cannot be written.
    """
    path = folder / name
    descriptor = _acquire(path, folder, wait)
    try:
        yield Held(descriptor)
    finally:
        if os.name == "posix":
            with contextlib.suppress(OSError):  # the disk became read-only: without its process the file locks nothing
                path.unlink(missing_ok=True)  # while still locked; whoever opened it meanwhile notices in _acquire
            os.close(descriptor)
        else:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # Windows: another process may have opened it by now
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
        # The former owner may have removed the file between our open and our lock: then ours locks nothing.
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
