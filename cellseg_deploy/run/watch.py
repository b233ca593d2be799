"""A run that follows a folder which somebody else is filling: the folder run, round by round.

A microscope's program makes a file, writes to it for a while, and never says that it is done. A file is taken for
complete when its size and time have not changed for some seconds of our own clock (a file server's may be another) and
its header can be read. One whose header cannot is waited for longer, and then handed over all the same: it is to fail
with a reason, and not to be forgotten.
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
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.images.header import has_header
from cellseg_deploy.run.output_folder import check_apart
from cellseg_deploy.run.plan import RunPlan
from cellseg_deploy.run.record import ImageResult, Inputs, RunOptions, RunSummary
from cellseg_deploy.run.session import RunSetup, run
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TABLES_SECONDS = 30.0
QUIET_SECONDS = 5.0
PATIENCE = 12
"""So many times the quiet seconds a file without a readable header is waited for."""


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
    complete: CompleteFiles | None = None,
    follow_links: bool = False,
    idle_seconds: float | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> RunSummary:
    """Segment the images of ``folder`` into ``out`` as they become complete, until interrupted.

    ``idle_seconds``: end when for so long nothing new was complete and nothing was being written. A file whose content
    changes later is done again. Tables are written at the end, and every half minute in which there is news.
    A folder that cannot be listed for a while, as when it is moved or its server restarts, is waited for, with one
    warning; at the first look it is an error. The rest is as in ``folder.run_folder``; ``on_plan`` is called for each
    round of files.
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
        tables_seconds=TABLES_SECONDS,
    )
    images = find_images([folder], follow_links=follow_links)
    summary = run(setup, _rounds(setup, images, complete or CompleteFiles(), idle_seconds, poll_seconds))
    if not summary.found:
        raise NothingToDoError(f"{folder}: no image came; expected PNG, JPEG or TIFF files")
    return summary


def _rounds(
    setup: RunSetup,
    images: list[FoundImage] | None,
    complete: CompleteFiles,
    idle_seconds: float | None,
    poll_seconds: float,
) -> Iterator[list[FoundImage]]:
    """What became complete in the folder, poll by poll, until it is idle. ``images``: of the first look at it."""
    folder, is_away = Path(setup.inputs.paths[0]), False
    since = time.monotonic()
    while True:
        # What cannot be listed is neither new nor gone: files that were done are not to be taken for new ones.
        found = [] if images is None else complete.newly_complete(images)
        yield found
        if found or (images is not None and complete.waiting):
            since = time.monotonic()
        elif idle_seconds is not None and time.monotonic() - since >= idle_seconds:
            return
        if not found:
            time.sleep(poll_seconds)
        try:
            # Not Path.is_dir, which raises for a server that does not answer; and a link to nothing is no image.
            if not os.path.isdir(folder):  # noqa: PTH112
                raise UsageError(f"{folder}: the folder is not there")
            images = find_images([folder], follow_links=setup.inputs.follow_links, is_silent=True)
        except UsageError as error:
            if not is_away:
                _log.warning("%s; waiting until all folders can be listed again", error)
            images, is_away = None, True
            continue
        if is_away:
            _log.info("%s: can be listed again", folder)
        is_away = False


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
