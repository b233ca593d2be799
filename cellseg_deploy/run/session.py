"""A folder run between its first and its last image: what is done is kept, in the journal, whatever happens then.

Helper threads do everything about an image but its writing (``image_work``); files and the journal are written by the
caller's thread, image by image in the order of the run. An image's line follows its files, in one place (``_commit``).
Tables, and other files that tell of all images, are written from the journal when the run ends or is stopped.
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from cellseg_deploy import threads as thread_plans
from cellseg_deploy.batching import Job, Outcome
from cellseg_deploy.cells.scale import too_few_note
from cellseg_deploy.errors import DataError, OutputError, concerns_one_image
from cellseg_deploy.files.atomic import remove, set_aside, write_bytes
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.outputs.formats import Format, chosen_formats
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run import scales as run_scales
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.image_work import Finished, ImageWork
from cellseg_deploy.run.journal import Entry, ImageRecord, Journal
from cellseg_deploy.run.output_folder import RUN_JSON, TABLES, is_running, make_place, places, tells_of
from cellseg_deploy.run.plan import Planned, RunPlan, plan
from cellseg_deploy.run.record import (
    SKIPPED,
    ImageResult,
    Inputs,
    RunOptions,
    RunSummary,
    run_json,
    scales_in,
    with_edited_files,
)
from cellseg_deploy.run.resume import FolderState, begin, check_files, kept_files, some, sweep
from cellseg_deploy.run.run_identity import identity_of
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import ThreadPlan

_log = logging.getLogger(__name__)

_OF_THE_NAME = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EEXIST, errno.EISDIR, errno.ENOTDIR})
"""Errors of one file's name, not of the disk: they concern one image and not the run."""

_OF_WHAT_IS_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})


