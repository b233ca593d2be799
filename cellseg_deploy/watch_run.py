"""A run that follows a folder which somebody else is filling, for as long as they do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.errors import NothingToDoError, UsageError
from cellseg_deploy.image_files import find_images, input_roots
from cellseg_deploy.outputs.folder import check_apart, held_folder
from cellseg_deploy.outputs.plan import RunPlan
from cellseg_deploy.pipeline import Segmenter
from cellseg_deploy.run_record import ImageResult, Inputs, RunOptions, RunSummary
from cellseg_deploy.run_session import RunSession
from cellseg_deploy.threads import ThreadPlan
from cellseg_deploy.watching import CompleteFiles

_log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
TABLES_SECONDS = 30.0
_TABLES_SHARE = 20  # tables are written from the whole journal: that many times as long the run does other things


def watch_folder(
    segmenter: Segmenter,
    folder: Path,
    out: Path,
    *,
    options: RunOptions | None = None,
    threads: ThreadPlan | None = None,
    on_result: Callable[[ImageResult], None] | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
    complete: CompleteFiles | None = None,
    follow_links: bool = False,
    idle_seconds: float | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> RunSummary:
    """Segment the images of ``folder`` into ``out`` as they become complete (see ``watching``), until interrupted.

    ``idle_seconds``: end when for so long nothing new was complete and nothing is being written. A file that changes
    after its turn has another one. Tables are written at the end, and every half minute in which there is news. The
    rest is as in ``folder_run.run_folder``; ``on_plan`` is told of each group of files.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder; only one folder can be watched")
    if idle_seconds is not None and not 0 < idle_seconds < float("inf"):
        raise UsageError(f"the folder must be idle for more than 0 seconds, got {idle_seconds}")
    check_apart([folder], out)
    complete = complete or CompleteFiles()
    inputs = Inputs.of([folder], input_roots([folder]), follow_links=follow_links)
    session = RunSession(
        segmenter,
        out,
        options or RunOptions(),
        threads or thread_plans.plan(device=segmenter.backend.device),
        inputs=inputs,
        on_result=on_result,
    )
    with held_folder(out), session.running([]):
        since, tables, is_first, is_away = time.monotonic(), _Tables(session), True, False
        while True:
            try:
                seen = find_images([folder], follow_links=follow_links, is_silent=not is_first)
                is_away = False
            except UsageError as error:  # a share that is away for a moment must not end the night
                if is_first:
                    raise
                if not is_away:
                    _log.warning("%s; waiting for it to come back", error)
                seen, is_away = [], True
            found = [] if is_away else complete.newly_complete(seen)
            is_first = False
            if found:
                todo = session.take(found)
                if on_plan is not None:
                    on_plan(todo)
                session.work(todo)
                tables.are_old = True
                since = time.monotonic()
            elif idle_seconds is not None and not complete.waiting and time.monotonic() - since >= idle_seconds:
                break
            else:
                time.sleep(poll_seconds)
            tables.write_if_due()
    if not session.summary.found:
        raise NothingToDoError(f"{folder}: no image came; expected PNG, JPEG or TIFF files")
    return session.summary


class _Tables:
    """The tables of a run that goes on: written now and then."""

    def __init__(self, session: RunSession) -> None:
        self._session = session
        self._not_before = time.monotonic() + TABLES_SECONDS
        self.are_old = False

    def write_if_due(self) -> None:
        start = time.monotonic()
        if self.are_old and start >= self._not_before:
            self._session.write_tables()
            self.are_old = False
            end = time.monotonic()
            self._not_before = end + max(TABLES_SECONDS, _TABLES_SHARE * (end - start))
