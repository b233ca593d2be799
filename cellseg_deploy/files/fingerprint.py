"""Fingerprint of a file, to recognise later whether it is still the same: size, time stamp and SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.files import urls
from cellseg_deploy.files.regular import opened


@dataclass(frozen=True)
class Fingerprint:
    """``size`` in bytes, ``mtime_ns`` since 1970, ``sha256`` in hexadecimal.

    The time stamp is informative only; it is not compared, as copies of a file have another one.
    """

    size: int
    mtime_ns: int
    sha256: str

    def is_of(self, path: Path) -> bool:
        """Whether ``path`` holds the same bytes now. Raises ``OSError`` if it cannot be read."""
        size = urls.size_of(path) if urls.is_url(path) else path.stat().st_size
        return size == self.size and sha256_of(path) == self.sha256


def of_bytes(data: bytes, mtime_ns: int) -> Fingerprint:
    """Return the fingerprint of a file with the content ``data``."""
    return Fingerprint(len(data), mtime_ns, hashlib.sha256(data).hexdigest())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in chunks; never waits for a pipe. Raises ``OSError``."""
    if urls.is_url(path):
        return hashlib.sha256(urls.read(path)).hexdigest()
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
