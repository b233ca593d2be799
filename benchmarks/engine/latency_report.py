"""Markdown and figure of ``latency``."""

from __future__ import annotations

from collections.abc import Sequence

from cellseg_benchmarks.engine.latency import LatencyReport, Row
from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png
from cellseg_benchmarks.harness.report import NOT_RUN, machine_lines, megabytes, number, percent, table, times

_HEAD = (
    *("form", "device", "parity", "ms a tile", "IQR", "tiles/s", "TFLOP/s", "of peak", "x eager fp32"),
    *("x PyTorch's best", "flipped px", "memory, MB"),
)


def markdown(report: LatencyReport) -> str:
    """A table for each network and batch size, then the limits."""
    plan = report.plan
    lines = ["# Latency of the network", "", *machine_lines(report.conditions, report.threads)]
    lines += [
        f"Up to {plan.rounds} interleaved rounds, turns of at least {plan.min_seconds:g} s; medians, and ratios of "
        "paired rounds with their 95 % bootstrap interval. Times are host to host: uint8 tiles in, float32 "
        "probabilities out. *of peak*: of the fastest product of matrices in that precision, in the same rounds. "
        "*flipped px*: pixels whose foreground is on the other side of 0.5 than PyTorch's in fp32. *memory*: peak of "
        "the form's process, libraries included.",
        "",
    ]
    for network, batch in groups(report.rows):
        rows = [row for row in report.rows if (row.network, row.batch) == (network, batch) and not row.again]
        work = report.gflop_per_tile.get(network)
        told = "" if work is None else f", {number(work)} GFLOP a tile"
        best = next((row.best_pytorch for row in rows if row.best_pytorch), "")
        lines += [f"## {network}, batches of {batch}{told}", ""]
        lines += [f"PyTorch's best: {best}.", ""] if best else []
        lines += [*table(_HEAD, [_cells(row) for row in rows], words=3), ""]
        lines += [f"- {row.form} on {row.device}: {row.reason}" for row in rows if row.reason]
        lines += [""]
    lines += ["## Limits of the machine", ""]
    for place, limits in enumerate(report.limits):
        lines += [f"Sitting {place + 1}:", "", limits.to_markdown()]
    return "\n".join(lines)


def png(report: LatencyReport) -> bytes:
    """A bar for each form: ms a tile, with its interquartile range."""
    panels = []
    for network, batch in groups(report.rows):
        bars = [
            Bar(
                row.form if row.device == "cpu" else f"{row.form}, {row.device}",
                row.ms_per_tile,
                (row.iqr_ms_per_tile or 0) / 2,
                _note(row),
                row.engine,
            )
            for row in report.rows
            if (row.network, row.batch) == (network, batch) and not row.again
        ]
        panels.append(Bars(f"{network}, batches of {batch}", "ms a tile, median and IQR", tuple(bars)))
    return panels_png(panels, title=f"Latency of the network: {report.conditions.machine.processor}")


def groups(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Networks and batch sizes in order."""
    return list(dict.fromkeys((row.network, row.batch) for row in rows))


def _note(row: Row) -> str:
    if row.ms_per_tile is None:
        return NOT_RUN
    faster = "" if row.reference is None else f", {row.reference.median:.1f}x"
    return f"{number(row.ms_per_tile)} ms{faster}"


def _cells(row: Row) -> list[str]:
    if row.ms_per_tile is None:
        return [row.form, row.device, row.parity, NOT_RUN, *[""] * (len(_HEAD) - 4)]
    share = "" if row.share_of_peak is None else percent(row.share_of_peak.median)
    return [
        row.form,
        row.device,
        row.parity,
        number(row.ms_per_tile),
        number(row.iqr_ms_per_tile),
        number(row.tiles_per_second),
        number(row.tflops),
        share,
        times(row.reference),
        times(row.best),
        "" if row.flipped is None else f"{row.flipped:.3%}",
        "" if row.peak is None else megabytes(row.peak.rss_bytes),
    ]
