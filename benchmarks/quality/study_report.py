"""Results of the study as ``study.md`` and ``sweep.png``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cellseg_benchmarks.harness.report import table
from cellseg_deploy.evaluate.plots import make_figure, pick_colours, to_png, y_limits
from cellseg_deploy.files.atomic import write_bytes

Result = dict[str, Any]

REPORT_FILE, FIGURE_FILE = "study.md", "sweep.png"
_OWN = {"plain": "threshold", "boundary": "boundary", "distance": "distance"}
# (name in the results, heading, factor, digits)
_COUNTING = (
    ("f1", "F1", 1, 3),
    ("f1_apart", "F1 apart", 1, 3),
    ("count_mape", "count error %", 100, 1),
    ("count_mape_apart", "count error apart %", 100, 1),
    ("dice", "Dice", 1, 4),
    ("map", "mean AP", 1, 3),
)
_CONFLUENCE = (("dice", "Dice", 1, 4), ("area_error", "area error %", 100, 2), ("f1", "F1", 1, 3))
METRICS = tuple(dict.fromkeys(name for name, *_ in (*_COUNTING, *_CONFLUENCE)))
"""Figures that each point must have."""
_SWEPT = (("dice", "Dice", 1), ("f1", "F1", 1), ("f1_apart", "F1 apart", 1), ("count_mape", "count error %", 100))
SWEPT_METRICS = tuple(name for name, *_ in _SWEPT)
"""Figures that each step of the sweep must have."""


def write_report(
    out: Path, arms: Sequence[tuple[str, str]], results: Sequence[Result], *, missing: Sequence[str] = ()
) -> None:
    """Write both files to ``out``, each whole or not at all. ``arms``: names and descriptions, in table order.

    ``missing``: runs that were requested and do not exist yet.
    """
    write_bytes(out / FIGURE_FILE, sweep_figure([name for name, _ in arms], results))
    text = markdown(arms, results)
    if missing:
        title, rest = text.split("\n", 1)
        text = f"{title}\n\n**Not finished: still to be trained are {', '.join(missing)}.**\n{rest}"
    write_bytes(out / REPORT_FILE, text.encode())


def markdown(arms: Sequence[tuple[str, str]], results: Sequence[Result]) -> str:
    """Return the report: protocol, tables with mean and spread over seeds, paired differences, the figure."""
    first = results[0]
    settings = first["settings"]
    optim, data = settings["optim"], settings["data"]
    seeds = sorted({result["seed"] for result in results})
    tiles = optim["epochs"] * data["patches_per_image"] * first["n_train_images"]
    lines = [
        "# Study: what parts touching cells",
        "",
        f"{first['n_train_images']} training and {first['n_val_images']} validation images (split "
        f"`{first['split_sha256'][:12]}`), encoder `{settings['model']['encoder']}` from weights "
        f"`{_short(settings['weights'])}`, scale {data['image_scale']:g}. Each network: {optim['epochs']} epochs, "
        f"{tiles} tiles of {settings['model']['tile_size']} px, batch {optim['batch_size']}; seeds "
        f"{', '.join(map(str, seeds))}. The networks differ in what the table names and in nothing else.",
        "",
        *(f"- `{name}`: {says}" for name, says in arms),
        "",
        "No validation image had a say in a network: the last epoch's is taken as it is. Operating points are "
        "cross-fitted: those for one half of the validation images were chosen on the other half, and the figures are "
        "pooled over images that had no part in the choice. *apart*: without true components that look like several "
        "cells. Mean ± standard deviation over seeds.",
        "",
        "## Counting point",
        "",
        *_table(arms, results, "counting", _COUNTING),
        "",
        "## Confluence point",
        "",
        *_table(arms, results, "confluence", _CONFLUENCE),
        "",
        "## Against `boundary`, seed by seed",
        "",
        *_differences(arms, results),
        "",
        "## Where a plain threshold is best",
        "",
        "Threshold + connected components on the foreground channel of every network, all validation images:",
        "",
        *_peaks(arms, results),
        "",
        f"![Metrics against the threshold]({FIGURE_FILE})",
        "",
        "Mean over seeds, the band is the range. Above: threshold + connected components. Below: each network's own "
        "method against its seed threshold.",
        "",
        f"A run took {mean_sd([r['seconds']['train'] / 60 for r in results], 1)} min of training and "
        f"{mean_sd([r['seconds']['measure'] / 60 for r in results], 1)} min of measuring on the machine used.",
        "",
    ]
    return "\n".join(lines)


def _table(
    arms: Sequence[tuple[str, str]], results: Sequence[Result], task: str, columns: Sequence[tuple[str, str, int, int]]
) -> list[str]:
    rows = [["network", "method", *(heading for _, heading, _, _ in columns)]]
    for name, _ in arms:
        ours = _of(results, name)
        for method in ours[0]["points"]:
            rows.append(
                [
                    f"`{name}`",
                    method,
                    *(
                        mean_sd(_values(ours, method, task, metric, factor), digits)
                        for metric, _, factor, digits in columns
                    ),
                ]
            )
    return _markdown_table(rows)


def _differences(arms: Sequence[tuple[str, str]], results: Sequence[Result]) -> list[str]:
    """Counting figures of each network's own method minus those of ``boundary`` with the same seed."""
    reference = _of(results, "boundary")
    if not reference:
        return ["`boundary` was not among the runs."]
    rows = [["network", *(heading for _, heading, _, _ in _COUNTING)]]
    for name, _ in arms:
        ours = _of(results, name)
        method = own_method(ours[0])
        pairs = [(a, b) for a in ours for b in reference if a["seed"] == b["seed"]]
        if name != "boundary":
            row = [f"`{name}` ({method})"]
            for metric, _, factor, digits in _COUNTING:
                differences = [
                    _values([a], method, "counting", metric, factor)[0]
                    - _values([b], "boundary", "counting", metric, factor)[0]
                    for a, b in pairs
                ]
                row.append(mean_sd(differences, digits, signed=True))
            rows.append(row)
    return _markdown_table(rows)


