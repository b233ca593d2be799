"""From files to written results: a folder of images in each file format, cold and warm.

*Cold*: a new process, from its start to the last file written, with images and model dropped from the page cache as far
as the system does that. *Warm*: the same folder again in that process. Formats take turns, round by round.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.engine.limits import Limits, limit_workers, size_option
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.figures import Bar, Bars, Panel, Stacks, panels_png
from cellseg_benchmarks.harness.flops import count_flops
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress, turns_left
from cellseg_benchmarks.harness.report import NOT_RUN, REPORT_VERSION, machine_lines, number, percent, table
from cellseg_benchmarks.harness.timer import Plan, interleave, order_of_round, stopwatch
from cellseg_benchmarks.harness.worker import Worker
from cellseg_deploy.cells import tiling
from cellseg_deploy.errors import UsageError
from cellseg_deploy.models import default_model_path

Say = Callable[[str], None]
State = Literal["cold", "warm"]
STAGES = ("read", "resize", "tile", "network", "label", "measure", "write")


@dataclass(frozen=True)
class Run:
    """One run over all images. ``seconds``: cold, from the start of the process; warm, of the run. ``start_seconds``:
    until the model was open; 0 if it was already open."""

    file_format: str
    round: int
    state: State
    seconds: float
    start_seconds: float
    wall_seconds: float
    engine_seconds: float
    stage_seconds: dict[str, float]
    images: int
    cells: int


@dataclass(frozen=True)
class Summary:
    """Medians over the runs of one format and state. ``engine_busy``: share of the run (without the start) in which
    the network ran. ``stage_shares``: seconds of each stage, summed over images, as a share of the run's wall time;
    stages overlap, so the sum may exceed 1."""

    file_format: str
    state: State
    runs: int
    seconds: float
    images_per_second: float
    seconds_per_image: float
    seconds_per_megapixel: float
    start_seconds: float
    engine_busy: float
    stage_shares: dict[str, float]


@dataclass(frozen=True)
class Share:
    """Rates of the warm runs of a format relative to the machine's limits. ``read_rate``: megapixels per second in each
    reader thread; ``tflops``: of the network's arithmetic, while it runs. The limits are None if unknown."""

    file_format: str
    read_rate: float
    read_limit: float | None
    tflops: float | None
    peak_tflops: float | None

    @property
    def read_share(self) -> float | None:
        """``read_rate`` as a share of its limit."""
        return None if not self.read_limit else self.read_rate / self.read_limit

    @property
    def peak_share(self) -> float | None:
        """``tflops`` as a share of the peak."""
        return None if self.tflops is None or not self.peak_tflops else self.tflops / self.peak_tflops


