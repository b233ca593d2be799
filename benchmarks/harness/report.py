"""Common parts of all reports: three files, the machine, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.timer import Ratio
from cellseg_deploy.errors import OutputError
from cellseg_deploy.files.atomic import make_folder, write_bytes

NOT_RUN = "not yet run"
REPORT_VERSION = 1


class Report(Protocol):
    """A dataclass that msgspec can write, with the fields ``benchmark`` (its name) and ``report_version``."""

    @property
    def benchmark(self) -> str: ...

    def to_markdown(self) -> str: ...


def new_folder(path: Path) -> None:
    """Make ``path``; raises ``OutputError`` if it already exists."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path}: exists and is not an empty folder; choose another -o")
    make_folder(path)


def write_report(folder: Path, report: Report, png: bytes | None, progress: Progress | None = None) -> str:
    """Write ``report`` to ``folder`` as JSON, Markdown and PNG, named after its benchmark; returns the Markdown.

    ``png``: empty if it could not be drawn, None for a report without one.

    If it was stopped, both texts state what is missing (``progress``).
    """
    name, stopped = report.benchmark, progress is not None and progress.stopped is not None
    content = msgspec.to_builtins(report)
    text = report.to_markdown()
    if progress is not None and stopped:
        content |= {"complete": False, "missing": progress.missing}
        text = with_remark(text, progress)
    write_bytes(folder / f"{name}.json", msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    if png:
        write_bytes(folder / f"{name}.png", png)
    picture = f"\n![{name}]({name}.png)\n" if png else "\nNo figure: matplotlib is not installed.\n"
    picture = "" if png is None else picture
    write_bytes(folder / f"{name}.md", f"{text}{picture}".encode())
    return text


def with_remark(markdown: str, progress: Progress) -> str:
    """``markdown`` with a note below its title on what is missing."""
    if not progress.remark:
        return markdown
    title, rest = markdown.split("\n", 1) if markdown.startswith("# ") else ("", markdown)
    return "\n".join([*([title, ""] if title else []), progress.remark, *([] if title else [""]), rest])


def machine_lines(conditions: Conditions, threads: int | None) -> list[str]:
    """Sentences at the head of a report: the machine it was measured on."""
    machine = conditions.machine
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    gpu = f"GPU: {machine.gpu['name']}" if machine.gpu else f"GPU: none ({machine.no_gpu})"
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    lines = [
        f"{machine.processor}, {machine.cores} of {machine.logical_cores} cores{memory}; "
        f"{' '.join(machine.instructions) or 'instructions unknown'}. {gpu}.",
        f"Threads: {'as the libraries choose' if threads is None else threads}. {machine.system}, Python "
        f"{machine.python}, {versions}.",
    ]
    lines += [f"**{remark[0].upper()}{remark[1:]}.**" for remark in conditions.remarks()]
    return [part for line in lines for part in (line, "")]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """A Markdown table; its first ``words`` columns are text, the others numbers."""
    marks = ["---" if column < words else "--:" for column in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(marks)}|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def times(ratio: Ratio | None) -> str:
    """``3.21 (3.18 to 3.25)``: a ratio with its interval; empty for None."""
    if ratio is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.2f}"
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def percent(value: float | None) -> str:
    """Format a share as a percentage; empty for None."""
    return "" if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def megabytes(value: float | None) -> str:
    """Format bytes as megabytes; empty for None."""
    return "" if value is None else f"{value / 1e6:.0f}"