class RunSession:
    """A run into ``out``, which the caller holds (``outputs.folder.held_folder``) for as long as it lasts.

    >>> with session.running(images) as todo:  # doctest: +SKIP
    ...     session.work(todo)
    """

    def __init__(
        self,
        segmenter: Segmenter,
        out: Path,
        options: RunOptions,
        threads: ThreadPlan,
        *,
        inputs: Inputs,
        on_result: Callable[[ImageResult], None] | None = None,
        on_scale: Callable[[str], None] | None = None,
    ) -> None:
        """``on_result``: told of each image worked on, in the order of the run. ``on_scale``: of each scale that was
        measured, in a line."""
        self.segmenter = segmenter
        self.out = out
        self.options = options
        self.threads = threads
        self.inputs = inputs
        self.identity = identity_of(segmenter, options, inputs)
        self.formats = chosen_formats(options.save)
        self.summary = RunSummary(found=0, output=out)
        self._on_result, self._on_scale = on_result, on_scale
        self._scales = dict(options.scales)
        self._image_work = ImageWork(segmenter, options, self.formats)
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.perf_counter()
        self._state = FolderState("fresh")
        self._others: set[str] = set()
        self._expected: set[str] = set()  # images done before that will be given: till then nobody looks at their files
        self._results: dict[str, ImageResult] = {}  # without their words and times, which would pile up
        self._valid: set[str] = set()  # images whose last line in the journal is a result
        self._names: dict[str, str] = {}  # what the files of images of this session are called
        self._journal: Journal | None = None
        self._is_stopped = self._has_worked = False

    @contextmanager
    def running(self, images: Sequence[FoundImage], *, expected: Collection[str] = ()) -> Iterator[RunPlan]:
        """Begin the run, or go on with the one in the folder, and give what is to be done with ``images``.

        ``expected``: names of images that will be taken later; what was recorded of them holds until then. At the end
        all tables take their place, whether the block ends well, is interrupted or breaks. Raises ``OutputError`` if
        the folder is not usable, or cannot be written.
        """
        self._state = begin(self.out, self.identity, overwrite=self.options.overwrite)
        self._expected = set(expected)
        todo = self.take(images)
        self._sweep(todo)
        if (journal := self._state.journal) is not None:  # run.json has them too, should a line of the journal be lost
            self._scales |= scales_in(self.out / RUN_JSON) | journal.scales
        with self._open_journal() as self._journal, self._kept_if_stopped(lambda: None):
            yield todo
            self._end()

    def take(self, images: Sequence[FoundImage]) -> RunPlan:
        """What is to be done with ``images``, which from now on belong to the run; those done before are counted.

        An image that has another turn is compared with what this session recorded of it, which may be other than what
        an earlier one did: of a file that has its former bytes again, the results are those of the bytes in between.
        """
        if any(image.name in self._names for image in images):
            self._state = FolderState("resume", journal=journals.read(self.out / journals.JOURNAL))
        todo = plan(images, self.out, self._state, self.formats, self._names)
        kept = list[str]()
        for item in todo.items:
            name = item.image.name
            self._expected.discard(name)
            self._edited(item.edited)
            for place in item.outdated:
                self._set_aside(place)
            if item.action == "keep" and name not in self._names:
                kept.append(name)
                continue
            self.summary.found += name not in self._names
            self._names[name] = item.output_name
            self._others.discard(name)
            if item.action in ("skip", "keep") and name in self._results:  # it has been counted; its file was touched
                continue
            if (former := self._results.pop(name, None)) is not None:  # its file was changed after its turn
                self.summary.forget(former)
            if item.action == "skip":
                self._valid.add(name)
                before = ImageResult.of(self._recorded()[name].record)
                self._count(replace(before, status=SKIPPED, seconds={}))
            elif (entry := self._recorded().get(name)) is not None and entry.record.status == "failed":
                self._valid.add(name)  # that it failed holds until it was tried again
            else:
                self._valid.discard(name)
        if kept:
            _log.warning("%d images that are done cannot be read now (%s): their results stay", len(kept), some(kept))
        self._others.update(kept)
        self._valid.update(kept)
        self.summary.others = len(self._others)
        return todo

    def work(self, todo: RunPlan) -> None:
        """Do what ``todo`` says: every image that is not done."""
        items = [item for item in todo.items if item.action in ("work", "fail")]
        if not items:
            return
        self._prepare()
        found = self._find_scales(items)
        outcomes = self.segmenter.overlapped(
            [self._job(item, found.get(item.image.name)) for item in items], self.threads
        )
        with ExitStack() as stack:
            stack.enter_context(thread_plans.single_threaded_libraries())
            # Left in reverse order: after an interrupt the tables are written first, then threads are waited for.
            stack.enter_context(outcomes)
            stack.enter_context(self._kept_if_stopped(outcomes.stop))
            before = self.summary.engine_seconds
            for item, outcome in zip(items, outcomes, strict=True):
                result = self._one_image(item, outcome)
                self.summary.engine_seconds = before + outcomes.engine_seconds
                if self._on_result is not None:
                    self._on_result(result)

    def write_tables(self) -> None:
        """cells.csv and images.csv of what is done by now, in the order of names. Raises ``OutputError``."""
        entries = self._entries()
        run_tables.write(self.out, self.out / journals.JOURNAL, entries)
        self.summary.warnings = run_tables.warned(entries)

    def _prepare(self) -> None:
        """Before the first image is worked on."""
        if not self._has_worked:
            self._has_worked = True
            self._write_run_json("running")

    def _find_scales(self, items: Sequence[Planned]) -> dict[str, float]:
        """The scale of each image by name, where it is measured: of each group once in the life of a run."""
        if not self.segmenter.auto_scale or self._journal is None:
            return {}
        found, unclear = dict[str, float](), list[str]()
        for group, images in run_scales.groups_of(item.image for item in items).items():
            if group not in self._scales:
                sample = run_scales.sample(images, self.options)
                with thread_plans.single_threaded_libraries():
                    choice = self.segmenter.find_scale(sample, field=self.options.field_of_view)
                self._journal.append_scale(group, choice.scale)
                self._scales[group] = choice.scale
                if choice.note:
                    unclear.append(group)
                elif self._on_scale is not None:
                    self._on_scale(run_scales.said(group, choice, self.segmenter.backend.spec.cell_diameter_px))
            found |= {image.name: self._scales[group] for image in images}
        if unclear:
            spec = self.segmenter.backend.spec
            _log.warning("%s: %s", some(unclear), too_few_note(spec.cell_diameter_px, spec.image_scale))
        if found:
            self._write_run_json("running")
        return found

    def _job(self, item: Planned, scale: float | None) -> Job[Finished]:
        work = self._image_work
        return Job(partial(work, item.image, item.output_name, scale), partial(work.bytes_in_flight, item.image, scale))

    # ------------------------------------------------------------------------------------------------ begin and end

    def _recorded(self) -> dict[str, Entry]:
        """What earlier sessions of the run recorded, and this one up to the last time that an image came again."""
        return {} if self._state.journal is None else self._state.journal.entries

    def _sweep(self, todo: RunPlan) -> None:
        """Remove what belongs to no result. Results of images that are not given now stay: somebody counted them."""
        others = {name: entry for name, entry in self._recorded().items() if name not in self._names}
        unchecked = others.keys() - self._valid - self._expected
        self._others = set(others)
        self._valid |= self._others
        lost = self._drop_lost(unchecked)
        names = {entry.record.output_name for entry in self._recorded().values()} | set(self._names.values())
        ours = places(self.formats, names - {""})
        # What is left of a result that lost a file stays too: nobody could make it again.
        keep = kept_files({name: self._recorded()[name] for name in self._valid | lost}) | self.summary.edited
        sweep(self.out, keep, ours)
        self._set_edited_tables_aside()
        made_anew = [format.run_file for format in self.formats if format.run_file]
        if todo.counts["work"] + todo.counts["fail"]:  # they would tell of results that are about to change
            made_anew += TABLES
        for name in made_anew:  # at the end, or when the run is stopped, of what is done by then
            remove(self.out / name)

    def _drop_lost(self, names: Collection[str]) -> set[str]:
        """Of ``names``, images that are not given, those whose files are not as they were: no table tells of them."""
        recorded = self._recorded()
        lost = set[str]()
        for name in sorted(names):
            problem, edited = check_files(recorded[name].record, self.out)
            self._edited(edited)
            if problem:
                lost.add(name)
        if lost:
            _log.warning(
                "results left out of the tables, as their images are not given now and files of them are gone or "
                "damaged: %s. With these files as they were, or with the images, they are back at the next start",
                some(sorted(lost)),
            )
        self._others -= lost
        self._valid -= lost
        self.summary.others = len(self._others)
        return lost

    def _edited(self, files: Collection[str]) -> None:
        """Say once, of each of ``files``, that it was edited."""
        if new := sorted(set(files) - self.summary.edited):
            _log.warning(
                "edited since the run, and kept: %s; rows of the tables are those of the run. Replace all with "
                "--overwrite, or delete the file to have it made again",
                some(new),
            )
            self.summary.edited.update(new)

    def _set_aside(self, place: str, why: str = "was edited since the run") -> None:
        aside = set_aside(self.out / place)
        _log.warning("%s: %s; kept as %s", self.out / place, why, aside.name)
        self.summary.edited.discard(place)

    def _set_edited_tables_aside(self) -> None:
        """Of a run that was killed the journal may be ahead of the tables."""
        if (content := self._state.journal) is not None:
            done = {name for name in self._valid if content.entries[name].record.status == "done"}
            must_have = set[str]() if is_running(self.out / RUN_JSON) else done
            for name in run_tables.edited(self.out, content, must_have):
                self._set_aside(name, "is not what the journal gives, as after an edit")

    def _open_journal(self) -> Journal:
        content = self._state.journal
        if content is None:
            return Journal.create(self.out, self.identity)
        if content.damaged:
            lines = some([str(number) for number in content.damaged])
            _log.warning("%s: damaged in line %s; the images of these are done again", content.path, lines)
        return Journal.resume(content)

    @contextmanager
    def _kept_if_stopped(self, stop: Callable[[], None]) -> Iterator[None]:
        """The tables of what is done take their place if the block raises; ``stop`` is called before."""
        try:
            yield
        except BaseException:  # of any kind: hours of counting must not go with it; raised again below
            stop()
            if not self._is_stopped:
                self._is_stopped = True
                with deferred_signals():  # a second Ctrl-C waits for it
                    self._write_what_is_done()
            raise

    def _write_what_is_done(self) -> None:
        """Of a run that stops. What cannot be written is said; the error that stopped the run is the one to raise."""

        def write_run_json() -> None:
            if self._has_worked or is_running(self.out / RUN_JSON):
                self._write_run_json("stopped")

        writes: list[Callable[[], None]] = [self.write_tables, write_run_json]
        writes += [partial(self._write_run_file, format) for format in self.formats if format.run_file]
        for write in writes:
            try:
                write()
            except OutputError as error:  # as on a full disk
                _log.warning("%s; it is written when the run goes on", error)

    def _write_run_file(self, format: Format) -> None:
        """The file of ``format`` that tells of all images, from those of each of them if it has such."""
        entries = self._entries() if format.folder else []
        done = [entry.record.output_name for entry in entries if entry.record.status == "done"]
        format.finish(self.out, [self.out / format.place(name) for name in done])

    def _end(self) -> None:
        self._drop_lost(self._expected & self._valid)  # they did not come
        self.write_tables()
        for format in self.formats:
            if format.run_file:
                self._write_run_file(format)
        if self.summary.remaining:
            raise RuntimeError(f"{self.summary.found} images found, but {self.summary} was recorded")
        self.summary.wall_seconds = time.perf_counter() - self._clock
        # A run.json that tells of the work is not replaced by one that tells of none, or of some of its images only.
        if self._has_worked or not tells_of(self.out / RUN_JSON, None if self.summary.others else self.summary.totals):
            self._write_run_json("finished")
        elif (content := with_edited_files(self.out / RUN_JSON, self.summary)) is not None:
            write_bytes(self.out / RUN_JSON, content)

    def _entries(self) -> list[Entry]:
        """The last record of each image that has a result, in the order of names."""
        entries = journals.read(self.out / journals.JOURNAL).entries
        return [entries[name] for name in sorted(self._valid)]

    def _write_run_json(self, status: str) -> None:
        self.summary.wall_seconds = time.perf_counter() - self._clock
        record = run_json(
            self.segmenter,
            self.options,
            self.threads,
            self.summary,
            identity=self.identity,
            inputs=self.inputs,
            status=status,
            started=self._started,
            scales=self._scales,
        )
        write_bytes(self.out / RUN_JSON, record)

    # ---------------------------------------------------------------------------------------------------- each image

    def _one_image(self, item: Planned, outcome: Outcome[Finished]) -> ImageResult:
        try:
            return self._commit(item, outcome.get())
        except BaseException as error:
            if not concerns_one_image(error):
                raise
            if isinstance(error, MemoryError):
                said = f" ({error})" if str(error) else ""
                reason = f"not enough memory{said}; try --batch-size 1 or smaller images"
            elif isinstance(error, DataError):
                reason = str(error)
            else:
                _log.exception("%s: internal error", item.image.name)
                reason = f"internal error, please report it: {type(error).__name__}: {error}"
            cause = error.__cause__
            was_gone = isinstance(cause, OSError) and cause.errno in _OF_WHAT_IS_GONE
        failure = self._commit_failure(item, reason.removeprefix(f"{item.image.path}: "))
        return replace(failure, was_gone=was_gone)

    def _commit(self, item: Planned, finished: Finished) -> ImageResult:
        """Files of an image and its line in the journal, or neither: the one place where results are written.

        Edited files stay as they are; the line tells of those that the image gives.
        """
        with deferred_signals():
            start = time.perf_counter()
            written = list[Path]()
            try:
                for place, content in finished.files.items():
                    if place in item.edited:
                        continue
                    written.append(make_place(self.out, place))
                    write_bytes(written[-1], content)
                seconds = dict(finished.seconds)
                seconds["write"] += time.perf_counter() - start
                return self._append(replace(finished.record, seconds=seconds))
            except BaseException as error:
                for path in written:
                    with suppress(OSError):  # the first error is the one to say; the next run sweeps what stays
                        path.unlink(missing_ok=True)
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_THE_NAME:
                    raise DataError(f"its results cannot have its name: {error}") from error
                raise

    def _commit_failure(self, item: Planned, reason: str) -> ImageResult:
        """Of an image that fails now and was done before, nothing is left that looks like a result."""
        with deferred_signals():
            for place in item.edited:
                self._set_aside(place)
            for place in item.files:
                path = self.out / place
                # And not a folder. Path's methods raise for a name that is impossible itself.
                if os.path.islink(path) or os.path.isfile(path):  # noqa: PTH113, PTH114
                    remove(path)
            return self._append(run_tables.failed(item.image.name, reason))

    def _append(self, record: ImageRecord) -> ImageResult:
        """Called with signals held back, so that journal, tables and totals are of the same images."""
        assert self._journal is not None
        self._journal.append(record)
        self._valid.add(record.image)
        result = ImageResult.of(record)
        self._count(result)
        return result

    def _count(self, result: ImageResult) -> None:
        self.summary.add(result)
        self._results[result.image] = ImageResult(result.image, result.status, result.cells, result.counted)