@dataclass(frozen=True)
class PipelineReport:
    """All runs and their summaries. ``engine``: facts of the worker. ``evicted``: whether the page cache could be
    asked to drop the files before a cold run."""

    conditions: Conditions
    threads: int | None
    images: int
    megapixels: float
    images_from: str
    megabytes: dict[str, float]
    engine: dict[str, Any]
    evicted: bool
    runs: tuple[Run, ...]
    summaries: tuple[Summary, ...]
    shares: tuple[Share, ...]
    limits: Limits
    not_run: dict[str, str] = field(default_factory=dict)
    benchmark: str = "pipeline"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return tables of speed and of stages."""
        engine = self.engine
        lines = ["# From files to results", "", *machine_lines(self.conditions, self.threads)]
        lines += [
            f"{self.images} images, {number(self.megapixels)} megapixels in all ({self.images_from}); model "
            f"{engine['model']}, {engine['engine']}, engine threads {engine['threads']['engine'] or 'all'}, "
            f"{engine['threads']['helpers']} helpers. Cold: a new process from its start"
            f"{', files dropped from the page cache' if self.evicted else ''}; warm: the run again in that process. "
            "Medians.",
            "",
        ]
        head = (
            "format",
            "state",
            "images/s",
            "s per image",
            "s per megapixel",
            "start, s",
            "engine busy",
            "MB of files",
        )
        rows = [
            [
                x.file_format,
                x.state,
                number(x.images_per_second),
                number(x.seconds_per_image),
                number(x.seconds_per_megapixel),
                number(x.start_seconds),
                percent(x.engine_busy),
                number(self.megabytes[x.file_format]),
            ]
            for x in self.summaries
        ]
        rows += [["on a GPU", "", NOT_RUN, *[""] * 5]] if self.not_run else []
        lines += [*table(head, rows, words=2), ""]
        lines += [f"- {device}: {reason}" for device, reason in self.not_run.items()]
        lines += ["", "Seconds of each stage, summed over images, as a share of the wall time of the run:", ""]
        stages = stages_of(self.summaries)
        rows = [[x.file_format, x.state, *(percent(x.stage_shares.get(s)) for s in stages)] for x in self.summaries]
        lines += [*table(("format", "state", *stages), rows, words=2), ""]
        lines += ["Beside what the machine can do (warm runs; reading in one thread, the network while it runs):", ""]
        beside = ("format", "read, MP/s", "limit", "share", "network, TFLOP/s", "peak", "share")
        rows = [
            [
                x.file_format,
                *(number(x.read_rate), number(x.read_limit), percent(x.read_share)),
                *(number(x.tflops), number(x.peak_tflops), percent(x.peak_share)),
            ]
            for x in self.shares
        ]
        lines += [*table(beside, rows), "", self.limits.to_markdown()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """Benchmark settings. ``images``: per folder. ``megapixels``: of a sample smear. ``warm``: runs per process."""

    model: Path | None = None
    images: int = 50
    megapixels: float = 1.92
    formats: str = "png,jpg,tif"
    rounds: int = 3
    warm: int = 2
    save: str = "labels,overlays"
    engine: shared.Engine = field(default_factory=shared.Engine)
    scale: shared.Scale = field(default_factory=shared.Scale)
    threads: int | None = None


def measure_pipeline(
    folders: Mapping[str, Path],
    settings: Settings,
    work: Path,
    *,
    start: Callable[..., Worker] = Worker,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> tuple[list[Run], dict[str, Any], bool]:
    """Run each of ``folders`` (by format) in new processes, cold, then warm in the same processes.

    Returns the runs, facts of the worker, and whether files could be dropped from the page cache.
    """
    runs: list[Run] = []
    facts: dict[str, Any] = {}
    evicted = True
    rounds = settings.rounds
    arguments = {
        "settings": {
            **settings.engine.arguments(),
            **settings.scale.arguments(),
            "path": None if settings.model is None else str(settings.model),
        },
        "threads": settings.threads,
        "work": str(work),
        "save": [] if settings.save == "none" else shared.words(settings.save),
    }
    progress = progress or Progress()
    turns = [(k, name) for k in range(rounds) for name in order_of_round(list(folders), k)]
    done = 0
    with progress.stoppable(lambda: turns_left(turns[done:])):
        for number_of_round, name in turns:
            files = [*folders[name].iterdir(), settings.model or default_model_path()]
            evicted = drop_from_cache(files) and evicted
            since = stopwatch()
            with start("folder", arguments) as worker:
                opened = since()
                facts = facts or worker.facts
                paths = [str(folders[name])]
                answer = worker.ask("run", paths=paths)
                runs.append(_run(name, number_of_round, "cold", answer, since(), opened))
                for _ in range(settings.warm):
                    answer = worker.ask("run", paths=paths)
                    runs.append(_run(name, number_of_round, "warm", answer, answer["seconds"], 0.0))
            done += 1
            progress.keep("runs", runs)
            last = runs[-1]
            rate = last.images / last.seconds
            say(f"round {number_of_round + 1} of {rounds}, {name}: {rate:.2f} images/s {last.state}")
    return runs, facts, evicted


def summarise(runs: Iterable[Run], megapixels: float) -> list[Summary]:
    """Medians by format and state; ``megapixels``: of all images of a run."""
    by_kind: dict[tuple[str, State], list[Run]] = {}
    for run in runs:
        by_kind.setdefault((run.file_format, run.state), []).append(run)
    found = []
    for (name, state), group in sorted(by_kind.items()):
        seconds = statistics.median(run.seconds for run in group)
        images = group[0].images
        shares = {
            stage: statistics.median(run.stage_seconds.get(stage, 0.0) / run.wall_seconds for run in group)
            for stage in dict.fromkeys(stage for run in group for stage in run.stage_seconds)
        }
        found.append(
            Summary(
                name,
                state,
                len(group),
                seconds,
                images / seconds,
                seconds / images,
                seconds / megapixels,
                statistics.median(run.start_seconds for run in group),
                statistics.median(run.engine_seconds / run.wall_seconds for run in group),
                shares,
            )
        )
    return found


def shares_of(
    runs: Sequence[Run],
    sizes: Sequence[tuple[int, int]],
    engine: Mapping[str, Any],
    limits: Limits,
    flops_per_tile: int | None,
) -> list[Share]:
    """Rates of warm runs (of all, if there are none) relative to ``limits``. ``sizes``: of the images of a run, (h, w);
    ``engine``: facts of the worker; ``flops_per_tile``: None if they could not be counted."""
    scale = engine["scale"]
    plans = (
        tiling.plan((max(1, round(h * scale)), max(1, round(w * scale))), engine["tile_size"], engine["halo"])
        for h, w in sizes
    )
    n_tiles = sum(len(plan) for plan in plans)
    megapixels = sum(h * w for h, w in sizes) / 1e6
    peak = limits.peak(engine["precision"], engine["device"])
    found = []
    for name in dict.fromkeys(run.file_format for run in runs):
        group = [run for run in runs if run.file_format == name]
        group = [run for run in group if run.state == "warm"] or group
        read = statistics.median(run.stage_seconds["read"] for run in group)
        busy = statistics.median(run.engine_seconds for run in group)
        limit = next((x.rate for x in limits.rates if (x.kind, x.what) == ("read", name)), None)
        tflops = None if flops_per_tile is None else flops_per_tile * n_tiles / busy / 1e12
        found.append(Share(name, megapixels / read, limit, tflops, None if peak is None else peak.rate))
    return found


def stages_of(summaries: Iterable[Summary]) -> list[str]:
    """Stages that occur, in the order of the work."""
    seen = {stage for summary in summaries for stage in summary.stage_shares}
    return [*(stage for stage in STAGES if stage in seen), *sorted(seen - set(STAGES))]


def png(report: PipelineReport) -> bytes:
    """Plot images per second, and the stages of a warm run."""
    bars = tuple(
        Bar(f"{x.file_format}, {x.state}", x.images_per_second, note=number(x.images_per_second), group=x.state)
        for x in report.summaries
    )
    shares = {f"{x.file_format}, {x.state}": x.stage_shares for x in report.summaries}
    stages = tuple(stages_of(report.summaries))
    panels: list[Panel] = [
        Bars("Images a second", "images/s, median", bars),
        Stacks("Where the seconds go", "seconds of the stage / wall seconds", stages, shares),
    ]
    return panels_png(panels, title=f"{report.engine['model']}, {report.engine['engine']}")


def drop_from_cache(files: Iterable[Path]) -> bool:
    """Ask the system to drop the contents of ``files``; return whether it supports this (Linux: for clean pages)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return True


