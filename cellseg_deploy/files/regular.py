"""Open a file that may turn out to be a pipe, a device or a folder, without blocking."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from cellseg_deploy.files import urls


class NotARegularFileError(OSError):
    """A folder, pipe or device was found where a file was expected."""


def opened(path: Path) -> BufferedReader:
    """Open ``path`` for reading. Never blocks; raises ``NotARegularFileError``, and ``OSError`` as ``open`` does.

    An object in a bucket (``urls``) is read by ranges.
    """
    if urls.is_url(path):
        return urls.opened(path)

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NotARegularFileError(f"{path}: not a regular file (a folder, pipe or device)")
        return descriptor

    return open(path, "rb", opener=opener)
