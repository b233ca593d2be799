"""The report of ``gpu-check``: claims first, then parts, then figures. It is complete at any moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cellseg_benchmarks.gpu.findings import Claim, Content, Verdict, one_line
from cellseg_benchmarks.gpu.plan import Part
from cellseg_benchmarks.harness.report import number
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, ModelError
from cellseg_deploy.files.atomic import write_bytes

Status = Literal["waiting", "running", "done", "failed", "cannot run", "cut off", "stopped"]
REPORT_VERSION = 3
NAME = "gpu-check"


@dataclass(frozen=True)
class PartReport:
    """One part: what became of it, and what it found. ``detail``: why it did not run to its end."""

    name: str
    about: str
    status: Status
    seconds: float
    detail: str
    claims: tuple[Claim, ...]
    found: Content


def part_report(part: Part, status: Status, seconds: float, detail: str, found: Content) -> PartReport:
    """Report of ``part``; claims that it did not reach are open, or refuted if it failed before them."""
    reached = {claim.sentence: claim for claim in found.claims}
    verdict: Verdict = "refuted" if status == "failed" else "open"
    why = "not reached yet" if status in ("waiting", "running") else detail or "not tried"
    claims = [reached.pop(text, Claim(text, verdict, why)) for text in part.claims]
    return PartReport(part.name, part.about, status, round(seconds, 1), detail, (*claims, *reached.values()), found)


@dataclass(frozen=True)
class Report:
    """The whole check. ``head``: card, versions, model; ``dry``: on the CPU, which shows nothing about a GPU."""

    head: dict[str, Any]
    dry: bool
    parts: tuple[PartReport, ...]
    report_version: int = REPORT_VERSION

    @property
    def complete(self) -> bool:
        """Whether no part is still to come."""
        return not any(part.status in ("waiting", "running") for part in self.parts)

    @property
    def claims(self) -> list[Claim]:
        """Claims of all parts."""
        return [claim for part in self.parts for claim in part.claims]

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 5 if a claim is refuted or a part failed, else 8 if anything is open."""
        verdicts = {claim.verdict for claim in self.claims}
        statuses = {part.status for part in self.parts}
        if "refuted" in verdicts or "failed" in statuses:
            return ModelError.exit_code
        whole = statuses <= {"done"} and "open" not in verdicts
        return console.EXIT_OK if whole else BackendUnavailableError.exit_code

    def to_markdown(self) -> str:
        """Return tables of claims and parts, then the figures of each part."""
        lines = [f"# {NAME}", ""]
        if self.dry:
            lines += ["**Rehearsal on a CPU (`--dry-run`): nothing here is about a GPU.**", ""]
        if not self.complete:
            lines += ["**Not complete: the check is running, or was killed.**", ""]
        lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in self.head.items())]
        lines += ["", "fp32 is computed without TF32, in PyTorch too.", ""]
        lines += ["| claim | | evidence |", "|---|---|---|"]
        lines += [f"| {_cell(c.sentence)} | **{c.verdict}** | {_cell(c.evidence)} |" for c in self.claims]
        lines += ["", "| part | | s | | |", "|---|---|--:|---|---|"]
        lines += [f"| {p.name} | {p.status} | {p.seconds:.0f} | {p.about} | {_cell(p.detail)} |" for p in self.parts]
        for part in self.parts:
            lines += _figures(part)
        return "\n".join(lines) + "\n"


def write(folder: Path, report: Report) -> None:
    """Write ``report`` to ``folder`` as JSON and Markdown, each file replaced at once."""
    content = msgspec.to_builtins(report, enc_hook=str) | {"complete": report.complete}
    write_bytes(folder / f"{NAME}.json", msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    write_bytes(folder / f"{NAME}.md", report.to_markdown().encode())


def _figures(part: PartReport) -> list[str]:
    lines: list[str] = []
    rows = part.found.rows
    if rows:
        lines += ["", f"## {part.name}", "", f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
        lines += [f"| {' | '.join(_figure(value) for value in row.values())} |" for row in rows]
    if part.found.facts:
        lines += ["", f"## {part.name}: facts", ""]
        lines += [f"- {name}: {one_line(str(value))}" for name, value in part.found.facts.items()]
    for title, text in part.found.tables.items():
        # Its own heading would be read as a part of this report, and its picture lies elsewhere.
        body = [line for line in text.removeprefix("# ").splitlines() if not line.startswith("![")]
        lines += ["", f"## {part.name}: {title}", "", *body]
    return lines


def _figure(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else "" if value is None else _cell(value)


def _cell(value: Any) -> str:
    return one_line(str(value)).replace("|", "\\|")
