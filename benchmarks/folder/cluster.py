"""The same folder in one process and on local Dask clusters, from files to results: what ``--scheduler`` costs.

Each turn is a whole run into a new folder: the workers open the model for each run, as those of a cluster that is
always on. Starting a local cluster is timed apart. Results must be the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.folder.processes import digest
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, table, times
from cellseg_benchmarks.harness.timer import Plan, Times, Turn, interleave, ratio, stopwatch, turn_of
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cluster.connection import LOCAL
from cellseg_deploy.cluster.engine import open_cluster
from cellseg_deploy.errors import DataError, plural
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import plan as plan_threads

ALONE = "one process"
Run = Callable[[Path], None]
"""Counts the images into a new folder."""


@dataclass(frozen=True)
class ClusterReport:
    """``images``: in a run. ``start_seconds``: to start each local cluster. ``runs``: whole runs, the first without a
    cluster."""

    conditions: Conditions
    threads: int | None
    images: int
    start_seconds: Mapping[str, float]
    runs: Mapping[str, Times]
    benchmark: str = "cluster"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """One table; ratios within a round."""
        alone = self.runs[ALONE]
        rows = [
            [
                name,
                number(run.median),
                number(run.median / self.images),
                "1" if name == ALONE else times(ratio(run.seconds, alone.seconds)),
                number(self.start_seconds[name]) if name in self.start_seconds else "-",
            ]
            for name, run in self.runs.items()
        ]
        head = ("run by", "s", "s per image", "x one process", "s to start the cluster, not included")
        lines = [
            "# A local cluster and one process",
            "",
            *machine_lines(self.conditions, self.threads),
            f"{plural(self.images, 'image')}; label images and tables are the same. Ratios within a round: median, "
            "95 % interval.",
            "",
            *table(head, rows, words=1),
        ]
        return "\n".join(lines) + "\n"


def measure(
    runs: Mapping[str, Run], work: Path, plan: Plan, *, say: Callable[[str], None], progress: Progress | None = None
) -> dict[str, Times]:
    """Time ``runs`` in turns, each into a folder in ``work``. Raises ``DataError`` if their results differ."""
    measured = interleave(
        {name: _turn(run, work / name) for name, run in runs.items()}, plan, say=say, progress=progress
    )
    if measured.failed:
        raise DataError("; ".join(f"{name}: {why}" for name, why in measured.failed.items()))
    expected = _results(work / ALONE)
    for name in runs:
        if _results(work / name) != expected:
            raise DataError(f"label images or cells.csv of {name} are not those of {ALONE}")
    return dict(measured.times)


def _turn(run: Run, out: Path) -> Turn:
    def into_a_new_folder() -> None:
        shutil.rmtree(out, ignore_errors=True)
        run(out)

    return turn_of(into_a_new_folder)


def _results(out: Path) -> tuple[str, bytes]:
    return digest([out]), (out / "cells.csv").read_bytes()


@click.command("cluster", context_settings=shared.SETTINGS)
@click.argument("photographs", nargs=-1, type=shared.PATH)
@shared.model_option
@click.option("--images", type=click.IntRange(1), default=40, show_default=True, help="Images in a run.")
@click.option("--megapixels", type=float, default=1.92, show_default=True, help="Size of a sample smear.")
@click.option("--workers", default="1,2", show_default=True, metavar="N,...", help="Processes of each local cluster.")
@shared.rounds_options(5, min_seconds=0)
@shared.measuring_options
def cluster_command(
    photographs: Sequence[Path],
    model: Path | None,
    images: int,
    megapixels: float,
    workers: str,
    rounds: int,
    min_seconds: float,
    settle_seconds: float,
    budget_seconds: float | None,
    **given: Any,
) -> None:
    """A folder on local Dask clusters against the same folder in one process.

    The images are PHOTOGRAPHS (files or folders), without them sample smears. Writes cluster.json and cluster.md
    to DIR.
    """
    image_set.check_size(megapixels)
    numbers = shared.numbers(workers, "--workers")
    bench = shared.Bench("cluster", given)
    progress = bench.begin()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=bench.output, prefix="work-")))
        if photographs:
            pictures = image_set.given_images(photographs, images)
        else:
            pictures = image_set.smears(min(images, image_set.DIFFERENT), image_set.size_for(megapixels))
        folders, _ = image_set.write_set(work, pictures, ["png"], images)
        found = find_images([folders["png"]])
        segmenter = stack.enter_context(Segmenter.load(model, engine=EngineOptions(threads=bench.threads)))
        count = partial(
            run_folder, segmenter, found, options=RunOptions(report=False), threads=plan_threads(bench.threads)
        )
        runs: dict[str, Run] = {ALONE: lambda out: _count(count, out)}
        starts = dict[str, float]()
        for n in numbers:
            name = f"a cluster of {plural(n, 'worker')}"
            bench.say(f"starting {name}")
            since = stopwatch()
            cluster = stack.enter_context(open_cluster(LOCAL, workers=n, threads=bench.threads))
            starts[name] = since()
            runs[name] = partial(_count, partial(count, elsewhere=cluster))
        plan = Plan(rounds, min(3, rounds), min_seconds, settle_seconds, budget_seconds)
        measured = measure(runs, work, plan, say=bench.say, progress=progress)
    bench.publish(ClusterReport(bench.conditions(), bench.threads, images, starts, measured), None)


def _count(count: Callable[..., Any], out: Path) -> None:
    summary = count(out=out)
    if summary.failed:
        raise DataError(f"{summary.failed} of {summary.found} images failed")
