"""Progress of a folder run on stderr: a bar on a terminal, plain lines elsewhere, failures always."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli._common import printable

if TYPE_CHECKING:
    from cellseg_deploy.folder_run import ImageResult

_SECONDS_BETWEEN_LINES = 10.0


class RunProgress:
    """Called with each image's result. ``total``: images in the run."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen = self._cells = self._failed = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = _rich_bar() if sys.stderr.isatty() else None
        self._task: Any = None

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, result: ImageResult) -> None:
        self._seen += 1
        self._cells += result.cells or 0
        self._failed += result.status == "failed"
        if result.status == "failed":
            self._say(failure_line(result))
        note = f"{self._rate():.2f} images/s, {self._cells} cells" + (
            f", {self._failed} failed" if self._failed else ""
        )
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif self._seen == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            click.echo(f"{self._seen}/{self._total} images, {note}", err=True)

    def _rate(self) -> float:
        return self._seen / max(time.monotonic() - self._start, 1e-9)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(line, err=True)


def failure_line(result: ImageResult) -> str:
    """What is said of a failed image."""
    return f"failed: {printable(result.image)}: {printable(result.error)}"


def say_failures(result: ImageResult) -> None:
    """Progress of a quiet run: failures only."""
    if result.status == "failed":
        click.echo(failure_line(result), err=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
