"""Networks that differ in what they were trained with, judged on fields of several laboratories: one table.

Reads what ``cellseg-evaluate --boxes/--points`` wrote: ``FOLDER/NETWORK-SEED/FIELDS/metrics.json``, with FIELDS the
name of a set of fields. Trains nothing; docs/study.md has the commands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.report import table
from cellseg_benchmarks.quality.study_report import mean_sd
from cellseg_deploy.errors import DataError, UsageError
from cellseg_deploy.files.json_record import content_of

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a set of fields -> the metrics of each seed."""
_FEWEST_WHITE = 10  # a share of fewer cells says nothing


def read_scores(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return network -> fields -> metrics of each seed, in the order of the names.

    Raises ``UsageError`` if ``folder`` has no such files, ``DataError`` for one that is not the record of an evaluation
    against boxes or points.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.glob("*-*/*/metrics.json")):
        metrics = content_of(file)
        if "recall_overlapping" not in metrics:
            raise DataError(f"{file}: has no recall_overlapping; expected an evaluation with --boxes or --points")
        found[file.parent.parent.name.rpartition("-")[0]][file.parent.name].append(metrics)
    if not found:
        raise UsageError(f"{folder}: expected files NETWORK-SEED/FIELDS/metrics.json, found none")
    return {network: dict(fields) for network, fields in found.items()}


def to_markdown(scores: Mapping[str, Scores], networks: Sequence[str]) -> str:
    """Return a table for each metric: a row per network in the order of ``networks``, a column per set of fields."""
    fields = list(dict.fromkeys(name for network in networks for name in scores[network]))
    parts = list[str]()
    for title, value in (("F1", _f1), ("Overlapping cells found", _overlapping), ("White cells found whole", _white)):
        rows = []
        for network in networks:
            runs = [scores[network].get(name, []) for name in fields]
            cells = [[got for run in seeds if (got := value(run)) is not None] for seeds in runs]
            seeds = max(len(each) for each in runs)
            rows.append([f"`{network}`", str(seeds), *(mean_sd(cell, 3) if cell else "" for cell in cells)])
        used = [column for column in range(len(fields)) if any(row[2 + column] for row in rows)]
        head = ["network", "seeds", *(fields[column] for column in used)]
        parts += [
            f"**{title}**",
            "",
            *table(head, [[*row[:2], *(row[2 + column] for column in used)] for row in rows]),
            "",
        ]
    return "\n".join(parts)


def _f1(metrics: Mapping[str, Any]) -> float | None:
    return None if metrics["f1"] is None else float(metrics["f1"])


def _overlapping(metrics: Mapping[str, Any]) -> float | None:
    return float(metrics["recall_overlapping"]) if metrics["n_overlapping"] else None


def _white(metrics: Mapping[str, Any]) -> float | None:
    found = [kind for name, kind in metrics.get("by_class", {}).items() if name in ("WBC", "leukocyte")]
    return float(found[0]["recall"]) if found and found[0]["n"] >= _FEWEST_WHITE else None


@click.command("truths", context_settings=shared.SETTINGS)
@click.argument("folder", metavar="FOLDER", type=shared.PATH)
@click.option("--networks", metavar="A,B,...", help="Rows of the tables, in this order.  [default: all, by name]")
def truths_command(folder: Path, networks: str | None) -> None:
    """Print tables of networks that were trained with different truth.

    FOLDER has NETWORK-SEED/FIELDS/metrics.json, written by cellseg-evaluate with --boxes or --points.
    """
    scores = read_scores(folder)
    names = list(scores) if networks is None else networks.split(",")
    if unknown := [name for name in names if name not in scores]:
        raise UsageError(f"--networks: {', '.join(unknown)} not in {folder}, which has {', '.join(scores)}")
    click.echo(to_markdown(scores, names))
