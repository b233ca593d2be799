"""Limits of the service, and the account of the images that it has accepted."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from cellseg_deploy.errors import UsageError, plural

MAX_RETRY_SECONDS = 60


@dataclass(frozen=True)
class Limits:
    """``body_bytes``: of one request. ``queue``: images accepted and not yet answered. ``seconds``: per request, from
    its first byte to its answer. ``files``: images in one request. ``jobs``: long images waiting or running.
    ``kept_jobs``: finished jobs whose results are kept. ``grace_seconds``: for accepted jobs when the service stops.
    ``in_flight_bytes``: of decoded images at a time; a larger image runs alone.

    Raises ``UsageError`` for anything not above 0.
    """

    body_bytes: int = 200 << 20
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


class QueueFullError(Exception):
    """No further image is accepted for now. ``retry_seconds``: when to ask again."""

    def __init__(self, most: int, retry_seconds: int) -> None:
        super().__init__(
            f"the queue of {plural(most, 'image')} is full; send it again in {plural(retry_seconds, 'second')}"
        )
        self.retry_seconds = retry_seconds


class Accepted:
    """Number of images accepted and not yet answered, at most ``most``. Thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._n = self._n_finished = 0
        self._seconds_per_image = 0.0

    def __len__(self) -> int:
        return self._n

    def take(self, n: int = 1) -> None:
        """Accept ``n`` more images. Raises ``QueueFullError``, then none is accepted."""
        with self._lock:
            if self._n + n > self.most:
                raise QueueFullError(self.most, self._retry_seconds())
            self._n += n

    def give_back(self, *, seconds: float | None = None) -> None:
        """An image is answered; ``seconds``: the time that the engine took for it, None if it was not run."""
        with self._lock:
            self._n -= 1
            if seconds is not None:
                self._n_finished += 1
                weight = max(0.1, 1 / self._n_finished)
                self._seconds_per_image += weight * (seconds - self._seconds_per_image)

    def _retry_seconds(self) -> int:
        """Time in which about half of the queue is done: the engine works on one batch at a time."""
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(self._n * self._seconds_per_image / 2)))
