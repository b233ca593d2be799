"""Write results: an image's files and its journal line, or neither; tables from the journal."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from cellseg_deploy.errors import DataError, OutputError
from cellseg_deploy.files.atomic import move, remove, set_aside, temporary_in, write_bytes
from cellseg_deploy.files.fingerprint import sha256_of
from cellseg_deploy.files.signals import deferred_signals
from cellseg_deploy.outputs.formats import SUMMARY_CSV, Format
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import ImageRecord, Journal
from cellseg_deploy.run.output_folder import ALWAYS, TABLES, make_place
from cellseg_deploy.run.plan import Planned
from cellseg_deploy.run.record import ImageResult
from cellseg_deploy.run.reporting import RunFile
from cellseg_deploy.run.state import RunState

_log = logging.getLogger(__name__)

_OF_THE_NAME = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EEXIST, errno.EISDIR, errno.ENOTDIR})
"""Errors caused by one file's name, not by the disk: they concern one image, not the run."""


class Committer:
    """Writes to the output folder ``out``, which the caller has locked, and its journal; keeps ``state`` up to date.

    Signals are deferred during a commit, so that files, journal and ``state`` cover the same images.
    """

    def __init__(
        self,
        out: Path,
        state: RunState,
        journal: Journal,
        formats: Sequence[Format],
        run_files: Mapping[str, RunFile],
    ) -> None:
        self.out = out
        self.state = state
        self._journal = journal
        self._run_files = dict(run_files)
        self._run_formats = [format for format in formats if format.run_file]

    # ---------------------------------------------------------------------------------------------------- one image

    def commit(self, item: Planned, finished: Finished) -> ImageResult:
        """Write the files of an image and its journal line, or neither.

        Edited files stay as they are, and the line records the content they should have; edited files of a changed
        image are renamed. Raises ``DataError`` if a file name is impossible, ``OutputError``.
        """
        with deferred_signals():
            start = time.perf_counter()
            if item.is_changed:  # should the process end, no line vouches for the old files any more
                self._set_aside(item.edited)
                self._append(run_tables.failed(item.image.name, "changed, and not finished when the run ended"))
            written = list[Path]()
            try:
                for place, content in finished.files.items():
                    if place in item.edited and not item.is_changed:
                        continue
                    written.append(make_place(self.out, place))
                    if isinstance(content, Path):
                        move(content, written[-1])
                    else:
                        write_bytes(written[-1], content)
                seconds = dict(finished.seconds)
                seconds["write"] += time.perf_counter() - start
                return self._append(replace(finished.record, seconds=seconds))
            except BaseException as error:
                for path in written:
                    with suppress(OSError):  # the first error is the one to report; the next run sweeps leftovers
                        path.unlink(missing_ok=True)
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_THE_NAME:
                    raise DataError(f"its results cannot be written under its name: {error}") from error
                raise
            finally:
                for content in finished.files.values():
                    if isinstance(content, Path):  # not moved: for an edited file, or after an error
                        with suppress(OSError):
                            content.unlink(missing_ok=True)

    def commit_failure(self, item: Planned, reason: str) -> ImageResult:
        """Add the line of a failed image; remove its earlier files, so that none pass for a result."""
        with deferred_signals():
            self._set_aside([place for place in item.edited if os.path.lexists(self.out / place)])
            self.remove_files(item)
            return self._append(run_tables.failed(item.image.name, reason))

    def remove_files(self, item: Planned) -> None:
        """Remove the files of an image that no journal line vouches for."""
        for place in item.files:
            path = self.out / place
            # Never a folder. Path's methods raise if the name itself is impossible.
            if os.path.islink(path) or os.path.isfile(path):  # noqa: PTH113, PTH114
                remove(path)

    def append_scale(self, group: str, scale: float) -> None:
        """Record the ``scale`` measured for a ``group`` of images."""
        self._journal.append_scale(group, scale)
        self.state.scales[group] = scale

    def _append(self, record: ImageRecord) -> ImageResult:
        self.state.entries[record.image] = self._journal.append(record)
        return ImageResult.of(record)

    # ------------------------------------------------------------------- run-level files, which cover all images

    def write_tables(self) -> None:
        """Write cells.csv, images.csv and summary.csv from ``state``. Raises ``OutputError``."""
        entries = self.state.in_order
        for name in TABLES:
            self._publish(name, partial(run_tables.write, table=name, journal=self._journal.path, entries=entries))
        self._write_of_run(SUMMARY_CSV)

    def writers(self, *, is_stopped: bool = False) -> list[Callable[[], None]]:
        """Return one writer per run-level file, tables first: other files are made from the tables.

        ``is_stopped``: somebody waits for the run to end.
        """
        reports = [name for name in self._run_files if name != SUMMARY_CSV]
        return [
            self.write_tables,
            *(partial(self._write_run_file, format) for format in self._run_formats),
            *(partial(self._write_of_run, name, is_stopped=is_stopped) for name in reports),
        ]

    def _write_of_run(self, name: str, *, is_stopped: bool = False) -> None:
        make, entries = self._run_files[name], self.state.in_order
        self._publish(name, lambda path: make(path, self._journal.path, entries, is_stopped=is_stopped))

    def clear(self) -> None:
        """Remove the run-level files, as results are about to change; edited files are renamed."""
        for name in (*ALWAYS, *(format.run_file for format in self._run_formats)):
            if self._is_edited(name):
                self._set_aside([name])
            remove(self.out / name)

    def _write_run_file(self, format: Format) -> None:
        done = [entry.record.output_name for entry in self.state.in_order if entry.record.status == "done"]
        files = [self.out / format.place(name) for name in done] if format.folder else []
        self._publish(format.run_file, lambda path: format.finish(self.out, files, path))

    def _publish(self, name: str, make: Callable[[Path], None]) -> None:
        """Publish the file that ``make`` writes under ``name``; an edited file of that name is renamed first."""
        temporary = temporary_in(self.out)
        try:
            make(temporary)
            sha256 = sha256_of(temporary)
            if self._is_edited(name, sha256):
                self._set_aside([name])
            if sha256 not in self.state.files.setdefault(name, set()):
                self._journal.append_file(name, sha256)
                self.state.files[name].add(sha256)
            move(temporary, self.out / name)
        except BaseException:
            with suppress(OSError):  # its name marks it as temporary: the next start removes it
                temporary.unlink(missing_ok=True)
            raise

    def _is_edited(self, name: str, new_sha256: str = "") -> bool:
        """Whether a run-level file has content that no run here wrote. Empty files and links do not count."""
        path = self.out / name
        try:
            if path.is_symlink() or not path.is_file() or not path.stat().st_size:
                return False
            return sha256_of(path) not in {new_sha256, *self.state.files.get(name, ())}
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error.strerror or error}); check permissions") from error

    def _set_aside(self, places: Sequence[str]) -> None:
        for place in places:
            aside = set_aside(self.out / place)
            _log.warning("%s: was edited since the run; kept as %s", self.out / place, aside.name)
