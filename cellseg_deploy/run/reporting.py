"""Sums and report of a run, from its journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cellseg_deploy.outputs.formats import SUMMARY_CSV
from cellseg_deploy.report import summary
from cellseg_deploy.report.groups import grouping
from cellseg_deploy.report.results import ImageRow, Results
from cellseg_deploy.run import tables
from cellseg_deploy.run.journal import Entry, whole_records
from cellseg_deploy.run.record import RunOptions

RunFile = Callable[[Path, Path, Sequence[Entry]], None]
"""Writes a file of the whole run: its path, the journal, the last lines of all images in order."""


def run_files(options: RunOptions) -> dict[str, RunFile]:
    """Return by name what writes each file of sums and report; summary.csv first."""
    group_of = grouping(options.group_by)
    return {SUMMARY_CSV: partial(_write_summary, group_of=group_of)}


def results_of(journal: Path, entries: Sequence[Entry], group_of: Callable[[str], str]) -> Results:
    """Return the results of the images ``entries`` of ``journal``."""
    with_cells = [entry for entry in entries if entry.record.result.get("cells")]
    return Results(
        [
            ImageRow(
                entry.record.image,
                group_of(entry.record.image),
                entry.record.status,
                entry.record.result,
                entry.record.output_name,
            )
            for entry in entries
        ],
        tables.cell_columns(entries),
        lambda: ((record.image, record.cells) for record in whole_records(journal, with_cells)),
    )


def _write_summary(path: Path, journal: Path, entries: Sequence[Entry], *, group_of: Callable[[str], str]) -> None:
    summary.write(path, results_of(journal, entries, group_of))
