"""Files of a folder that somebody else is still filling: which of them are complete.

A microscope's program makes a file, writes to it for a while, and never says that it is done. A file is taken for
complete when its size and time have not changed for some seconds of our own clock (a file server's may be another) and
its header can be read. One whose header cannot is waited for longer, and then handed over all the same: it is to fail
with a reason, and not to be forgotten.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import UsageError
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.images.header import has_header

QUIET_SECONDS = 5.0
PATIENCE = 12
"""So many times the quiet seconds a file without a readable header is waited for."""


@dataclass(frozen=True)
class _Seen:
    """What a file looked like, since when, and whether it was handed over like that."""

    size: int
    mtime_ns: int
    since: float
    is_taken: bool = False


class CompleteFiles:
    """Which of the files found in a growing folder are complete; asked again and again.

    ``clock``, ``stat``, ``is_readable`` stand in for the time, the file system and ``has_header`` in tests.
    """

    def __init__(
        self,
        quiet_seconds: float = QUIET_SECONDS,
        *,
        clock: Callable[[], float] = time.monotonic,
        stat: Callable[[Path], os.stat_result] = os.stat,
        is_readable: Callable[[Path], bool] = has_header,
    ) -> None:
        if not 0 < quiet_seconds < float("inf"):
            raise UsageError(f"a file must be quiet for more than 0 seconds, got {quiet_seconds}")
        self.quiet_seconds = quiet_seconds
        self._clock, self._stat, self._is_readable = clock, stat, is_readable
        self._seen: dict[Path, _Seen] = {}

    def newly_complete(self, found: Iterable[FoundImage]) -> list[FoundImage]:
        """Those of ``found``, in order, that are complete now and were not before, or have changed since.

        Files that are gone are forgotten, and new if they come back. An image with a ``problem`` is complete at once.
        """
        now = self._clock()
        seen, complete = {}, []
        for image in found:
            state = self._look(image.path, now)
            if state is None:
                continue
            if not state.is_taken and (image.problem or self._is_complete(image.path, state, now)):
                state = _Seen(state.size, state.mtime_ns, state.since, is_taken=True)
                complete.append(image)
            seen[image.path] = state
        self._seen = seen
        return complete

    def forget(self, path: Path) -> None:
        """A file that was handed over is new again if it is found again."""
        self._seen.pop(path, None)

    @property
    def waiting(self) -> list[Path]:
        """Files of the last look that are not complete yet."""
        return [path for path, state in self._seen.items() if not state.is_taken]

    def _look(self, path: Path, now: float) -> _Seen | None:
        try:
            status = self._stat(path)
        except FileNotFoundError:
            if not os.path.lexists(path):
                return None
            return self._seen.get(path, _Seen(-1, -1, now))  # a link to nothing: somebody may still make its target
        except OSError:  # cannot be looked at: the reader will say why
            return self._seen.get(path, _Seen(-1, -1, now))
        before = self._seen.get(path)
        if before is not None and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return before
        return _Seen(status.st_size, status.st_mtime_ns, now)

    def _is_complete(self, path: Path, state: _Seen, now: float) -> bool:
        quiet = now - state.since
        if quiet < self.quiet_seconds:
            return False
        return quiet >= PATIENCE * self.quiet_seconds or (state.size > 0 and self._is_readable(path))
