"""Keep the measurements of a benchmark that ends early, for whatever reason.

    keep(...)              after each round: DIR/NAME.partial.json holds all raw figures so far; a crash leaves it there
    with stoppable(...)    around a loop: Ctrl-C, SIGTERM and SIGHUP end the loop; the report covers what was measured
    finish()               the report is written: the partial file is removed, the signal raised again (exit code 130)

A signal before the first figure is kept ends the benchmark as usual: there is nothing to report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.files.atomic import write_bytes

PARTIAL_END = ".partial.json"


class Progress:
    """Progress of a benchmark. ``stopped``: the signal that ended it early; ``missing``: what was not measured then.

    Without a ``folder`` nothing is kept, and signals are not caught.
    """

    def __init__(self, folder: Path | None = None, benchmark: str = "") -> None:
        self.benchmark = benchmark
        self.stopped: KeyboardInterrupt | None = None
        self.missing: list[str] = []
        self._kept: dict[str, Any] = {}
        self.path = None if folder is None else folder / f"{benchmark}{PARTIAL_END}"

    def keep(self, what: str, measured: Any) -> None:
        """Replace the content kept under the name ``what``; ``measured``: anything msgspec can write."""
        self._kept[what] = measured
        if self.path is not None:
            record = {"benchmark": self.benchmark, "complete": False, "measured": self._kept}
            write_bytes(self.path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")

    @contextmanager
    def stoppable(self, missing: Callable[[], str]) -> Iterator[None]:
        """Let a signal end the block; once something was kept, the code after the block continues.

        ``missing``: called then, returns what was not measured; empty for nothing.
        """
        try:
            yield
        except KeyboardInterrupt as signal:
            if self.path is None or not self._kept:
                raise
            self.stopped = signal
            self.missing += [what for what in (missing(),) if what]

    def skips(self, what: str) -> bool:
        """Whether ``what`` is skipped because a signal was received; it is then recorded as missing."""
        if self.stopped is not None:
            self.missing.append(what)
        return self.stopped is not None

    @property
    def remark(self) -> str:
        """Note for the report on what is missing; empty if it is complete."""
        if self.stopped is None:
            return ""
        return f"**Stopped before its end. Not measured: {'; '.join(self.missing) or 'nothing'}.**"

    def finish(self) -> None:
        """Remove the partial file after the report is written, and raise the signal if one was received."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        if self.stopped is not None:
            raise self.stopped


def turns_left(turns: Sequence[tuple[int, str]]) -> str:
    """``turns``, numbers of rounds (from 0) with names, in words; empty for none."""
    if not turns:
        return ""
    first, last = turns[0][0], turns[-1][0]
    of_first = ", ".join(name for number, name in turns if number == first)
    return f"{of_first} in round {first + 1}" + (f", rounds {first + 2} to {last + 1}" if last > first else "")
