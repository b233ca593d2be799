"""Sums and report of a run, from its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from cellseg_deploy.outputs.formats import SUMMARY_CSV
from cellseg_deploy.report import multiqc, page, summary
from cellseg_deploy.report.groups import grouping
from cellseg_deploy.report.results import ImageRow, Results
from cellseg_deploy.report.thresholds import MAX_IMAGES
from cellseg_deploy.run import tables
from cellseg_deploy.run.journal import Entry, whole_records
from cellseg_deploy.run.record import RunOptions

PICTURES_AT_A_STOP = 200
"""Images of a stopped run that get pictures in its report, in a second or two; with more there are none."""


class RunFile(Protocol):
    """Writes a file of the whole run."""

    def __call__(self, path: Path, journal: Path, entries: Sequence[Entry], /, *, is_stopped: bool) -> None:
        """Write ``path`` from the last lines of all images in ``journal``, in order; ``is_stopped``: be quick."""


@dataclass(frozen=True)
class Reporting:
    """``about``: for the page; None: sums only, no report. ``is_watched``: such a run usually ends by being stopped,
    and has its pictures then."""

    options: RunOptions
    about: page.About | None
    is_watched: bool = False

    def run_files(self) -> dict[str, RunFile]:
        """Return by name what writes each file of sums and report; summary.csv first."""
        files: dict[str, RunFile] = {SUMMARY_CSV: self._from_results(summary.write)}
        if self.about is None:
            return files
        command = self.about.command
        return files | {
            page.REPORT_HTML: partial(self._page, self.about),
            multiqc.IMAGES_MQC: self._from_results(lambda path, results: multiqc.write_images(path, results, command)),
            multiqc.GROUPS_MQC: self._from_results(
                lambda path, results: multiqc.write_groups(path, summary.summarise(results), command)
            ),
        }

    def _from_results(self, write: Callable[[Path, Results], None]) -> RunFile:
        def file(path: Path, journal: Path, entries: Sequence[Entry], /, *, is_stopped: bool) -> None:  # noqa: ARG001
            write(path, self._results(journal, entries))

        return file

    def _page(
        self, about: page.About, path: Path, journal: Path, entries: Sequence[Entry], /, *, is_stopped: bool
    ) -> None:
        results = self._results(journal, entries)
        pictures = self.is_watched or not is_stopped or len(entries) <= PICTURES_AT_A_STOP
        page.write(path, journal.parent, results, about, pictures=pictures)

    def _results(self, journal: Path, entries: Sequence[Entry]) -> Results:
        group_of = grouping(self.options.group_by)
        with_cells = [entry for entry in entries if entry.record.result.get("cells")]
        return Results(
            [_row(entry, group_of) for entry in entries],
            tables.cell_columns(entries),
            lambda: ((record.image, record.cells) for record in whole_records(journal, with_cells)),
            lambda: self._thresholds(journal, entries),
        )

    def _thresholds(self, journal: Path, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
        if self.options.report_thresholds:
            records = whole_records(journal, entries)
            known = ((record.image, record.thresholds) for record in records if record.thresholds)
            yield from islice(known, MAX_IMAGES)


def _row(entry: Entry, group_of: Callable[[str], str]) -> ImageRow:
    record = entry.record
    return ImageRow(record.image, group_of(record.image), record.status, record.result, record.output_name)
