"""Watch a folder that another program is filling: the folder run, round by round.

Microscope software creates a file, writes to it for a while, and never signals that it is done. A file counts as
complete when its size and time stamp have not changed for some seconds of our own clock (a file server's clock may
differ) and its header can be read. A file without a readable header is given more time and then processed anyway, so
that it fails with a reason instead of being forgotten.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.errors import NothingToDoError, UsageError
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.images.header import has_header
from cellseg_deploy.run.plan import RunPlan
from cellseg_deploy.run.record import ImageResult, Inputs, RunOptions, RunSetup, RunSummary
from cellseg_deploy.run.session import run
from cellseg_deploy.run.streamed import OnStream
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TABLES_SECONDS = 30.0
QUIET_SECONDS = 5.0
PATIENCE = 12
"""A file without a readable header is waited for this many times the quiet seconds."""


def watch_folder(
    segmenter: Segmenter,
    folder: Path,
    out: Path,
    *,
    options: RunOptions | None = None,
    threads: ThreadPlan | None = None,
    on_result: Callable[[ImageResult], None] | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
    on_scale: Callable[[str], None] | None = None,
    on_stream: OnStream | None = None,
    complete: CompleteFiles | None = None,
    follow_links: bool = False,
    idle_seconds: float | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> RunSummary:
    """Segment the images of ``folder`` into ``out`` as they become complete, until interrupted.

    ``idle_seconds``: end after this time without a newly complete file or a file being written. A file whose content
    changes later is done again. Tables are written at the end, and every half minute while there are new results.
    If the folder cannot be listed for a while (moved, or its server restarts), the run warns once and waits; at the
    start this is an error. Everything else is as in ``folder.run_folder``; ``on_plan`` is called once per round of
    files.
    """
    if not os.path.isdir(folder):  # noqa: PTH112  (never raises)
        raise UsageError(f"{folder}: not a folder; only one folder can be watched")
    if idle_seconds is not None and not 0 < idle_seconds < float("inf"):
        raise UsageError(f"the folder must be idle for more than 0 seconds, got {idle_seconds}")
    check_apart([folder], out)
    setup = RunSetup(
        segmenter,
        out,
        options or RunOptions(),
        threads or thread_plans.plan(device=segmenter.backend.device),
        Inputs.of([folder], follow_links=follow_links),
        on_result=on_result,
        on_plan=on_plan,
        on_scale=on_scale,
        on_stream=on_stream,
        tables_seconds=TABLES_SECONDS,
    )
    images = find_images([folder], follow_links=follow_links)
    summary = run(setup, _rounds(setup, images, complete or CompleteFiles(), idle_seconds, poll_seconds))
    if not summary.found:
        raise NothingToDoError(f"{folder}: no image arrived; expected PNG, JPEG or TIFF files")
    return summary


def _rounds(
    setup: RunSetup,
    images: list[FoundImage] | None,
    complete: CompleteFiles,
    idle_seconds: float | None,
    poll_seconds: float,
) -> Iterator[list[FoundImage]]:
    """Yield the newly complete files, poll by poll, until the folder is idle. ``images``: from its first listing."""
    folder, is_away = Path(setup.inputs.paths[0]), False
    since = time.monotonic()
    while True:
        # If listing fails, files are neither new nor gone: finished files must not be taken for new ones.
        found = [] if images is None else complete.newly_complete(images)
        yield found
        if found or (images is not None and complete.waiting):
            since = time.monotonic()
        elif idle_seconds is not None and time.monotonic() - since >= idle_seconds:
            return
        if not found:
            time.sleep(poll_seconds)
        try:
            # Not Path.is_dir: it raises if a server does not answer. And find_images takes a broken link for an image.
            if not os.path.isdir(folder):  # noqa: PTH112
                raise UsageError(f"{folder}: the folder does not exist")
            images = find_images([folder], follow_links=setup.inputs.follow_links, is_silent=True)
        except UsageError as error:
            if not is_away:
                _log.warning("%s; waiting until the folder can be listed again", error)
            images, is_away = None, True
            continue
        if is_away:
            _log.info("%s: can be listed again", folder)
        is_away = False


@dataclass(frozen=True)
class _Seen:
    """Size and time stamp of a file, since when it has had them, and whether it was handed over in that state."""

    size: int
    mtime_ns: int
    since: float
    is_taken: bool = False


class CompleteFiles:
    """Tracks which files of a growing folder are complete; queried at every poll.

    ``clock``, ``stat`` and ``is_readable`` let tests replace the time, the file system and ``has_header``.
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
        """Return those of ``found``, in order, that have become complete, or complete again after a change.

        Deleted files are forgotten, and count as new if they return. An image with a ``problem`` is complete at once.
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

    @property
    def waiting(self) -> list[Path]:
        """Files of the last poll that are not complete yet."""
        return [path for path, state in self._seen.items() if not state.is_taken]

    def _look(self, path: Path, now: float) -> _Seen | None:
        try:
            status = self._stat(path)
        except FileNotFoundError:
            if not os.path.lexists(path):
                return None
            return self._seen.get(path, _Seen(-1, -1, now))  # a broken link: its target may still appear
        except OSError:  # cannot be inspected: the reader will report why
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
