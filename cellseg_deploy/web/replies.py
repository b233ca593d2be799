"""Answers that know no web framework, and the status of each error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from cellseg_deploy.errors import (
    BackendUnavailableError,
    CellsegError,
    DataError,
    ModelError,
    OutputInUseError,
    UsageError,
)

_STATUS: tuple[tuple[type[CellsegError], int], ...] = (
    (UsageError, 400),
    (DataError, 422),
    (OutputInUseError, 409),
    (ModelError, 503),
    (BackendUnavailableError, 503),
)


@dataclass(frozen=True)
class Reply:
    """An answer. ``kind``: its media type. ``seconds``: how long a browser may keep it. ``headers``: further ones."""

    body: bytes
    kind: str = "application/json"
    status: int = 200
    seconds: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_headers(self) -> dict[str, str]:
        """``headers``, and for how long the answer may be kept."""
        kept = f"private, max-age={self.seconds}" if self.seconds else "no-store"
        return {**self.headers, "Cache-Control": kept}


def status_of(error: CellsegError) -> int:
    """Return the HTTP status of ``error``."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def most_of_body(headers: Mapping[str, str], most: int) -> int | None:
    """Return how many bytes the body may turn out to have: its length, or ``most`` if it comes in chunks; None if its
    length is above ``most``."""
    said = headers.get("content-length", str(most))
    return int(said) if said.isdecimal() and int(said) <= most else None


async def body_of(headers: Mapping[str, str], stream: AsyncIterator[bytes], most: int) -> bytes | None:
    """Read a body of at most ``most`` bytes; None if it is larger, before reading if its length says so.

    Counted while it arrives: a body in chunks has no length.
    """
    if most_of_body(headers, most) is None:
        return None
    parts, size = [], 0
    async for part in stream:
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)
