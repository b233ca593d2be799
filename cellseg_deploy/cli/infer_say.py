"""What ``cellseg-infer`` prints on stdout: the table at the end, the same for machines, the plan of a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cellseg_deploy.cli.console import printable

if TYPE_CHECKING:
    from cellseg_deploy.run.plan import RunPlan
    from cellseg_deploy.run.record import RunSummary
    from cellseg_deploy.segmenter import Segmenter

_ACTIONS = {"work": "to do", "skip": "done", "keep": "kept", "fail": "fails"}


def for_machines(summary: RunSummary) -> dict[str, Any]:
    """Totals: ``found`` is the sum of ``done`` (now), ``skipped`` (done before) and ``failed``."""
    return {
        "found": summary.found,
        "done": summary.done,
        "skipped": summary.skipped,
        "failed": summary.failed,
        "others": summary.others,
        "cells": summary.cells,
        "counted": summary.counted,
        **({"by_class": summary.by_class} if summary.by_class else {}),
        "wall_seconds": round(summary.wall_seconds, 3),
        "warnings": summary.warnings,
        "edited": summary.edited_files,
        "output": printable(summary.output),
    }


def print_table(summary: RunSummary) -> None:
    """Totals for people."""
    seconds, done = summary.wall_seconds, summary.done + summary.skipped
    worked = summary.done + summary.failed
    rate = f", {worked / seconds:.2f} images/s" if seconds > 0 and worked else ""
    images = f"{done} of {summary.found}" if summary.failed else str(done)
    if summary.skipped:
        images += f", {summary.skipped} of them before this run"
    counted = f", {summary.counted} counted" if summary.counted != summary.cells else ""
    rows = [
        ("images", images),
        ("cells", f"{summary.cells}{counted}"),
        ("failed", f"{summary.failed} (named in images.csv)" if summary.failed else "0"),
        ("time", f"{seconds:.1f} s{rate}"),
        ("results", printable(summary.output)),
    ]
    if summary.by_class:
        kinds = [
            f"{printable(name)} {number}" + ("" if name in summary.counting else ", not counted")
            for name, number in summary.by_class.items()
        ]
        rows.insert(2, ("classes", "; ".join(kinds)))
    if summary.others:
        rows.insert(-2, ("others", f"{summary.others} in the tables, of images not given or not readable now"))
    if summary.edited:
        files = f"{len(summary.edited)} file{'s' if len(summary.edited) > 1 else ''}"
        rows.insert(-1, ("edited", f"{files}, kept (named in run.json)"))
    for name, value in rows:
        click.echo(f"{name:<8} {value}")
    for kind, found in summary.warnings.items():
        images = f"{found['images']} image{'s' if found['images'] > 1 else ''}"
        first = found["first"]
        click.echo(f"warning  {kind}, {images}: {printable(first['image'])}: {printable(first['warning'])}")


def heading(segmenter: Segmenter) -> str:
    """One line before the work: which model runs, on what, in which arithmetic, at which scale."""
    backend, spec = segmenter.backend, segmenter.backend.spec
    if segmenter.auto_scale:
        scale = "scale measured"
    else:
        scale = f"scale {segmenter.scale:g} (cells about {spec.cell_diameter_px / segmenter.scale:.0f} px wide)"
    classes = f", counts {' and '.join(map(printable, segmenter.counting_classes))}" if spec.classes else ""
    return f"model {printable(spec.name)}, {backend.name} {backend.precision} on {backend.device}, {scale}{classes}"


def print_plan(plan: RunPlan) -> None:
    """A line an image, and how many for each of what would be done."""
    for item in plan.items:
        reason = f" ({printable(item.reason)})" if item.reason else ""
        click.echo(f"{_ACTIONS[item.action]:<6} {printable(item.image.name)}{reason}")
    counts = plan.counts
    kept = f"{counts['keep']} kept, " if counts["keep"] else ""
    done = f"{counts['work']} to do, {counts['skip']} done"
    click.echo(f"{len(plan.items)} images: {done}, {kept}{counts['fail']} would fail")
