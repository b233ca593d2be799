"""What the figures of the study mean, in sentences that are made of them: they change when the results do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]

_PLAIN, _BOUNDARY, _DISTANCE, _SURFACE = "plain", "boundary", "distance", "boundary-surface"
_DICE_FLOOR = 0.005
"""A counting point this much below the best Dice of all networks still counts as one point for both tasks."""


def answers(results: Sequence[Result]) -> list[str]:
    """One paragraph a question, of those that the runs in ``results`` can answer."""
    found = [
        _boundary_head(results),
        _watershed(results),
        _against_boundary(results, _DISTANCE, "distance", "the distance channel"),
        _against_boundary(results, _SURFACE, "boundary", "the surface loss"),
        _single_point(results),
    ]
    return [paragraph for paragraph in found if paragraph]


def _boundary_head(results: Sequence[Result]) -> str:
    plain = _figures(results, _PLAIN, "threshold", "confluence")
    other = _figures(results, _BOUNDARY, "boundary", "confluence")
    if not plain or not other:
        return ""
    counted = _figures(results, _PLAIN, "threshold", "counting")
    return (
        "**Does the boundary head lower the count error at equal Dice?** With both networks at the point of highest "
        f"Dice ({_mean(plain, 'dice', 4)} plain, {_mean(other, 'dice', 4)} boundary), the count error is "
        f"{_percent(plain, 'count_mape')} for plain and {_percent(other, 'count_mape')} for boundary, F1 "
        f"{_mean(plain, 'f1', 3)} and {_mean(other, 'f1', 3)}. Calibrated for counts, the plain network takes a "
        f"foreground threshold of {_choices(results, _PLAIN, 'threshold', 'counting', 'foreground_threshold')} (count "
        f"error {_percent(counted, 'count_mape')}, F1 {_mean(counted, 'f1', 3)}), where its Dice is "
        f"{_mean(counted, 'dice', 4)}."
    )


def _watershed(results: Sequence[Result]) -> str:
    flat = _figures(results, _BOUNDARY, "threshold", "counting")
    grown = _figures(results, _BOUNDARY, "boundary", "counting")
    if not flat or not grown:
        return ""
    return (
        "**What do watershed seeds add?** The same boundary networks, each method at its own counting point: threshold "
        f"and connected components on the foreground alone reach F1 {_mean(flat, 'f1', 3)} at Dice "
        f"{_mean(flat, 'dice', 4)}; seeds of foreground less boundary, grown back over the foreground, F1 "
        f"{_mean(grown, 'f1', 3)} at Dice {_mean(grown, 'dice', 4)} (foreground threshold "
        f"{_choices(results, _BOUNDARY, 'boundary', 'counting', 'foreground_threshold')}, seeds at "
        f"{_choices(results, _BOUNDARY, 'boundary', 'counting', 'seed_threshold')}). The mean AP, which asks for "
        f"outlines, goes from {_mean(flat, 'map', 3)} to {_mean(grown, 'map', 3)}."
    )


def _against_boundary(results: Sequence[Result], run: str, method: str, what: str) -> str:
    ours, theirs = _by_seed(results, run, method), _by_seed(results, _BOUNDARY, "boundary")
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return ""
    parts = []
    for metric, name, factor, digits, unit in (
        ("f1_apart", "F1 apart", 1, 3, ""),
        ("count_mape_apart", "the count error apart", 100, 1, " points"),
        ("dice", "Dice", 1, 4, ""),
    ):
        changes = [(ours[seed][metric] - theirs[seed][metric]) * factor for seed in seeds]
        parts.append(f"{name} by {statistics.fmean(changes):+.{digits}f}{unit} ({_agreement(changes)})")
    return (
        f"**What does {what} add?** Against `boundary` with the same seed, at the counting point, it changes "
        f"{', '.join(parts[:-1])} and {parts[-1]}."
    )


def _single_point(results: Sequence[Result]) -> str:
    """The network and method with the best F1 apart among those whose Dice is near the best there is."""
    candidates = []
    for run in dict.fromkeys(result["run"] for result in results):
        for method in next(result for result in results if result["run"] == run)["points"]:
            found = _figures(results, run, method, "counting")
            candidates.append((run, method, found))
    highest = max(statistics.fmean(f["dice"] for f in found) for _, _, found in candidates)
    fit = [c for c in candidates if statistics.fmean(f["dice"] for f in c[2]) >= highest - _DICE_FLOOR]
    run, method, found = max(fit, key=lambda c: statistics.fmean(f["f1_apart"] for f in c[2]))
    confluence = _figures(results, run, method, "confluence")
    settings = ", ".join(
        f"`{name}` {_choices(results, run, method, 'counting', name)}"
        for name in next(r for r in results if r["run"] == run)["points"][method]["counting"]["choices"][0]
        if name != "method"
    )
    return (
        f"**The best single operating point** (F1 apart, at a Dice within {_DICE_FLOOR:g} of the highest): `{run}` "
        f"with method `{method}`: Dice {_mean(found, 'dice', 4)}, F1 {_mean(found, 'f1', 3)}, F1 apart "
        f"{_mean(found, 'f1_apart', 3)}, count error apart {_percent(found, 'count_mape_apart')}; a point "
        f"of its own for confluence has Dice {_mean(confluence, 'dice', 4)}. Chosen over folds and seeds (least to "
        f"most): {settings}."
    )


def _figures(results: Sequence[Result], run: str, method: str, task: str) -> list[dict[str, float]]:
    return [
        {name: math.nan if value is None else float(value) for name, value in points[task]["figures"].items()}
        for result in results
        if result["run"] == run and (points := result["points"].get(method))
    ]


def _by_seed(results: Sequence[Result], run: str, method: str) -> dict[int, dict[str, float]]:
    return {
        result["seed"]: _figures([result], run, method, "counting")[0]
        for result in results
        if result["run"] == run and method in result["points"]
    }


def _choices(results: Sequence[Result], run: str, method: str, task: str, name: str) -> str:
    """The value of a setting, or its range over folds and seeds."""
    values = sorted(
        choice[name]
        for result in results
        if result["run"] == run
        for choice in result["points"][method][task]["choices"]
        if choice.get(name) is not None
    )
    if not values:
        return "–"
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _agreement(changes: Sequence[float]) -> str:
    """Whether the seeds agree: a mean over few of them proves little."""
    return f"higher with {sum(change > 0 for change in changes)} of {len(changes)} seeds"


def _mean(found: Sequence[dict[str, float]], metric: str, digits: int) -> str:
    return f"{statistics.fmean(f[metric] for f in found):.{digits}f}"


def _percent(found: Sequence[dict[str, float]], metric: str) -> str:
    return f"{100 * statistics.fmean(f[metric] for f in found):.1f} %"
