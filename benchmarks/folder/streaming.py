"""One large image streamed, as ``cellseg-slide`` does, against the same image whole, as ``cellseg-infer --field full``.

Both run in this process on one thread, in turns, from the file to label image, tables and picture. The network is a
stub that takes no time, so that everything else shows, and the model itself. Labels and cells.csv must be the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.folder.processes import StubEngine, cpu_seconds
from cellseg_benchmarks.harness import images
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, table, times
from cellseg_benchmarks.harness.timer import Plan, Turn, interleave, ratio, turn_of
from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.errors import DataError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.outputs.formats import DEFAULT, parse_names
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.slides import files
from cellseg_deploy.slides import run as slides
from cellseg_deploy.slides.open import open_image
from cellseg_deploy.slides.region import region_of
from cellseg_deploy.threads import ThreadPlan, single_threaded_libraries

Run = Callable[[Segmenter, Path, Path, int], None]
"""Counts an image into a new folder; the last argument is the memory for blocks, in bytes."""

NETWORKS = ("stub", "model")
WAYS = ("whole", "streamed")
_WARM_MEGAPIXELS = 0.3
_WARM_UP = 2
"""Calls of each entry before the rounds."""


@dataclass(frozen=True)
class Way:
    """One entry: ``seconds`` and ``cpu_seconds`` of each round."""

    network: str
    way: str
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]


@dataclass(frozen=True)
class StreamingReport:
    """``cells``: found, by network; the same both ways. ``memory``: given to the streamed run, in bytes. ``save``:
    kinds of files of the whole image."""

    conditions: Conditions
    megapixels: float
    memory: int
    save: tuple[str, ...]
    cells: Mapping[str, int]
    ways: tuple[Way, ...]
    benchmark: str = "streaming"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """One table, streamed against whole within each round."""
        rows = []
        for network in self.cells:
            whole, streamed = (next(way for way in self.ways if (way.network, way.way) == (network, k)) for k in WAYS)
            rows.append(
                [
                    network,
                    number(self.cells[network], 6),
                    number(float(np.median(whole.cpu_seconds))),
                    number(float(np.median(streamed.cpu_seconds))),
                    times(ratio(streamed.cpu_seconds, whole.cpu_seconds)),
                    times(ratio(streamed.seconds, whole.seconds)),
                ]
            )
        head = ("network", "cells", "whole, CPU s", "streamed, CPU s", "streamed / whole, CPU", "of wall time")
        lines = [
            "# One image streamed and whole",
            "",
            *machine_lines(self.conditions, 1),
            f"{self.megapixels:.3g} megapixels, {self.memory / 1e9:g} GB for blocks; labels and cells.csv are the "
            f"same. Files of the whole image: {', '.join(self.save)}. Ratios within a round: median, 95 % interval.",
            "",
            *table(head, rows, words=1),
        ]
        return "\n".join(lines) + "\n"


def measure(
    segmenters: Mapping[str, Segmenter],
    image: Path,
    small: Path,
    work: Path,
    plan: Plan,
    *,
    memory: int,
    save: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> tuple[list[Way], dict[str, int]]:
    """Both ways of each of ``segmenters`` on the file ``image``, and the cells found. ``small``: a file for warm-up.
    ``save``: kinds of files of the whole image.

    Raises ``DataError`` if labels or tables differ.
    """
    cpu: dict[str, list[float]] = {}
    entries: dict[str, Turn] = {}
    for network, segmenter in segmenters.items():
        for way in WAYS:
            run: Run = partial(_whole, save=save) if way == "whole" else _streamed
            name = f"{network} {way}"
            run(segmenter, small, work / f"small {name}", memory)
            entries[name] = _turn(run, segmenter, image, work / name, memory, cpu.setdefault(name, []))
    measured = interleave(entries, plan, say=say, progress=progress)
    if measured.failed:
        raise DataError("; ".join(f"{name}: {why}" for name, why in measured.failed.items()))
    cells = {
        network: _checked(work / f"{network} whole", work / f"{network} streamed", image) for network in segmenters
    }
    ways = []
    for name, taken in measured.times.items():
        network, _, way = name.partition(" ")
        n = len(taken.seconds)
        ways.append(Way(network, way, taken.seconds, tuple(cpu[name][_WARM_UP : _WARM_UP + n])))
    return ways, cells


def _turn(
    run: Run,
    segmenter: Segmenter,
    image: Path,
    out: Path,
    memory: int,
    cpu: list[float],
) -> Turn:
    timed = turn_of(lambda: run(segmenter, image, out, memory))

    def turn(calls: int) -> float:
        before = cpu_seconds()
        seconds = timed(calls)
        cpu.append((cpu_seconds() - before) / calls)
        return seconds

    return turn


def _whole(segmenter: Segmenter, image: Path, out: Path, _: int, *, save: Sequence[str]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    options = RunOptions(tuple(save), report=False, field_of_view="full", reading=_reading())
    summary = run_folder(segmenter, find_images([image]), out, options=options, threads=ThreadPlan(1, 1))
    if summary.failed:
        raise DataError(f"{image.name} could not be counted as a whole image")


def _streamed(segmenter: Segmenter, image: Path, out: Path, memory: int) -> None:
    reader = open_image(image, _reading())
    try:
        with single_threaded_libraries():
            slides.run_slide(segmenter, region_of(reader), out, memory=memory, overwrite=True)
    finally:
        reader.close()


def _reading() -> ReadOptions:
    return ReadOptions(images.max_pixels_for(1_000_000_000))


def _checked(whole: Path, streamed: Path, image: Path) -> int:
    """Number of cells. Raises ``DataError`` unless both folders hold the same."""
    import tifffile

    labels = tifffile.imread(streamed / files.LABELS, maxworkers=1)
    if not np.array_equal(tifffile.imread(whole / "labels" / f"{image.name}.tif", maxworkers=1), labels):
        raise DataError("the labels of the streamed image are not those of the whole one")
    if (whole / "cells.csv").read_bytes() != (streamed / slides.CELLS).read_bytes():
        raise DataError("cells.csv of the streamed image is not that of the whole one")
    return int(labels.max(initial=0))


@click.command("streaming", context_settings=shared.SETTINGS)
@click.argument("photographs", nargs=-1, type=shared.PATH)
@shared.model_option
@click.option("--megapixels", type=float, default=64.0, show_default=True, help="Size of the image.")
@click.option("--memory", type=float, default=4.0, show_default=True, metavar="GB", help="For blocks of the image.")
@click.option("--networks", default=",".join(NETWORKS), show_default=True, help="stub, model, or both.")
@click.option("--save", default=",".join(DEFAULT), show_default=True, help="Of the whole image; see cellseg-infer.")
@shared.rounds_options(5, min_seconds=0)
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="New folder for the report.")
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def streaming_command(
    photographs: Sequence[Path],
    model: Path | None,
    megapixels: float,
    memory: float,
    networks: str,
    save: str,
    rounds: int,
    min_seconds: float,
    settle_seconds: float,
    budget_seconds: float | None,
    **given: Any,
) -> None:
    """One large image streamed block by block against the same image whole, on one thread.

    The image is a mosaic of PHOTOGRAPHS (files or folders), without them a mirrored sample smear. Writes streaming.json
    and streaming.md to DIR. Compare CPU times where other work runs.
    """
    images.check_size(megapixels)
    asked = shared.words(networks) or []
    if not asked or set(asked) - set(NETWORKS):
        raise click.UsageError(f"--networks must be some of {', '.join(NETWORKS)}, got {networks!r}")
    kinds = parse_names(save)
    if "labels" not in kinds:
        raise click.UsageError(f"--save must contain labels, which are compared, got {save!r}")
    bench = shared.Bench("streaming", given)
    progress = bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        work, hw = Path(place), images.size_for(megapixels)
        large, small = work / "large.tif", work / "small.tif"
        pictures = list(images.given_images(photographs, 24)) if photographs else []
        smear = next(images.smears(1))
        images.write_mirrored(small, smear, images.size_for(_WARM_MEGAPIXELS))
        if pictures:
            images.write_mosaic(large, pictures, hw)
        else:
            images.write_mirrored(large, smear, hw)
        with Segmenter.load(model, engine=EngineOptions(threads=1), scale=None) as opened:
            stub = Segmenter(StubEngine(opened.backend.spec, 0.0))
            segmenters = {name: stub if name == "stub" else opened for name in asked}
            plan = Plan(rounds, min(3, rounds), min_seconds, settle_seconds, budget_seconds)
            bytes_ = round(memory * 1e9)
            ways, cells = measure(
                *(segmenters, large, small, work, plan), memory=bytes_, save=kinds, say=bench.say, progress=progress
            )
    report = StreamingReport(bench.conditions(), hw[0] * hw[1] / 1e6, bytes_, kinds, cells, tuple(ways))
    bench.publish(report, None)
