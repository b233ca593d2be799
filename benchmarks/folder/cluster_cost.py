"""Cost of a run on a cluster: measured here where it can be, predicted where it cannot."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.folder import cluster_model as model
from cellseg_benchmarks.folder.cluster_model import Assumptions, Costs, Prediction, Sample, Work
from cellseg_benchmarks.folder.sleepers import SAVE, Body, Slept, run_sleepers
from cellseg_benchmarks.harness import images
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, percent, table
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.cells.row_resize import scaled_size
from cellseg_deploy.cli import console
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.models import default_model_path
from cellseg_deploy.run import journal as journals
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.journal import JOURNAL
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides.network import tiles_in
from cellseg_deploy.threads import ThreadPlan

Say = Callable[[str], None]
PHOTOGRAPH_HW = (1200, 1600)
SLIDE_HW = (100_000, 100_000)
MILLION = 1_000_000
_IN_MEMORY = "/dev/shm"
_SYNCS = 31


@dataclass(frozen=True)
class Settings:
    """``megapixels``: sizes of measured images, ``per_size`` each. ``workers``: numbers of sleeping workers, which
    sleep for ``sleep`` seconds, ``waves`` times each. ``free_images``: done without sleep, for the most that scheduler
    and journal handle."""

    model: Path | None = None
    megapixels: str = "0.5,2,4.5"
    per_size: int = 3
    workers: str = "16,64,128"
    sleep: float = 1.0
    waves: int = 4
    free_images: int = 256
    assumed: Assumptions = field(default_factory=Assumptions)
    engine: shared.Engine = field(default_factory=shared.Engine)
    threads: int | None = None


@dataclass(frozen=True)
class CostReport:
    """``samples``: measured; ``slept``: runs of sleeping workers; the first without sleep. ``counted``: a run whose
    messages were counted."""

    conditions: Conditions
    threads: int | None
    engine: str
    samples: tuple[Sample, ...]
    costs: Costs
    assumed: Assumptions
    slept: tuple[Slept, ...]
    counted: Slept
    predictions: tuple[Prediction, ...]
    benchmark: str = "cluster-cost"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return the tables of docs/scaling.md."""
        lines = ["# Cost on a cluster", "", *machine_lines(self.conditions, self.threads), f"{self.engine}.", ""]
        return "\n".join([*lines, *self._measured(), *self._checked(), *self._predicted()]) + "\n"

    def _measured(self) -> list[str]:
        rows = [
            [
                f"{sample.pixels / 1e6:.3g}",
                str(sample.tiles),
                number(sample.seconds),
                number(self.costs.node(sample.tiles)),
                number(sample.cpu_seconds),
                number(self.costs.cores(sample.tiles)),
                f"{sample.read_bytes / 1e6:.3g}",
                f"{sample.written_bytes / 1e6:.3g}",
            ]
            for sample in self.samples
        ]
        node, cores, messages = self.costs.node, self.costs.cores, self.counted.messages
        assert messages is not None
        head = ("megapixels", "tiles", "s, measured", "s, fitted", "core s without network, measured", "fitted")
        return [
            *table((*head, "MB read", "MB written"), rows, words=0),
            "",
            f"Per image on this machine: {number(node.constant)} s + {number(node.per_tile)} s x tiles; without the "
            f"network {number(cores.constant)} + {number(cores.per_tile)} x tiles core seconds; "
            f"{messages.count / self.counted.images:.0f} messages of {messages.nbytes / messages.count:.0f} bytes "
            "through the scheduler.",
            "",
        ]

    def _checked(self) -> list[str]:
        rows = []
        for run in self.slept:
            expected = model.seconds_of_sleepers(
                run.images, run.workers, run.sleep_seconds, self.costs.images_per_second
            )
            rows.append(
                [
                    *(str(run.workers), str(run.images), number(run.sleep_seconds), number(run.seconds)),
                    *(number(expected), percent(run.seconds / expected - 1)),
                ]
            )
        head = ("sleeping workers", "images", "s per image", "s, measured", "s, predicted", "longer by")
        return [
            *table(head, rows, words=0),
            "",
            f"Scheduler and journal: {number(self.costs.images_per_second)} images per second (the first row), all in "
            f"one process and with files in memory. One fsync takes {1000 * self.costs.sync_seconds:.1f} ms on this "
            f"disk, {model.SYNCS_PER_IMAGE} per image: {number(self.costs.recorded_per_second)} images per second.",
            "",
        ]

    def _predicted(self) -> list[str]:
        rows = [
            [
                each.work.name,
                f"{each.workers} {each.on}" if each.workers > 1 else f"1 {each.on.removesuffix('s')}",
                model.duration(each.seconds),
                each.limits[0][0],
                ", ".join(f"{name} {model.duration(seconds)}" for name, seconds in each.limits[1:]),
            ]
            for each in self.predictions
        ]
        a = self.assumed
        return [
            *table(("work", "on", "time", "first bottleneck", "the others alone"), rows, words=5),
            "",
            f"Assumed, **not measured**: a GPU does {number(a.gpu_tiles_per_second)} tiles per second, and has "
            f"{a.cores_per_gpu} cores like these; storage moves {number(a.storage_bytes_per_second / 1e6)} MB/s for "
            "all machines together; a CPU node is a machine like this one. A slide is done by one process, not "
            "by the workers of `--scheduler`. A slide is extrapolated far beyond the sizes measured.",
        ]