def _peaks(arms: Sequence[tuple[str, str]], results: Sequence[Result]) -> list[str]:
    rows = [["network", "Dice best at", "Dice there", "F1 there", "F1 best at", "Dice there", "F1 there"]]
    for name, _ in arms:
        found: list[list[float]] = []
        for result in _of(results, name):
            curve = curve_of(result, "threshold", "foreground_threshold")
            dice, f1 = (_peak(curve, metric) for metric in ("dice", "f1"))
            found.append(
                [value for p in (dice, f1) for value in (p["threshold"], p["figures"]["dice"], p["figures"]["f1"])]
            )
        digits = (2, 4, 3, 2, 4, 3)
        rows.append(
            [f"`{name}`", *(mean_sd(column, d) for column, d in zip(zip(*found, strict=True), digits, strict=True))]
        )
    return _markdown_table(rows)


def sweep_figure(names: Sequence[str], results: Sequence[Result]) -> bytes:
    """PNG: Dice, F1, F1 apart and count error against the threshold; one colour per network, shaded over its seeds."""
    figure, axes = make_figure(2, len(_SWEPT), (15, 7.5))
    for row, (own, what) in enumerate(((False, "threshold + components"), (True, "own method, seed threshold"))):
        in_row = axes[row * len(_SWEPT) : (row + 1) * len(_SWEPT)]
        for axis, (metric, label, factor) in zip(in_row, _SWEPT, strict=True):
            for colour, name in zip(pick_colours(len(names)), names, strict=True):
                curves = [_curve(result, own=own) for result in _of(results, name)]
                if not curves[0]:
                    continue
                x = [point["threshold"] for point in curves[0]]
                y = [[_or_nan(p["figures"][metric]) * factor for p in curve] for curve in curves]
                columns = list(zip(*y, strict=True))
                axis.plot(x, [statistics.fmean(c) for c in columns], marker=".", color=colour, label=name)
                axis.fill_between(
                    x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
                )
            axis.set(title=f"{label}: {what}", xlabel="threshold", xlim=(0, 1))
            axis.title.set_fontsize(10)
            low, high = y_limits(axis, errors=metric.startswith("count"))
            axis.set_ylim(*((0, max(40, high)) if metric.startswith("count") else (min(0.3, low), 1)))
        if in_row[0].get_legend_handles_labels()[0]:
            in_row[0].legend(fontsize=8, loc="lower center")
    return to_png(figure)


def own_method(result: Result) -> str:
    """Method that the network of ``result`` was made for."""
    return _OWN[result["settings"]["model"]["variant"]]


def curve_of(result: Result, method: str, parameter: str) -> list[dict[str, Any]]:
    """Points of one curve of the sweep, by ascending threshold."""
    return [p for p in result["sweep"] if (p["method"], p["parameter"]) == (method, parameter)]


def _curve(result: Result, *, own: bool) -> list[dict[str, Any]]:
    return (
        curve_of(result, own_method(result), "seed_threshold")
        if own
        else curve_of(result, "threshold", "foreground_threshold")
    )


def _peak(curve: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    return max(curve, key=lambda point: float(point["figures"][metric]))


def _of(results: Sequence[Result], name: str) -> list[Result]:
    return [result for result in results if result["run"] == name]


def _values(results: Iterable[Result], method: str, task: str, metric: str, factor: float) -> list[float]:
    return [_or_nan(result["points"][method][task]["figures"][metric]) * factor for result in results]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def mean_sd(values: Sequence[float], digits: int, *, signed: bool = False) -> str:
    """``mean ± sd``, only the mean for a single value, a dash if one is undefined."""
    if not values or any(math.isnan(value) for value in values):
        return "–"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _short(weights: str) -> str:
    return Path(weights).name if Path(weights).is_absolute() else weights


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return table(head, body, words=len(head))
