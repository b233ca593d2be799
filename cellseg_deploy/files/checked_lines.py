"""Journals: files of JSON lines that are appended and fsynced one at a time, each with a hash of its content.

A line without a line end was still being written when its process died, and counts as never written. ``check``, a hash
of the bytes before it in the line, reveals a damaged line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import writing

_CHECK_DIGITS = 16
_CHECK_BYTES = len(',"check":""}') + _CHECK_DIGITS


def line_of(content: dict[str, Any]) -> bytes:
    """Return one journal line with its line end; names that are not valid Unicode are kept as escapes."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")[:-1]
    return body + f',"check":"{_check(body)}"}}\n'.encode("ascii")


def content_of(line: bytes) -> dict[str, Any] | None:
    """Return the content of a whole line, None if it is damaged."""
    line = line.rstrip(b"\n")
    body = line[:-_CHECK_BYTES]
    if line[len(body) :] != f',"check":"{_check(body)}"}}'.encode("ascii"):
        return None
    content: dict[str, Any] = json.loads(body + b"}")
    return content


class AppendedFile:
    """A file open for appending, by one process and one thread at a time. ``size``: its length in bytes."""

    def __init__(self, path: Path) -> None:
        """Append to the existing file ``path``, which ends with a whole line. Raises ``OutputError``."""
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with writing(path):
            self._descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self._descriptor).st_size

    def append(self, line: bytes) -> None:
        """Append ``line``; on return it survives a crash and, if the disk honours fsync, a power cut.

        On ``OutputError`` the file is as before.
        """
        try:
            with writing(self.path):
                rest = memoryview(line)
                while rest:  # a full disk first accepts a part, and fails on the next attempt
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
        except OutputError:
            with contextlib.suppress(OSError):  # otherwise the torn line stays, and is ignored as an unfinished line
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(line)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:_CHECK_DIGITS]
