"""Progress on stderr: a bar on a terminal, plain lines elsewhere, failures always.

A stderr that nobody reads any more stops nothing: the work matters, not the talk about it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cellseg_deploy.cli.console import printable, say

if TYPE_CHECKING:
    from cellseg_deploy.run.folder import ImageResult
    from cellseg_deploy.run.plan import RunPlan

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """``advance`` is called after each image: a bar where stderr is a terminal, else a line every ten seconds.

    ``total``: images in the run, or of what ``unit`` says.
    """

    def __init__(self, total: int, unit: str = "images") -> None:
        self.total = total
        self.unit = unit
        self.seen = 0
        self._last_line = time.monotonic()
        self._bar: Any = _rich_bar() if sys.stderr is not None and sys.stderr.isatty() else None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._on_bar(self._bar.start)
            self._task = None if self._bar is None else self._bar.add_task("", total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._on_bar(self._bar.stop)

    def advance(self, note: str = "") -> None:
        """One more image is through; ``note`` is shown beside their number."""
        self.seen += 1
        if self._bar is not None:
            self._on_bar(lambda: self._bar.update(self._task, advance=1, note=note))
        elif self.seen == self.total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"{self.seen}/{self.total} {self.unit}{', ' if note else ''}{note}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._on_bar(lambda: self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True))
        else:
            say(line)

    def _on_bar(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError:  # the terminal is gone; plain lines find that out themselves
            self._bar = None


class RunProgress(Progress):
    """Progress of a folder run, whose images may come in several groups."""

    def __init__(self) -> None:
        super().__init__(0)
        self._results: dict[str, tuple[int, bool]] = {}  # cells, and whether it failed; the last of an image holds
        self._cells = self._failed = 0
        self._start, self._seen_before = time.monotonic(), 0

    def planned(self, plan: RunPlan) -> None:
        """There are more images to do."""
        counts = plan.counts
        if counts["skip"]:
            self.say(f"{counts['skip']} of {len(plan.items)} {self.unit} are done already")
        if self.seen == self.total:  # the time without images says nothing of their rate
            self._start, self._seen_before = time.monotonic(), self.seen
        self.total += counts["work"] + counts["fail"]
        if self._bar is not None:
            self._on_bar(lambda: self._bar.update(self._task, total=self.total))

    def result(self, result: ImageResult) -> None:
        """One more image was worked on."""
        cells, failed = self._results.pop(result.image, (0, False))
        self._results[result.image] = (result.cells or 0, result.status == "failed")
        self._cells += (result.cells or 0) - cells
        self._failed += (result.status == "failed") - failed
        if result.status == "failed":
            self.say(failure_line(result))
        rate = (self.seen + 1 - self._seen_before) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{rate:.2f} images/s", f"{self._cells} cells"]
        parts += [f"{self._failed} failed"] if self._failed else []
        left = self.total - self.seen - 1
        if left and self._bar is None:  # the bar says it itself
            parts.append(f"{in_words(left / rate)} left")
        self.advance(", ".join(parts))


class QuietProgress:
    """Progress of a quiet run: failures only."""

    def planned(self, plan: RunPlan) -> None:
        """Nothing is said of it."""

    def result(self, result: ImageResult) -> None:
        """One more image was worked on."""
        if result.status == "failed":
            say(failure_line(result))


def in_words(seconds: float) -> str:
    """A duration with its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def failure_line(result: ImageResult) -> str:
    """What is said of a failed image."""
    return f"failed: {printable(result.image)}: {printable(result.error)}"


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
