"""A run that follows a folder which somebody else is filling, for as long as they do."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.errors import NothingToDoError, UsageError
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.run.output_folder import check_apart, held_folder
from cellseg_deploy.run.plan import RunPlan
from cellseg_deploy.run.record import ImageResult, Inputs, RunOptions, RunSummary
from cellseg_deploy.run.session import RunSession
from cellseg_deploy.run.watching import CompleteFiles
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

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
    on_scale: Callable[[str], None] | None = None,
    complete: CompleteFiles | None = None,
    follow_links: bool = False,
    idle_seconds: float | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> RunSummary:
    """Segment the images of ``folder`` into ``out`` as they become complete (see ``watching``), until interrupted.

    ``idle_seconds``: end when for so long nothing new was complete and nothing was being written. A file whose content
    changes after its turn has another one. Tables are written at the end, and every half minute in which there is news.
    A folder that cannot be listed for a while, as when it is moved or its server restarts, is waited for, with one
    warning; at the first look it is an error. Images that failed as they were gone have another turn when they are
    back. The rest is as in ``folder_run.run_folder``; ``on_plan`` is told of each group of files.
    """
    if not os.path.isdir(folder):  # noqa: PTH112  (never raises)
        raise UsageError(f"{folder}: not a folder; only one folder can be watched")
    if idle_seconds is not None and not 0 < idle_seconds < float("inf"):
        raise UsageError(f"the folder must be idle for more than 0 seconds, got {idle_seconds}")
    check_apart([folder], out)
    complete = complete or CompleteFiles()
    inputs = Inputs.of([folder], follow_links=follow_links)

    paths = dict[str, Path]()  # of one group

    def tell(result: ImageResult) -> None:
        # It may be back by now. A link to nothing is there: it has another turn when its target appears.
        if result.was_gone and not os.path.islink(paths[result.image]):  # noqa: PTH114
            complete.forget(paths[result.image])
        if on_result is not None:
            on_result(result)
        tables.are_old = True
        tables.write_if_due()  # here too: one group may take hours

    session = RunSession(
        segmenter,
        out,
        options or RunOptions(),
        threads or thread_plans.plan(device=segmenter.backend.device),
        inputs=inputs,
        on_result=tell,
        on_scale=on_scale,
    )
    tables, look = _Tables(session.write_tables), _Looks(folder, follow_links)
    images = look()
    with held_folder(out), session.running([], expected={image.name for image in images or ()}):
        since = time.monotonic()
        while True:
            # What cannot be listed is neither new nor gone: files that were done are not to be taken for new ones.
            found = [] if images is None else complete.newly_complete(images)
            if found:
                paths = {image.name: image.path for image in found}
                todo = session.take(found)
                if on_plan is not None:
                    on_plan(todo)
                session.work(todo)
                tables.are_old = True
                since = time.monotonic()
            else:
                if images is not None and complete.waiting:
                    since = time.monotonic()
                elif idle_seconds is not None and time.monotonic() - since >= idle_seconds:
                    break
                time.sleep(poll_seconds)
            tables.write_if_due()
            images = look()
    if not session.summary.found:
        raise NothingToDoError(f"{folder}: no image came; expected PNG, JPEG or TIFF files")
    return session.summary


class _Looks:
    """The images in a folder, look by look; None while it, or a folder in it, cannot be listed.

    The first look says what there is to warn of, and raises ``UsageError`` as ``find_images`` does.
    """

    def __init__(self, folder: Path, follow_links: bool) -> None:
        self._folder, self._follow_links = folder, follow_links
        self._is_first, self._is_away = True, False

    def __call__(self) -> list[FoundImage] | None:
        try:
            # Not Path.is_dir, which raises for a server that does not answer; and a link to nothing is no image.
            if not os.path.isdir(self._folder):  # noqa: PTH112
                raise UsageError(f"{self._folder}: the folder is not there")
            images = find_images([self._folder], follow_links=self._follow_links, is_silent=not self._is_first)
        except UsageError as error:
            if self._is_first:
                raise
            if not self._is_away:
                _log.warning("%s; waiting until all folders can be listed again", error)
            self._is_away = True
            return None
        if self._is_away:
            _log.info("%s: can be listed again", self._folder)
        self._is_first = self._is_away = False
        return images


class _Tables:
    """The tables of a run that goes on: written now and then, by ``write``."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._not_before = time.monotonic() + TABLES_SECONDS
        self.are_old = False

    def write_if_due(self) -> None:
        start = time.monotonic()
        if self.are_old and start >= self._not_before:
            self._write()
            self.are_old = False
            end = time.monotonic()
            self._not_before = end + max(TABLES_SECONDS, _TABLES_SHARE * (end - start))