def measure_samples(
    settings: Settings, segmenter: Segmenter, threads: ThreadPlan, folder: Path, say: Say
) -> tuple[list[Sample], Body]:
    """Run folders of images of each size; return their costs, and what the sleepers are to write."""
    samples: list[Sample] = []
    body: Body | None = None
    for size in shared.numbers(settings.megapixels, "--megapixels", float):
        hw = images.size_for(size)
        place = folder / f"{size:g}"
        place.mkdir()
        for number_of, smear in enumerate(images.smears(settings.per_size, hw)):
            (place / f"{number_of}.jpg").write_bytes(images.encoded(smear, "jpg"))
        out, found = folder / f"out-{size:g}", find_images([place])
        options = RunOptions(save=SAVE, report=False)
        if not samples:  # libraries load on first use
            run_folder(segmenter, found[:1], folder / "warm", options=options, threads=threads)
        summary = run_folder(segmenter, found, out, options=options, threads=threads)
        if summary.failed:
            raise DataError(f"{summary.failed} of {summary.found} images of {size:g} megapixels failed")
        content = journals.read(out / JOURNAL)
        records = list(journals.whole_records(content.path, content.entries.values()))
        samples.append(
            Sample(
                pixels=hw[0] * hw[1],
                tiles=tiles_of(segmenter, hw),
                seconds=summary.wall_seconds / len(records),
                cpu_seconds=statistics.mean(
                    sum(value for stage, value in record.seconds.items() if stage != "network") for record in records
                ),
                read_bytes=statistics.mean(image.path.stat().st_size for image in found),
                written_bytes=statistics.mean(sum(file.size for file in record.outputs) for record in records),
            )
        )
        say(f"{size:g} megapixels: {samples[-1].seconds:.2f} s per image")
        body = body or Body(0.0, records[0], {file.path: (out / file.path).read_bytes() for file in records[0].outputs})
    assert body is not None
    return samples, body


def tiles_of(segmenter: Segmenter, hw: tuple[int, int]) -> int:
    """Number of tiles of an image of ``hw`` px."""
    return tiles_in(scaled_size(hw, segmenter.scale), segmenter.backend.spec.tile_size, segmenter.halo)


def seconds_of_sync(path: Path) -> float:
    """Return the median time of an fsync after a line was appended to ``path``."""
    seconds = []
    with path.open("ab") as file:
        for _ in range(_SYNCS):
            file.write(b"x" * 1000 + b"\n")
            file.flush()
            since = stopwatch()
            os.fsync(file.fileno())
            seconds.append(since())
    return statistics.median(seconds)


def measure_sleepers(
    settings: Settings, segmenter: Segmenter, body: Body, folder: Path, say: Say
) -> tuple[list[Slept], Slept]:
    """Run sleeping workers: without sleep first, then for each number of workers, then a few with messages counted."""
    small = folder / "small.png"
    small.write_bytes(images.encoded(next(images.smears(1, (64, 64))), "png"))
    asked = shared.numbers(settings.workers, "--workers")
    plans = [(asked[-1], 0.0, settings.free_images)]
    plans += [(workers, settings.sleep, settings.waves * workers) for workers in asked]
    plans += [(4, 0.0, 40)]
    slept = []
    for index, (workers, seconds, n_images) in enumerate(plans):
        place = folder / f"sleep-{index}"
        images.link_copies([small], place, n_images)
        body.seconds = seconds
        out, is_last = folder / f"slept-{index}", index == len(plans) - 1
        slept.append(run_sleepers(segmenter, place, out, body, workers=workers, count_messages=is_last))
        say(f"{workers} workers, {n_images} images of {seconds:g} s: {slept[-1].seconds:.1f} s")
    return slept[:-1], slept[-1]


