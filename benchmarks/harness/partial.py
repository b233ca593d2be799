"""What was measured survives the end of the benchmark, whatever ends it.

    keep(...)              after each round: DIR/NAME.partial.json holds all raw figures so far; a crash leaves it there
    with stoppable(...)    around a loop: Ctrl-C, SIGTERM and SIGHUP end the loop; the report is made of what there is
    finish()               the report is written: the partial file goes, and the signal takes its course (exit code 130)

A signal before the first figure is kept ends the benchmark as before: there is nothing to report.
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
    """How far a benchmark is. ``stopped``: the signal that ended it early; ``missing``: what was not measured for it.

    Without a ``folder`` nothing is kept, and signals pass.
    """

    def __init__(self, folder: Path | None = None, benchmark: str = "") -> None:
        self.benchmark = benchmark
        self.stopped: KeyboardInterrupt | None = None
        self.missing: list[str] = []
        self._kept: dict[str, Any] = {}
        self.path = None if folder is None else folder / f"{benchmark}{PARTIAL_END}"

    def keep(self, what: str, measured: Any) -> None:
        """Replace what is kept under the name ``what``; ``measured``: whatever msgspec can write."""
        self._kept[what] = measured
        if self.path is not None:
            record = {"benchmark": self.benchmark, "complete": False, "measured": self._kept}
            write_bytes(self.path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")

    @contextmanager
    def stoppable(self, missing: Callable[[], str]) -> Iterator[None]:
        """A signal ends the block, and what stands behind it goes on, once something was kept.

        ``missing``: is asked then what was not measured; empty for nothing.
        """
        try:
            yield
        except KeyboardInterrupt as signal:
            if self.path is None or not self._kept:
                raise
            self.stopped = signal
            self.missing += [what for what in (missing(),) if what]

    def skips(self, what: str) -> bool:
        """Whether ``what`` is left out, because a signal has come; it is missing then."""
        if self.stopped is not None:
            self.missing.append(what)
        return self.stopped is not None

    @property
    def remark(self) -> str:
        """What a report says of itself; empty if it is complete."""
        if self.stopped is None:
            return ""
        return f"**Stopped before its end. Not measured: {'; '.join(self.missing) or 'nothing'}.**"

    def finish(self) -> None:
        """The report is written: remove the partial file, and raise the signal if one has come."""
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
