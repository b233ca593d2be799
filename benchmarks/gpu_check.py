"""Try everything that needs a GPU once, for whoever has one, for however long: ``scripts/gpu-check``.

Each part (``cellseg_benchmarks.gpu.plan``) is a process with its own limit, so a crash in a driver is a row of the
report. The report is rewritten after each part: claims (shown, refuted, open), then figures. Nothing is downloaded, and
what is not installed is open; what is installed and does not work is refuted. Without a GPU the check ends at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.gpu.findings import Content, read_content
from cellseg_benchmarks.gpu.part import CUT_OFF, UNAVAILABLE
from cellseg_benchmarks.gpu.plan import PARTS, Part, chosen_parts, findings_path
from cellseg_benchmarks.gpu.report import NAME, PartReport, Report, Status, part_report, write
from cellseg_benchmarks.harness.machine import describe_machine, look_for_gpu
from cellseg_benchmarks.harness.report import new_folder
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, ModelError
from cellseg_deploy.files.atomic import make_folder

LEAST_SECONDS = 5.0
"""A part that would have less than this is not started."""
DRY_SECONDS = 900.0
"""Least limit of a part on a CPU, which may be busy."""
Say = Callable[[str], None]


def run_process(part: Part, out: Path, model: Path, seconds: float, dry: bool) -> tuple[Status, str]:
    """Run ``part`` in a process of its own for at most ``seconds``; returns its status, and why it is not "done".

    The process leads a group, which is killed as a whole; it kills itself when this process dies (see ``part``).
    """
    inner = max(LEAST_SECONDS, 0.9 * seconds - LEAST_SECONDS)  # time to start, and to say what it had no time for
    command = [sys.executable, "-m", "cellseg_benchmarks.gpu.part", part.name, str(out), str(model), str(inner)]
    log = out / "logs" / f"{part.name}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, *(["dry"] if dry else [])],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "cut off", f"ended after {seconds:.0f} s"
        finally:
            _kill_group(process)
    problem = str(read_content(findings_path(out, part.name)).facts.get("problem", ""))
    if code == UNAVAILABLE:
        return "cannot run", problem
    if code == CUT_OFF:
        return "cut off", problem
    if code:
        return "failed", problem or f"exit code {code}: {_last_line(log)}"
    return "done", ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the group of ``process``: a benchmark's workers would hold the GPU."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # all have ended; on macOS the latter
        pass
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


RunPart = Callable[[Part, Path, Path, float, bool], tuple[Status, str]]


def check(
    parts: Sequence[Part],
    out: Path,
    model: Path,
    head: dict[str, Any],
    *,
    dry: bool = False,
    seconds: float | None = None,
    run: RunPart = run_process,
    say: Say = lambda _: None,
) -> Report:
    """Run ``parts``, within ``seconds`` in all if given, and write the report to ``out`` after each.

    A signal ends the running part, which keeps what it found, and is raised again when the report is written.
    """
    passed = stopwatch()
    reports: dict[str, PartReport] = {part.name: part_report(part, "waiting", 0, "", Content()) for part in parts}

    def keep(part: Part, status: Status, took: float, detail: str) -> Report:
        found = read_content(findings_path(out, part.name))
        reports[part.name] = part_report(part, status, took, detail, found)
        report = Report(head, dry, tuple(reports.values()))
        write(out, report)
        return report

    for part in parts:
        limit = max(part.seconds, DRY_SECONDS) if dry else part.seconds
        left = limit if seconds is None else min(limit, seconds - passed())
        if left < LEAST_SECONDS:
            keep(part, "cut off", 0, "no time was left for it")
            continue
        keep(part, "running", 0, "")
        say(f"{part.name}: {part.about} ...")
        took = stopwatch()
        try:
            status, detail = run(part, out, model, left, dry)
        except KeyboardInterrupt:
            keep(part, "stopped", took(), "stopped by a signal")
            raise
        keep(part, status, took(), detail)
        say(f"{part.name}: {status}{f', {detail}' if detail else ''}")
    return Report(head, dry, tuple(reports.values()))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model to try (.onnx, fp32).  [default: the one that ships]"
)
@click.option(
    "-o",
    "--out",
    default=f"{NAME}-out",
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="New folder for the report and all files.",
)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="End within this time.  [default: each part has a limit]"
)
@click.option("--only", metavar="PART,...", help=f"These, and what they need: {', '.join(p.name for p in PARTS)}.")
@click.option("--dry-run", is_flag=True, help="Rehearse on the CPU with small sizes.")
def command(model: Path | None, out: Path, minutes: float | None, only: str | None, dry_run: bool) -> int:
    """Try what needs a GPU and write DIR/gpu-check.md and DIR/gpu-check.json after each part.

    Uses the packages that are there, downloads nothing. Exit codes: 0 all claims are shown, 5 one is refuted, 6 DIR
    cannot be written, 8 no GPU, or a claim is open; the report says which and why.
    """
    parts = chosen_parts(shared.words(only))
    gpu, no_gpu = look_for_gpu()
    if gpu is None and not dry_run:
        raise BackendUnavailableError(f"{no_gpu}; --dry-run rehearses the check on the CPU")
    from cellseg_deploy.models import default_model_path

    model = (model or default_model_path()).resolve()
    if not model.is_file():
        raise ModelError(f"{model}: no such file; give an .onnx model with --model")
    new_folder(out)
    out = out.resolve()
    for name in ("parts", "logs", "work"):
        make_folder(out / name)
    head = {"device": "cpu" if dry_run or gpu is None else gpu["name"], "model": model.name} | describe_machine()
    seconds = None if minutes is None else 60 * minutes
    say = shared.teller(False)
    report = check(parts, out, model, head, dry=dry_run, seconds=seconds, say=say)
    verdicts = [claim.verdict for claim in report.claims]
    click.echo(", ".join(f"{verdicts.count(v)} {v}" for v in ("shown", "refuted", "open")) + f": {out / NAME}.md")
    return report.exit_code


def main() -> None:
    """Entry point of ``python -m cellseg_benchmarks.gpu_check``."""
    sys.exit(console.run(command))


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


if __name__ == "__main__":
    main()
