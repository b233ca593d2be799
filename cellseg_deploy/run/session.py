"""The course of a run: begin or resume, do the images of each round, write the tables.

Helper threads do everything for an image except writing (``image_work``); the caller's thread writes files and journal
(``commit``), image by image in the order of the run. Tables and other run-level files are written from the journal
when the run ends or is stopped.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.batching import Job, Outcome, alone
from cellseg_deploy.cells.scale import too_few_note
from cellseg_deploy.errors import DataError, OutputError, concerns_one_image, plural
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.images import groups
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.report.page import About
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.commit import Committer
from cellseg_deploy.run.elsewhere import ImageTask, Outcomes
from cellseg_deploy.run.image_work import Finished, ImageWork
from cellseg_deploy.run.journal import Journal
from cellseg_deploy.run.output_folder import RUN_JSON, held_folder, is_running, places, sweep, tells_of
from cellseg_deploy.run.plan import Planned, RunPlan, plan
from cellseg_deploy.run.record import (
    SKIPPED,
    ImageResult,
    RunSetup,
    RunSummary,
    run_json,
    scales_in,
    with_edited_files,
)
from cellseg_deploy.run.reporting import Reporting, RunFile
from cellseg_deploy.run.resume import FolderKind, begin, some
from cellseg_deploy.run.shard import record_of as shard_record
from cellseg_deploy.run.state import RunState
from cellseg_deploy.run.streamed import forget, is_streamed

_log = logging.getLogger(__name__)

_TABLES_SHARE = 20  # tables take the whole journal: between two writes, do other work for this many times as long


def run(setup: RunSetup, rounds: Iterable[Sequence[FoundImage]]) -> RunSummary:
    """Process the images of each of ``rounds``, in a new run or resuming the run in the folder.

    An image may come again: it is done again if it was changed. Tables are written whether the run ends normally, is
    interrupted or fails. Raises ``OutputError`` if the folder is not usable, or cannot be written.
    """
    out, identity = setup.out, setup.identity
    with held_folder(out):
        folder = begin(out, identity, overwrite=setup.options.overwrite)
        state = RunState.of(folder.journal)
        # run.json has the scales too, in case a journal line is lost
        recorded = {} if folder.journal is None else scales_in(out / RUN_JSON)
        state.scales = {**setup.options.scales, **recorded, **state.scales}
        with Journal.create(out, identity) if folder.journal is None else Journal.resume(folder.journal) as journal:
            committer = Committer(out, state, journal, setup.formats, _run_files(setup))
            sweep(out, state.image_files, places(setup.formats, state.output_names.values()))
            session = _Session(setup, committer, folder.kind)
            with session.tables_if_stopped(lambda: None):
                for images in session.counting_idle(rounds):
                    if images:
                        session.do(images)
                    session.write_tables_if_due()
                session.end()
    return session.summary


def _run_files(setup: RunSetup) -> dict[str, RunFile]:
    """What writes sums and report."""
    options, spec = setup.options, setup.segmenter.backend.spec
    about = About(setup.identity.to_json(), spec, options.save, options.group_by) if options.report else None
    return Reporting(options, about, is_watched=setup.tables_seconds is not None).run_files()


class _Session:
    """The mutable state of ``run``."""

    def __init__(self, setup: RunSetup, committer: Committer, folder: FolderKind) -> None:
        self.setup = setup
        spec, counting = setup.segmenter.backend.spec, setup.segmenter.counting_classes
        self.summary = RunSummary(setup.out, classes=spec.classes, counting=counting)
        self._committer, self._state, self._folder = committer, committer.state, folder
        self._image_work = ImageWork(*(setup.segmenter, setup.options, setup.formats, setup.out, setup.on_stream))
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self._with_thresholds = set[str]()
        self._is_stopped = self._has_worked = self._has_news = False
        self._tables_not_before = time.monotonic() + (setup.tables_seconds or 0)

    # ---------------------------------------------------------------------------------------------------- each round

    def counting_idle(self, rounds: Iterable[Sequence[FoundImage]]) -> Iterator[Sequence[FoundImage]]:
        """Yield each of ``rounds``; the time until it comes is idle, as a watched folder is waited for."""
        start = time.perf_counter()
        for images in rounds:
            self.summary.idle_seconds += time.perf_counter() - start
            yield images
            start = time.perf_counter()
        self.summary.idle_seconds += time.perf_counter() - start

    def do(self, images: Sequence[FoundImage]) -> None:
        """Process ``images``, except those that are already done."""
        shard = self.setup.options.shard
        todo = plan(images, self.setup.out, self._folder, self._state, self.setup.formats, shard)
        if shard is not None:
            self.summary.shard = shard_record(shard, (image.name for image in images))
        for item in todo.items:
            self._take(item)
        self._warn(todo)
        self._with_thresholds |= self._spread(sorted(image.name for image in images))
        items = [item for item in todo.items if item.action != "skip"]
        if items and not self._has_worked:
            self._committer.clear()
        if self.setup.on_plan is not None:
            self.setup.on_plan(todo)
        if items:
            self._work(items, images)

    def _spread(self, names: Sequence[str]) -> set[str]:
        """Choose some of ``names``, evenly spaced, for the report's thresholds; the same when the run is resumed."""
        most = min(self.setup.options.report_thresholds - len(self._with_thresholds), len(names))
        return {names[index * len(names) // most] for index in range(most)}

    def _take(self, item: Planned) -> None:
        name = item.image.name
        if item.action != "skip":
            self.summary.images[name] = ImageResult(name, "")
            if self._state.done(name) is None:
                self._committer.remove_files(item)
        elif name not in self.summary.images:  # else its file was only touched
            self.summary.add(ImageResult.of(self._state.entries[name].record), SKIPPED)

    def _warn(self, todo: RunPlan) -> None:
        edited = {file for item in todo.items if not item.is_changed for file in item.edited} - self.summary.edited
        if edited:
            _log.warning(
                "edited since the run, and kept: %s; the tables still hold the run's rows. Replace all with "
                "`overwrite=True`, or delete a file to have it written again",
                some(sorted(edited)),
            )
            self.summary.edited |= edited
        if unreadable := [item.image.name for item in todo.items if item.action == "skip" and item.reason]:
            _log.warning(
                "%s can no longer be read (%s); earlier results are kept",
                plural(len(unreadable), "finished image"),
                some(unreadable),
            )

    def _work(self, items: Sequence[Planned], images: Sequence[FoundImage]) -> None:
        if not self._has_worked:
            self._has_worked = True
            self._write_run_json("running")
        found = self._find_scales(items, images)
        outcomes = self._outcomes([self._task(item, found.get(item.image.name)) for item in items])
        with ExitStack() as stack:
            stack.enter_context(thread_plans.single_threaded_libraries())
            # Exited in reverse order: after an interrupt the tables are written first, then the threads are joined.
            stack.enter_context(outcomes)
            stack.enter_context(self.tables_if_stopped(outcomes.stop))
            before = self.summary.engine_seconds
            for item, outcome in zip(items, outcomes, strict=True):
                result = self._one_image(item, outcome)
                self.summary.engine_seconds = before + outcomes.engine_seconds
                if self.setup.on_result is not None:
                    self.setup.on_result(result)
                self._has_news = True
                self.write_tables_if_due()  # here too: one round may take hours

    def _find_scales(self, items: Sequence[Planned], among: Sequence[FoundImage]) -> dict[str, float]:
        """Return the scale of each image by name, if scales are measured: once per group in the life of a run.

        ``among``: all images found. A shard measures each group in these, so that all shards find the same scale.
        """
        segmenter, options = self.setup.segmenter, self.setup.options
        if not segmenter.auto_scale:
            return {}
        spec = segmenter.backend.spec
        found, unclear = dict[str, float](), list[str]()
        own = groups.groups_of(item.image for item in items)
        is_part = options.shard is not None and not own.keys() <= self._state.scales.keys()
        whole = groups.groups_of(among) if is_part else own
        for group, images in own.items():
            if group not in self._state.scales:
                # An image that is read by region is measured in its middle, as by ``slides``. The images of a group are
                # of one size: usually all or none are read by region.
                chosen = self._read_whole(groups.spread(whole[group])) or groups.spread(self._read_whole(whole[group]))
                if not chosen:
                    continue
                sample = groups.sample(chosen, options.reading)
                with thread_plans.single_threaded_libraries():
                    choice = segmenter.find_scale(sample, field=options.field_of_view)
                self._committer.append_scale(group, choice.scale)
                if choice.note:
                    unclear.append(group)
                elif self.setup.on_scale is not None:
                    self.setup.on_scale(choice.summary(group, spec.cell_diameter_px))
            found |= {image.name: self._state.scales[group] for image in images}
        if unclear:
            _log.warning("%s: %s", some(unclear), too_few_note(spec.cell_diameter_px, spec.image_scale))
        if found:
            self._write_run_json("running")
        return found

    def _read_whole(self, images: Iterable[FoundImage]) -> list[FoundImage]:
        return [image for image in images if not is_streamed(image.path)]

    def _task(self, item: Planned, scale: float | None) -> ImageTask:
        image, name, segmenter = item.image, item.output_name, self.setup.segmenter
        nbytes = partial(self._image_work.bytes_in_flight, image, scale)
        network = alone(segmenter.backend.predict, segmenter.batch_size)
        by_region = partial(self._image_work.by_region, image, name, network)
        return ImageTask(image, name, scale, image.name in self._with_thresholds, nbytes, by_region)

    def _outcomes(self, tasks: Sequence[ImageTask]) -> Outcomes:
        if self.setup.elsewhere is not None:
            return self.setup.elsewhere.outcomes(self.setup, tasks)
        jobs = [
            Job(
                partial(
                    self._image_work, task.image, task.output_name, task.scale, with_thresholds=task.with_thresholds
                ),
                task.nbytes,
            )
            for task in tasks
        ]
        return self.setup.segmenter.overlapped(jobs, self.setup.threads)

    def _one_image(self, item: Planned, outcome: Outcome[Finished]) -> ImageResult:
        try:
            finished = outcome.get()
            with deferred_signals():  # so that journal and totals cover the same images
                result = self._committer.commit(item, finished)
                self.summary.add(result)
            forget(self.setup.out, [item.image.name])
            return result
        except BaseException as error:
            if not concerns_one_image(error):
                raise
            if isinstance(error, MemoryError):
                said = f" ({error})" if str(error) else ""
                reason = f"not enough memory{said}; try `batch_size=1` or smaller images"
            elif isinstance(error, DataError):
                reason = str(error)
            else:
                _log.exception("%s: internal error", item.image.name)
                reason = f"internal error, please report it: {type(error).__name__}: {error}"
        with deferred_signals():
            result = self._committer.commit_failure(item, reason.removeprefix(f"{item.image.path}: "))
            self.summary.edited -= set(item.edited)
            self.summary.add(result)
        forget(self.setup.out, [item.image.name])
        return result

    # -------------------------------------------------------------------------------------------------------- the end

    def write_tables_if_due(self) -> None:
        """Write the tables if there are new results and the interval has passed."""
        start = time.monotonic()
        if self.setup.tables_seconds is None or not self._has_news or start < self._tables_not_before:
            return
        self._committer.write_tables()
        self._has_news = False
        end = time.monotonic()
        self._tables_not_before = end + max(self.setup.tables_seconds, _TABLES_SHARE * (end - start))

    def end(self) -> None:
        """Write the run-level files. Raises ``OutputError``, and ``RuntimeError`` if an image was lost."""
        for write in self._committer.writers():
            write()
        if self.summary.remaining:
            raise RuntimeError(f"{self.summary.found} images found, but {self.summary.remaining} were not recorded")
        forget(self.setup.out, None)  # of images that are gone, or were recorded just before a kill
        self._count()
        record = self.setup.out / RUN_JSON
        # A run that had nothing to do must not replace a finished run's run.json, which may also cover more images.
        totals = None if self.summary.others else self.summary.totals
        if self._has_worked or not tells_of(record, totals, self.summary.shard):
            self._write_run_json("finished")
        elif (content := with_edited_files(record, self.summary)) is not None:
            write_bytes(record, content)

    @contextmanager
    def tables_if_stopped(self, stop: Callable[[], None]) -> Iterator[None]:
        """Write the tables of the finished images if the block raises; ``stop`` is called first."""
        try:
            yield
        except BaseException:  # of any kind: hours of counting must not be lost; raised again below
            stop()
            if not self._is_stopped:
                self._is_stopped = True
                with deferred_signals():  # a second Ctrl-C waits until this is done
                    self._write_what_is_done()
            raise

    def _write_what_is_done(self) -> None:
        """Write tables and run.json after an error. Failures here are logged, so that the original error is raised."""

        def write_run_json() -> None:
            if self._has_worked or is_running(self.setup.out / RUN_JSON):
                self._write_run_json("stopped")

        tables, *others = self._committer.writers(is_stopped=True)
        for write in (tables, write_run_json, *others):
            try:
                write()
            except OutputError as error:  # for example a full disk
                _log.warning("%s; it will be written when the run is resumed", error)

    def _count(self) -> None:
        self.summary.others = len(self._state.entries.keys() - self.summary.images.keys())
        self.summary.warnings = run_tables.warned(self._state.in_order)
        self.summary.wall_seconds = time.perf_counter() - self._clock

    def _write_run_json(self, status: str) -> None:
        self._count()
        record = run_json(self.setup, self.summary, status=status, started=self._started, scales=self._state.scales)
        write_bytes(self.setup.out / RUN_JSON, record)
