"""Limits of the service, and the accounts of the images and bytes that it has accepted."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cellseg_deploy.errors import UsageError, plural

MAX_RETRY_SECONDS = 60
_REMEMBERED = 64
"""More images than share a batch: these end together."""


@dataclass(frozen=True)
class Limits:
    """``body_bytes``: of one request. ``held_bytes``: of the files that wait, together; jobs have as much of their own.
    ``queue``: images accepted and not yet answered. ``seconds``: per request, from
    its first byte to its answer. ``files``: images in one request. ``jobs``: long images waiting or running.
    ``kept_jobs``: finished jobs whose results are kept. ``grace_seconds``: for accepted jobs when the service stops.
    ``in_flight_bytes``: of decoded images at a time; a larger image runs alone.

    Raises ``UsageError`` for anything not above 0, and for ``held_bytes`` below ``body_bytes``.
    """

    body_bytes: int = 200 << 20
    held_bytes: int = 1 << 30
    queue: int = 64
    seconds: float = 60.0
    files: int = 32
    jobs: int = 16
    kept_jobs: int = 1000
    grace_seconds: float = 60.0
    in_flight_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"{name.replace('_', ' ')} must be above 0, got {value}")
        if self.held_bytes < self.body_bytes:
            raise UsageError(
                f"the limit for files that wait is {megabytes(self.held_bytes)}, but one request may have "
                f"{megabytes(self.body_bytes)}; raise the first (`max_waiting`), or lower the second (`max_body`)"
            )


def megabytes(nbytes: int) -> str:
    """Return ``nbytes`` in MB of 2^20 bytes, as the options count.

    >>> megabytes(200 << 20)
    '200 MB'
    """
    return f"{nbytes / 2**20:g} MB"


class QueueFullError(Exception):
    """No further image is accepted for now. ``what``: which limit is reached. ``retry_seconds``: when to ask again."""

    def __init__(self, what: str, retry_seconds: int) -> None:
        super().__init__(f"{what}; send it again in {plural(retry_seconds, 'second')}")
        self.retry_seconds = retry_seconds


class Accepted:
    """Images accepted and not yet answered: at most ``most``, and no further request while their work takes longer than
    half of ``seconds``, which a request may take. Otherwise a slow machine would take up more than it can answer in
    time, and answer nothing. Thread-safe. ``clock``: seconds."""

    def __init__(self, most: int, seconds: float = math.inf, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self._seconds, self._clock = most, seconds, clock
        self._lock = threading.Lock()
        self._n = 0
        self._last_end = -math.inf
        self._gaps: deque[float] = deque(maxlen=_REMEMBERED)  # between ends of images, without idle time

    def __len__(self) -> int:
        return self._n

    def refusal(self, *, timed: bool = True) -> str | None:
        """Say why no further request, ``timed`` or not, is taken now, None if it is."""
        if self._n >= self.most:
            return f"the queue of {plural(self.most, 'image')} is full"
        if timed and (ahead := self._n * self._gap()) > self._seconds / 2:
            return (
                f"the queue of {plural(self._n, 'image')} takes about {ahead:.0f} s, more than half of the "
                f"{self._seconds:g} s that a request may take"
            )
        return None

    def admit(self, *, timed: bool = True) -> None:
        """Accept a request with one image. Raises ``QueueFullError``. ``timed``: the request has a time limit."""
        with self._lock:
            if (refusal := self.refusal(timed=timed)) is not None:
                raise QueueFullError(refusal, self.retry_seconds())
            self._n += 1

    def take(self, n: int = 1) -> None:
        """Accept ``n`` more images of an admitted request. Raises ``QueueFullError``, then none is accepted."""
        with self._lock:
            if self._n + n > self.most:
                raise QueueFullError(f"the queue of {plural(self.most, 'image')} is full", self.retry_seconds())
            self._n += n

    def give_back(self, *, seconds: float | None = None) -> None:
        """An image is answered; ``seconds``: the time that the engine took for it, None if it was not run."""
        with self._lock:
            self._n -= 1
            if seconds is not None:
                now = self._clock()
                self._gaps.append(min(seconds, now - self._last_end))
                self._last_end = now

    def retry_seconds(self) -> int:
        """Return the time in which about half of the queue is done."""
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(self._n * self._gap() / 2)))

    def _gap(self) -> float:
        """Seconds in which an image is done, while there are others; 0 if none was done yet."""
        gaps = tuple(self._gaps)
        return sum(gaps) / len(gaps) if gaps else 0.0


class Waiting:
    """Bytes of files received, or about to be, and not yet decoded: at most ``most`` together. Thread-safe.
    ``retry_seconds``: tells when to ask again.

    >>> waiting = Waiting(100, lambda: 1)
    >>> part = waiting.take(60).split(10)
    >>> waiting.used, part.give_back(), waiting.used
    (60, None, 50)
    """

    def __init__(self, most: int, retry_seconds: Callable[[], int]) -> None:
        self.most, self.used, self._retry_seconds = most, 0, retry_seconds
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Held:
        """Hold ``nbytes`` more. Raises ``QueueFullError``, then none are held."""
        with self._lock:
            if self.used + nbytes > self.most:
                full = f"the files that wait fill the {megabytes(self.most)} that are kept for them"
                raise QueueFullError(full, self._retry_seconds())
            self.used += nbytes
        return Held(self, nbytes)

    def _move(self, source: Held, nbytes: int, target: Held | None) -> None:
        """Take ``nbytes`` from ``source``, for ``target``, or for nobody."""
        with self._lock:
            nbytes = min(nbytes, source.nbytes)
            source.nbytes -= nbytes
            if target is None:
                self.used -= nbytes
            else:
                target.nbytes += nbytes


class Held:
    """``nbytes`` of ``waiting``, which are given back once, however often that is asked for."""

    def __init__(self, waiting: Waiting, nbytes: int = 0) -> None:
        self._waiting, self.nbytes = waiting, nbytes

    def split(self, nbytes: int) -> Held:
        """Move ``nbytes``, or as many as there are, into another one."""
        other = Held(self._waiting)
        self._waiting._move(self, nbytes, other)
        return other

    def give_back(self) -> None:
        """Hold nothing more."""
        self._waiting._move(self, self.nbytes, None)
