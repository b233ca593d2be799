"""Growth of time and memory: one image from 1 to 256 megapixels, and folders of 1 to 1,000 images.

Each measurement is a process of its own, which has opened the model and run a small image before timing starts, so
that one-time work is neither timed nor counted as memory of the image. Growth is the exponent ``a`` of
``time = c n^a``, by least squares in logarithms: 1 is proportional.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness import images
from cellseg_benchmarks.harness.figures import Lines, Panel, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress, turns_left
from cellseg_benchmarks.harness.report import NOT_RUN, REPORT_VERSION, machine_lines, megabytes, number, percent, table
from cellseg_benchmarks.harness.timer import order_of_round
from cellseg_benchmarks.harness.worker import Worker, WorkerError
from cellseg_deploy.errors import BackendUnavailableError, UsageError

Say = Callable[[str], None]
Series = Literal["megapixels", "images"]
SERIES: tuple[Series, ...] = ("megapixels", "images")

LINEAR_FROM = 4.0
"""Megapixels from which time must be proportional: below, the last tiles of a row weigh too much."""
_WARM_MEGAPIXELS = 0.1


@dataclass(frozen=True)
class Point:
    """One measurement. ``n``: megapixels of the image, or number of images. ``peak_bytes``: peak memory during the run;
    ``before_bytes``: memory before it."""

    series: Series
    n: float
    round: int
    pixels: int
    seconds: float
    engine_seconds: float
    peak_bytes: int
    before_bytes: int | None
    cells: int

    @property
    def own_bytes(self) -> int | None:
        """Memory that the run added."""
        return None if self.before_bytes is None else max(0, self.peak_bytes - self.before_bytes)


@dataclass(frozen=True)
class Growth:
    """Growth of a series. ``linear_within``: largest time per megapixel over the smallest, less 1, from ``LINEAR_FROM``
    on. ``bytes_per_pixel``: slope of memory over pixels by least squares. None if there are too few sizes."""

    series: Series
    time_exponent: float | None
    memory_exponent: float | None
    linear_within: float | None = None
    bytes_per_pixel: float | None = None


@dataclass(frozen=True)
class ScalingReport:
    """All points. ``held_bytes_per_pixel``: image, labels and one probability image of each type, which a run holds
    unless it streams. ``left_out``: sizes that were not measured, with the reason."""

    conditions: Conditions
    threads: int | None
    engine: dict[str, Any]
    held_bytes_per_pixel: dict[str, float]
    small_image_hw: tuple[int, int]
    points: tuple[Point, ...]
    growth: tuple[Growth, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    benchmark: str = "scaling"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return one table per series."""
        engine = self.engine
        lines = ["# Growth of time and memory", "", *machine_lines(self.conditions, self.threads)]
        held = ", ".join(f"{number(size)} ({name})" for name, size in self.held_bytes_per_pixel.items())
        lines += [
            f"Model {engine['model']}, {engine['engine']}. Each measurement is a process of its own with the model "
            "open; medians over rounds. *of the run*: memory that the run added to that. Image, labels and one "
            f"probability image alone take {held} bytes a pixel.",
            "",
        ]
        for series, title in zip(SERIES, ("One image", f"Images of {_size(self.small_image_hw)} px"), strict=True):
            rows = [
                [
                    number(n, 4),
                    number(statistics.median(p.seconds for p in group)),
                    number(statistics.median(p.seconds for p in group) / n),
                    percent(statistics.median(p.engine_seconds / p.seconds for p in group)),
                    megabytes(_median(group, "peak_bytes")),
                    megabytes(_median(group, "own_bytes")),
                    number(_per_pixel(group)),
                ]
                for n, group in by_size(self.points, series)
            ]
            rows += [[name, NOT_RUN, *[""] * 5] for name in self.left_out if name.endswith(series)]
            if not rows:
                continue
            unit = "megapixel" if series == "megapixels" else "image"
            head = (series, "s", f"s per {unit}", "engine busy", "peak, MB", "of the run, MB", "bytes per pixel")
            lines += [f"## {title}", "", *table(head, rows, words=0), ""]
            lines += [_growth_line(growth) for growth in self.growth if growth.series == series] + [""]
        lines += [f"- {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Settings:
    """Benchmark settings. ``megapixels``: sizes of one image. ``images``: per folder, of ``small`` megapixels each.
    ``max_megapixels``, ``max_images``: skip larger ones."""

    model: Path | None = None
    megapixels: str = "1,4,16,64,256"
    images: str = "1,10,100,1000"
    max_megapixels: float | None = None
    max_images: int | None = None
    small: float = 0.48
    rounds: int = 3
    engine: shared.Engine = field(default_factory=shared.Engine)
    scale: shared.Scale = field(default_factory=shared.Scale)
    threads: int | None = None

    def sizes(self) -> tuple[list[float], list[int], dict[str, str]]:
        """Sizes and numbers of images to measure, and those left out, with the reason.

        Raises click's usage error for an invalid list of numbers, ``UsageError`` for sizes that cannot be made or if
        nothing is left.
        """
        sizes = shared.numbers(self.megapixels, "--megapixels", float)
        counts = shared.numbers(self.images, "--images")
        for size in (*sizes, self.small):
            images.check_size(size)
        left_out = {
            f"{n:g} megapixels": f"left out by --max-megapixels {self.max_megapixels:g}"
            for n in sizes
            if self.max_megapixels is not None and n > self.max_megapixels
        }
        left_out |= {
            f"{n} images": f"left out by --max-images {self.max_images}"
            for n in counts
            if self.max_images is not None and n > self.max_images
        }
        if len(left_out) == len(sizes) + len(counts):
            told = "; ".join(f"{name} {why}" for name, why in left_out.items())
            raise UsageError(f"nothing is left to measure: {told}")
        return (
            [n for n in sizes if f"{n:g} megapixels" not in left_out],
            [n for n in counts if f"{n} images" not in left_out],
            left_out,
        )


def measure_scaling(
    settings: Settings,
    work: Path,
    *,
    start: Callable[..., Worker] = Worker,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> tuple[list[Point], dict[str, Any], dict[str, str]]:
    """Points of both series, facts of the worker, and sizes that failed, with the reason.

    Sizes take turns within a round. ``work``: folder for images and results, which the caller deletes.
    """
    megapixels, counts, _ = settings.sizes()
    small_hw = images.size_for(settings.small)
    smear = next(images.smears(1))
    warm = work / "warm.tif"
    images.write_mirrored(warm, smear, images.size_for(_WARM_MEGAPIXELS))
    small = [work / f"small-{k}.png" for k in range(2)]
    for path, image in zip(small, images.smears(2, small_hw), strict=True):
        path.write_bytes(images.encoded(image, "png"))
    opened = {"path": None if settings.model is None else str(settings.model)}
    opened = {**settings.engine.arguments(), **settings.scale.arguments(), **opened}
    arguments = {"settings": opened, "threads": settings.threads, "work": str(work)}
    tasks: dict[str, tuple[Series, float]] = {f"{n:g} megapixels": ("megapixels", n) for n in megapixels}
    tasks |= {f"{n} images": ("images", n) for n in counts}
    points: list[Point] = []
    facts: dict[str, Any] = {}
    failed: dict[str, str] = {}
    progress = progress or Progress()
    turns = [(k, name) for k in range(settings.rounds) for name in order_of_round(list(tasks), k)]
    done = 0
    with progress.stoppable(lambda: turns_left(turns[done:])):
        for number_of_round, name in turns:
            if name not in failed:
                series, n = tasks[name]
                source, pixels = _prepare(work, series, n, smear, small, small_hw)
                try:
                    with start("folder", arguments) as worker:
                        facts = facts or worker.facts
                        worker.ask("run", paths=[str(warm)])
                        answer = worker.ask("run", paths=[str(source)], max_pixels=pixels)
                except WorkerError as error:
                    failed[name] = str(error)
                    say(f"{name}: {error}")
                else:
                    points.append(_point(series, n, number_of_round, pixels, answer))
                    progress.keep("points", points)
                    say(f"round {number_of_round + 1} of {settings.rounds}, {name}: {answer['seconds']:.2f} s")
            done += 1
    return points, facts, failed


def _point(series: Series, n: float, number_of_round: int, pixels: int, answer: Mapping[str, Any]) -> Point:
    return Point(
        series=series,
        n=n,
        round=number_of_round,
        pixels=pixels,
        seconds=answer["seconds"],
        engine_seconds=answer["engine_seconds"],
        peak_bytes=answer["peak_rss_bytes"],
        before_bytes=answer["rss_before_bytes"] if answer["peak_is_of_this_run"] else None,
        cells=answer["cells"],
    )


def growth_of(points: Sequence[Point], series: Series) -> Growth:
    """Exponents and slopes of ``series``."""
    sizes = by_size(points, series)
    n = [size for size, _ in sizes]
    seconds = [statistics.median(p.seconds for p in group) for _, group in sizes]
    own = [_median(group, "own_bytes") for _, group in sizes]
    known = [(size, value, group[0].pixels) for (size, group), value in zip(sizes, own, strict=True) if value]
    growth = Growth(series, exponent(n, seconds), exponent([k[0] for k in known], [k[1] for k in known]))
    if series == "images":
        return growth
    rates = [value / size for size, value in zip(n, seconds, strict=True) if size >= LINEAR_FROM]
    slope = None
    if len(known) > 1:
        slope = float(np.polyfit([k[2] for k in known], [k[1] for k in known], 1)[0])
    within = max(rates) / min(rates) - 1 if len(rates) > 1 else None
    return Growth(series, growth.time_exponent, growth.memory_exponent, within, slope)


def exponent(n: Sequence[float], values: Sequence[float]) -> float | None:
    """``a`` of ``values = c n^a`` by least squares of the logarithms; None with fewer than two sizes."""
    if len(set(n)) < 2:
        return None
    return float(np.polyfit(np.log(n), np.log(values), 1)[0])


def by_size(points: Sequence[Point], series: Series) -> list[tuple[float, list[Point]]]:
    """Points of ``series`` by size, rising."""
    groups: dict[float, list[Point]] = {}
    for point in points:
        if point.series == series:
            groups.setdefault(point.n, []).append(point)
    return sorted(groups.items())


def held_bytes_per_pixel(facts: Mapping[str, Any]) -> dict[str, float]:
    """Bytes per pixel of an image: RGB, int32 labels, and probabilities at the model's scale, by their type."""
    model_pixels = facts["channels"] * facts["scale"] ** 2
    return {name: float(3 + 4 + size * model_pixels) for name, size in (("uint8", 1), ("float16", 2), ("float32", 4))}


def png(report: ScalingReport) -> bytes:
    """Plot time and memory over size, and over the number of images; dashed: in proportion to the largest."""
    panels: list[Panel] = []
    for series in SERIES:
        sizes = by_size(report.points, series)
        if not sizes:
            continue
        n = [size for size, _ in sizes]
        seconds = [statistics.median(p.seconds for p in group) for _, group in sizes]
        peak = [(_median(group, "peak_bytes") or 0) / 1e6 for _, group in sizes]
        panels += [
            Lines("Time", series, "seconds", {"seconds": (n, seconds)}, slope_one=True),
            Lines("Peak memory of the process", series, "MB", {"peak": (n, peak)}),
        ]
    return panels_png(panels, title=f"{report.engine['model']}, {report.engine['engine']}")


def _prepare(
    work: Path, series: Series, n: float, smear: images.Image, small: Sequence[Path], small_hw: tuple[int, int]
) -> tuple[Path, int]:
    """The file or folder to run, made if it does not exist yet, and its number of pixels (of the largest image)."""
    if series == "megapixels":
        hw = images.size_for(n)
        path = work / f"large-{n:g}.tif"
        if not path.exists():
            images.write_mirrored(path, smear, hw)
        return path, hw[0] * hw[1]
    folder = work / f"folder-{n:g}"
    if not folder.exists():
        images.link_copies(small, folder, int(n))
    return folder, small_hw[0] * small_hw[1]


def _median(group: Sequence[Point], name: str) -> float | None:
    values = [getattr(point, name) for point in group]
    return None if None in values else float(statistics.median(values))


def _per_pixel(group: Sequence[Point]) -> float | None:
    own = _median(group, "own_bytes")
    return None if own is None or group[0].series == "images" else own / group[0].pixels


def _size(hw: tuple[int, int]) -> str:
    return f"{hw[1]} x {hw[0]}"


def _growth_line(growth: Growth) -> str:
    parts = []
    if growth.time_exponent is not None:
        parts.append(f"time grows with exponent {growth.time_exponent:.3f}")
    if growth.linear_within is not None:
        parts.append(f"from {LINEAR_FROM:g} megapixels on in proportion within {growth.linear_within:.1%}")
    if growth.memory_exponent is not None:
        parts.append(f"memory of the run with exponent {growth.memory_exponent:.3f}")
    if growth.bytes_per_pixel is not None:
        parts.append(f"{growth.bytes_per_pixel:.2f} bytes more for each pixel more")
    return ("; ".join(parts) + ".").capitalize() if parts else ""


@click.command("scaling", context_settings=shared.SETTINGS)
@shared.model_option
@click.option(
    "--megapixels", default=Settings.megapixels, show_default=True, metavar="N,...", help="Sizes of one image."
)
@click.option("--images", default=Settings.images, show_default=True, metavar="N,...", help="Images in a folder.")
@click.option("--max-megapixels", type=float, help="Leave larger images out.")
@click.option("--max-images", type=int, help="Leave larger folders out.")
@click.option(
    "--small", type=float, default=Settings.small, show_default=True, help="Megapixels of each image of a folder."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=Settings.rounds, show_default=True, help="New processes for each size."
)
@shared.scale_options
@shared.engine_options
@shared.measuring_options
def scaling_command(**given: Any) -> None:
    """How time and memory grow with the size of an image, and with the number of images.

    Large images are sample smears, mirrored at their edges; the largest takes some 6 GB of disk and memory. Writes
    scaling.json, scaling.md and scaling.png to DIR. Exit code 8 if nothing could be measured.
    """
    settings = shared.settings_of(Settings, given)
    _, _, left_out = settings.sizes()
    bench = shared.Bench("scaling", given)
    progress = bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        points, engine, failed = measure_scaling(settings, Path(place), say=bench.say, progress=progress)
    if not points:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise BackendUnavailableError(f"nothing was measured: {reasons}")
    report = ScalingReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        engine=engine,
        held_bytes_per_pixel=held_bytes_per_pixel(engine),
        small_image_hw=images.size_for(settings.small),
        points=tuple(points),
        growth=tuple(growth_of(points, series) for series in SERIES),
        left_out=left_out | failed | settings.engine.not_run(bench.machine),
    )
    bench.publish(report, png(report))
