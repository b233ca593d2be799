"""Progress on stderr: a bar on a terminal, plain lines elsewhere, failures always.

A closed stderr does not stop the work; only the progress is lost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cellseg_deploy.cli.console import in_options, printable, say
from cellseg_deploy.errors import plural

if TYPE_CHECKING:
    from cellseg_deploy.run.folder import ImageResult
    from cellseg_deploy.run.plan import RunPlan
    from cellseg_deploy.slides.counting import Progress as StreamProgress

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """``advance`` is called after each image: a bar if stderr is a terminal, otherwise a line every ten seconds.

    ``total``: images in the run, or items as named by ``unit``.
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
        """Count one more finished image; ``note`` is shown next to the number."""
        self.seen += 1
        if self._bar is not None:
            self._on_bar(lambda: self._bar.update(self._task, advance=1, note=note))
        elif self.seen == self.total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"{self.seen}/{self.total} {self.unit}{', ' if note else ''}{note}")

    def say(self, line: str) -> None:
        """Print a separate line, above the bar if there is one."""
        if self._bar is not None:
            self._on_bar(lambda: self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True))
        else:
            say(line)

    def _on_bar(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError:  # the terminal is closed; printing plain lines handles that
            self._bar = None


class TimeLeft:
    """Time left of one stage, from its rate so far."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self._since = time.monotonic()

    def start(self, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        self.total, self.done, self._since = total, 0, time.monotonic()

    def advance(self, steps: int) -> str:
        """Count ``steps``, and return how long the rest will take, in words; "" at the end."""
        self.done += steps
        left = (self.total - self.done) * (time.monotonic() - self._since) / max(self.done, 1)
        return f"{in_words(left)} left" if self.done < self.total else ""


class RunProgress(Progress):
    """Progress of a folder run, whose images may come in several groups."""

    def __init__(self) -> None:
        super().__init__(0)
        self._results: dict[str, tuple[int, bool]] = {}  # cells, and whether it failed; an image's last result counts
        self._cells = self._failed = 0
        self._start, self._seen_before = time.monotonic(), 0

    def planned(self, plan: RunPlan) -> None:
        """Add more images to do."""
        counts = plan.counts
        if counts["skip"]:
            self.say(f"{counts['skip']} of {plural(len(plan.items), 'image')} done already")
        if self.seen == self.total:  # time without images would distort the rate
            self._start, self._seen_before = time.monotonic(), self.seen
        self.total += counts["work"] + counts["fail"]
        if self._bar is not None:
            self._on_bar(lambda: self._bar.update(self._task, total=self.total))

    def streamed(self, name: str, words: str) -> StreamProgress:
        """Say in ``words`` that the image ``name`` is read by region; return what takes its steps."""
        from cellseg_deploy.slides.counting import Progress as StreamProgress

        self.say(f"{printable(name)}: {words}")
        clock, stages, last = TimeLeft(), [""], [time.monotonic()]

        def started(stage: str, steps: int) -> None:
            stages[0] = stage
            clock.start(steps)

        def advanced(steps: int) -> None:
            left = clock.advance(steps)
            line = f"{printable(name)}: {clock.done}/{clock.total} {stages[0]}{', ' if left else ''}{left}"
            if self._bar is not None:
                self._on_bar(lambda: self._bar.update(self._task, note=line))
            elif time.monotonic() - last[0] >= _SECONDS_BETWEEN_LINES:
                last[0] = time.monotonic()
                say(line)

        return StreamProgress(started, advanced)

    def result(self, result: ImageResult) -> None:
        """Count one more processed image."""
        cells, failed = self._results.pop(result.image, (0, False))
        self._results[result.image] = (result.cells or 0, result.status == "failed")
        self._cells += (result.cells or 0) - cells
        self._failed += (result.status == "failed") - failed
        if result.status == "failed":
            self.say(failure_line(result))
        rate = (self.seen + 1 - self._seen_before) / max(time.monotonic() - self._start, 1e-9)
        parts = [f"{rate:.2f} images/s", plural(self._cells, "cell")]
        parts += [f"{self._failed} failed"] if self._failed else []
        left = self.total - self.seen - 1
        if left and self._bar is None:  # the bar shows it itself
            parts.append(f"{in_words(left / rate)} left")
        self.advance(", ".join(parts))


class QuietProgress:
    """Progress of a quiet run: failures only."""

    def planned(self, plan: RunPlan) -> None:
        """Ignore the plan."""

    def streamed(self, *_: str) -> StreamProgress:
        """Ignore how an image is read."""
        from cellseg_deploy.slides.counting import SILENT

        return SILENT

    def result(self, result: ImageResult) -> None:
        """Print a failed image, ignore others."""
        if result.status == "failed":
            say(failure_line(result))


def in_words(seconds: float) -> str:
    """Format a duration with its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def failure_line(result: ImageResult) -> str:
    """Format the line for a failed image."""
    return f"failed: {printable(result.image)}: {printable(in_options(result.error))}"


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