def predictions_of(costs: Costs, assumed: Assumptions, segmenter: Segmenter) -> list[Prediction]:
    """Predict a million photographs and one slide."""
    photograph, slide = (hw[0] * hw[1] for hw in (PHOTOGRAPH_HW, SLIDE_HW))
    works = [
        Work("1,000,000 photographs of 1600 x 1200 px", MILLION, photograph, tiles_of(segmenter, PHOTOGRAPH_HW)),
        Work("a slide of 100,000 x 100,000 px", 1, slide, tiles_of(segmenter, SLIDE_HW), is_slide=True),
    ]
    places = [(1, model.GPUS), (8, model.GPUS), (64, model.GPUS), (1, model.NODES), (64, model.NODES)]
    return [model.predict(costs, assumed, work, workers, on) for work in works for workers, on in places]


@click.command("cluster-cost", context_settings=shared.SETTINGS)
@shared.model_option
@click.option("--megapixels", default=Settings.megapixels, show_default=True, metavar="N,...", help="Image sizes.")
@click.option("--per-size", type=click.IntRange(1), default=Settings.per_size, show_default=True, help="Images.")
@click.option(
    "--workers", default=Settings.workers, show_default=True, metavar="N,...", help="Numbers of sleeping workers."
)
@click.option(
    "--sleep", type=click.FloatRange(0.01), default=Settings.sleep, show_default=True, help="Seconds per image."
)
@click.option("--waves", type=click.IntRange(1), default=Settings.waves, show_default=True, help="Images per worker.")
@click.option(
    "--free-images",
    type=click.IntRange(1),
    default=Settings.free_images,
    show_default=True,
    help="Without sleep.",
)
@click.option(
    "--gpu-tiles-per-second", type=click.FloatRange(0.001), default=Assumptions.gpu_tiles_per_second, show_default=True
)
@click.option("--cores-per-gpu", type=click.IntRange(1), default=Assumptions.cores_per_gpu, show_default=True)
@click.option(
    "--storage-bytes-per-second",
    type=click.FloatRange(1),
    default=Assumptions.storage_bytes_per_second,
    show_default=True,
)
@shared.engine_options
@shared.measuring_options
def cluster_cost_command(**given: Any) -> None:
    """Measure what an image costs, check scheduler and journal with sleeping workers, and predict large runs.

    The last three options before the engine's are assumptions of the prediction. Writes cluster-cost.json and
    cluster-cost.md to DIR.
    """
    console.require_packages("cluster", "distributed")
    settings = shared.settings_of(Settings, given)
    bench = shared.Bench("cluster-cost", given)
    bench.begin()
    asked = settings.engine
    threads = console.plan_threads(settings.threads, device=asked.device, model=settings.model, backend=asked.backend)
    engine = console.engine_options(asked.arguments() | {"rebuild": False, "cuda_graph": False}, threads)
    with (
        tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place,
        tempfile.TemporaryDirectory(dir=_IN_MEMORY if Path(_IN_MEMORY).is_dir() else place) as memory,
        Segmenter.load(
            settings.model or default_model_path(), engine=engine, cell_diameter_px=images.DIAMETER_PX
        ) as segmenter,
    ):
        folder = Path(place)
        samples, body = measure_samples(settings, segmenter, threads, folder, bench.say)
        sync_seconds = seconds_of_sync(folder / "synced")
        slept, counted = measure_sleepers(settings, segmenter, body, Path(memory), bench.say)
        costs = Costs.fitted(samples, slept[0].images / slept[0].seconds, sync_seconds)
        backend = segmenter.backend
        report = CostReport(
            conditions=bench.conditions(),
            threads=bench.threads,
            engine=f"Model {backend.spec.name}, {backend.name} {backend.precision} on {backend.device}",
            samples=tuple(samples),
            costs=costs,
            assumed=settings.assumed,
            slept=tuple(slept),
            counted=counted,
            predictions=tuple(predictions_of(costs, settings.assumed, segmenter)),
        )
    bench.publish(report, None)