def _run(name: str, round_: int, state: State, answer: Mapping[str, Any], seconds: float, start: float) -> Run:
    return Run(
        file_format=name,
        round=round_,
        state=state,
        seconds=seconds,
        start_seconds=start,
        wall_seconds=answer["wall_seconds"],
        engine_seconds=answer["engine_seconds"],
        stage_seconds=answer["stage_seconds"],
        images=answer["images"],
        cells=answer["cells"],
    )


@click.command("pipeline", context_settings=shared.SETTINGS)
@click.argument("paths", metavar="[IMAGE|FOLDER]...", nargs=-1, type=shared.PATH)
@shared.model_option
@click.option(
    "--images", type=click.IntRange(1), default=Settings.images, show_default=True, help="Images in a folder."
)
@click.option(
    "--megapixels", type=float, default=Settings.megapixels, show_default=True, help="Size of a sample smear."
)
@click.option(
    "--formats", default=Settings.formats, show_default=True, metavar="NAME,...", help="Formats to convert to."
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=Settings.rounds,
    show_default=True,
    help="New processes for each format.",
)
@click.option(
    "--warm", type=click.IntRange(0), default=Settings.warm, show_default=True, help="Warm runs in each process."
)
@click.option("--save", default=Settings.save, show_default=True, help="See cellseg-infer --help; none: tables only.")
@shared.scale_options
@shared.engine_options
@size_option
@shared.measuring_options
def pipeline_command(paths: tuple[Path, ...], matrix_size: int | None, **given: Any) -> None:
    """A folder of images from files to results: images a second, where the time goes, how busy the engine is.

    Takes the images given, or sample smears, as often as --images asks for, converted to each format. Writes
    pipeline.json, pipeline.md and pipeline.png to DIR.
    """
    settings = shared.settings_of(Settings, given)
    names = shared.words(settings.formats) or []
    unknown = [name for name in names if name not in image_set.FORMATS]
    if unknown or not names:
        raise UsageError(f"unknown format {', '.join(unknown)}; expected some of {', '.join(image_set.FORMATS)}")
    image_set.check_size(settings.megapixels)
    bench = shared.Bench("pipeline", given)
    progress = bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        work = Path(place)
        bench.say("writing the images ...")
        images = (
            image_set.given_images(paths, settings.images)
            if paths
            else image_set.smears(min(settings.images, image_set.DIFFERENT), image_set.size_for(settings.megapixels))
        )
        folders, hw = image_set.write_set(work, images, names, settings.images)
        runs, engine, evicted = measure_pipeline(folders, settings, work, say=bench.say, progress=progress)
        sizes = {name: sum(file.stat().st_size for file in folder.iterdir()) / 1e6 for name, folder in folders.items()}
        pixels = sum(height * width for height, width in hw)
        limits = Limits()
        if not progress.skips("what the machine can do"):
            bench.say("measuring what the machine can do ...")
            with limit_workers([engine["device"]], threads=bench.threads, size=matrix_size) as workers:
                plan = Plan(rounds=3)
                measured = interleave(workers.entries(), plan, say=bench.say, progress=progress, name="limits")
                limits = workers.limits(measured)
    model = settings.model or default_model_path()
    flops = count_flops(model).total if model.suffix.lower() == ".onnx" else None  # only .onnx files show their flops
    report = PipelineReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        images=settings.images,
        megapixels=pixels / 1e6,
        images_from="given images" if paths else "sample smears",
        megabytes=sizes,
        engine=engine,
        evicted=evicted,
        runs=tuple(runs),
        summaries=tuple(summarise(runs, pixels / 1e6)),
        shares=tuple(shares_of(runs, hw, engine, limits, flops)),
        limits=limits,
        not_run=settings.engine.not_run(bench.machine),
    )
    bench.publish(report, png(report))
