"""Results of a soak as ``soak.json``, ``soak.md`` and ``soak.png``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cellseg_benchmarks.folder.soak import Criterion, Limits, Soak
from cellseg_benchmarks.harness.figures import Lines, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, table

_MIB = 2**20
_MOST_WRONG = 20


@dataclass(frozen=True)
class SoakReport:
    """``settings``: options of the command. ``verdict``: ``holds``, or what does not."""

    conditions: Conditions
    settings: dict[str, Any]
    limits: Limits
    soak: Soak
    criteria: tuple[Criterion, ...]
    verdict: str
    benchmark: str = "soak"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """The criteria as a table, and what else the run showed."""
        soak = self.soak
        words = " ".join(f"--{name} {value}" for name, value in self.settings.items() if value is not None)
        rows = [
            [c.name, _figure(c.measured), f"{_figure(c.allowed)} {c.unit}".strip(), "holds" if c.holds else "**fails**"]
            for c in self.criteria
        ]
        resident = [sample.resident_bytes for sample in soak.samples]
        lines = [
            "# Soak",
            "",
            *machine_lines(self.conditions, None),
            f"`python -m cellseg_benchmarks soak {words}`: {soak.n_files} files, {soak.n_bad} of them damaged, in "
            f"{soak.wall_seconds:.0f} s, {1000 * soak.wall_seconds / soak.n_files:.1f} ms a file with all that comes "
            f"before the first and after the last. **{self.verdict[0].upper()}{self.verdict[1:]}.**",
            "",
            *table(("criterion", "measured", "allowed", "verdict"), rows),
            "",
            f"Resident memory: {_figure(soak.before.resident_bytes / _MIB)} MiB before, "
            f"{_figure(soak.resident_bytes_until(0.5) / _MIB)} MiB in the middle, "
            f"{_figure(soak.resident_bytes_until(1) / _MIB)} MiB at the end, "
            f"{_figure(max(resident) / _MIB)} MiB at most.",
            "",
            f"Overhead: 95 % of files below {np.quantile(soak.overhead_ms, 0.95):.1f} ms, the slowest "
            f"{max(soak.overhead_ms):.0f} ms. Most at a time: {max(s.descriptors for s in soak.samples)} descriptors, "
            f"{max(s.threads for s in soak.samples)} threads.",
        ]
        if soak.wrong:
            lines += ["", "Wrong results:", "", *(f"- {line}" for line in soak.wrong[:_MOST_WRONG])]
        return "\n".join(lines) + "\n"


def judged(soak: Soak, limits: Limits, conditions: Conditions, settings: dict[str, Any]) -> SoakReport:
    """The report of ``soak`` with its verdict."""
    criteria = tuple(soak.criteria(limits))
    failed = [criterion.name for criterion in criteria if not criterion.holds]
    verdict = f"fails: {', '.join(failed)}" if failed else "holds"
    return SoakReport(conditions, settings, limits, soak, criteria, verdict)


def png(report: SoakReport) -> bytes:
    """Resident memory over files with what is allowed from the middle on, and the overhead between two samples."""
    soak, limits = report.soak, report.limits
    files = [float(sample.files) for sample in soak.samples]
    middle, start = soak.n_files / 2, soak.resident_bytes_until(0.5) / _MIB
    memory = {
        "resident": (files, [sample.resident_bytes / _MIB for sample in soak.samples]),
        f"{limits.growth_bytes:g} bytes a file, the most allowed": (
            [middle, float(soak.n_files)],
            [start, start + limits.growth_bytes * middle / _MIB],
        ),
    }
    windows = [soak.overhead_ms[int(first) : int(last)] for first, last in pairwise([0.0, *files])]
    overhead = {
        "median": (files, [float(np.median(window)) for window in windows]),
        "95 % below": (files, [float(np.quantile(window, 0.95)) for window in windows]),
        "allowed for the median": ([0.0, float(soak.n_files)], [limits.overhead_ms] * 2),
    }
    panels = (
        Lines("memory of the process", "files", "MiB", memory, logarithmic=False),
        Lines("a file outside the network", "files", "ms", overhead, logarithmic=False, logarithmic_y=True),
    )
    return panels_png(panels, title=f"{soak.n_files} files, {soak.n_bad} damaged: {report.verdict}")


def _figure(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.1f}"
