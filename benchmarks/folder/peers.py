"""Time other tools that a user might choose on the same images, in the same rounds, on this machine.

Our models are timed from files to written label images, overlays and tables, over a folder; the others in memory, per
image, at the cell size they work at. A tool that is not installed, or does not run, is a row with the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.figures import Bar, Bars, panels_png
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import NOT_RUN, REPORT_VERSION, machine_lines, table, times
from cellseg_benchmarks.harness.timer import Plan, Ratio, Times, Turn, interleave, ratio
from cellseg_benchmarks.harness.worker import Worker, WorkerError
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError
from cellseg_deploy.models import default_model_path

Say = Callable[[str], None]
PEERS = ("cellpose", "stardist", "instanseg")
_SEPARATOR = ": "


@dataclass(frozen=True)
class Row:
    """One way to process the images. ``seconds_per_image``: median. ``slower``: for each of our models (by name), how
    many times as long as that model takes."""

    name: str
    what: str
    ours: bool
    status: str
    details: str = ""
    reason: str = ""
    images_per_call: int = 0
    times: Times | None = None
    seconds_per_image: float | None = None
    slower: dict[str, Ratio] | None = None


@dataclass(frozen=True)
class PeersReport:
    """All rows. ``image_hw``: of the images. ``diameter_px``: of cells in them. ``not_run``: unavailable devices,
    with the reason."""

    conditions: Conditions
    threads: int | None
    plan: Plan
    image_hw: tuple[int, int]
    images_from: str
    diameter_px: float
    rows: tuple[Row, ...]
    not_run: dict[str, str] = field(default_factory=dict)
    benchmark: str = "peers"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Ratios; seconds are in the JSON."""
        ours = [row.name for row in self.rows if row.ours and row.times]
        height, width = self.image_hw
        lines = ["# Beside other tools", "", *machine_lines(self.conditions, self.threads)]
        lines += [
            f"Images of {width} x {height} px ({self.images_from}), cells of {self.diameter_px:.0f} px. Ours: a "
            "folder, from files to label images, overlays and tables. Others: in memory, without reading or writing. "
            f"How many times as long as ours an image takes: medians of up to {self.plan.rounds} paired rounds, with "
            "their 95 % bootstrap interval.",
            "",
        ]
        head = ("", "what is timed", "details", *(f"x {name}" for name in ours))
        rows = [
            [row.name, row.what, row.details, *(times((row.slower or {}).get(name)) for name in ours)]
            if row.times
            else [row.name, row.what, NOT_RUN, *[""] * len(ours)]
            for row in self.rows
        ]
        lines += [*table(head, rows, words=3), ""]
        lines += [f"- {row.name}: {row.reason}" for row in self.rows if row.reason]
        lines += [f"- {device}: {reason}" for device, reason in self.not_run.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark. ``models``: ours. ``peers``: names of ``PEERS``. ``cell_diameter``: of cells in px.
    ``megapixels``: of a sample smear. ``folder_images``: images in our folder run, repeated as needed."""

    models: tuple[Path, ...] = ()
    peers: str = ",".join(PEERS)
    cell_diameter: float | None = None
    megapixels: float = 1.92
    folder_images: int = 8
    cellpose_weights: Path | None = None
    engine: shared.Engine = field(default_factory=shared.Engine)
    threads: int | None = None

    def checked(self) -> Settings:
        """Return these settings, by default with the shipped model. Raises ``UsageError``, ``ModelError``."""
        names = shared.words(self.peers) or []
        unknown = [name for name in names if name not in PEERS]
        if unknown:
            raise UsageError(f"no peer named {', '.join(unknown)}; there are {', '.join(PEERS)}")
        models = self.models or (default_model_path(),)
        for path in (*models, *([self.cellpose_weights] if self.cellpose_weights else [])):
            if not path.is_file():
                raise ModelError(f"{path}: no such file")
        if len({path.stem for path in models}) < len(models):
            raise UsageError(f"two models have the same name: {', '.join(path.name for path in models)}")
        image_set.check_size(self.megapixels)
        return replace(self, models=models)


def measure_peers(
    images: Sequence[npt.NDArray[np.uint8]],
    labels: npt.NDArray[np.int32] | None,
    settings: Settings,
    work: Path,
    plan: Plan,
    *,
    start: Callable[..., Worker] = Worker,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of our models and of the peers on ``images``, RGB uint8 (h, w, 3), whose cells have the given diameter.

    ``labels``: true cells of the first image, for Cellpose's steps after its network. ``work``: a folder to write to,
    which the caller deletes.
    """
    threads, diameter_px = settings.threads, settings.cell_diameter
    weights = settings.cellpose_weights
    sources = [work / f"source-{k}.png" for k in range(len(images))]
    arrays = [work / f"image-{k}.npy" for k in range(len(images))]
    for source, array, image in zip(sources, arrays, images, strict=True):
        source.write_bytes(image_set.encoded(image, "png"))
        np.save(array, image)
    folder = work / "folder"
    image_set.link_copies(sources, folder, settings.folder_images)
    truth = None if labels is None else work / "labels.npy"
    if truth is not None and labels is not None:
        np.save(truth, labels)

    wanted: list[tuple[str, str, dict[str, Any]]] = [
        (
            model.stem,
            "folder",
            {
                "settings": {**settings.engine.arguments(), "path": str(model), "cell_diameter_px": diameter_px},
                "threads": threads,
                "work": str(work),
                "timed": str(folder),
            },
        )
        for model in settings.models
    ]
    wanted += [
        (
            name,
            name,
            {
                "images": [str(path) for path in arrays],
                "labels": str(truth) if truth and name == "cellpose" else None,
                "diameter": diameter_px,
                "device": settings.engine.device or "cpu",
                "threads": threads,
                "weights": str(weights) if weights and name == "cellpose" else None,
            },
        )
        for name in shared.words(settings.peers) or []
    ]
    with ExitStack() as stack:
        workers: dict[str, tuple[str, Worker]] = {}
        rows: list[Row] = []
        for name, kind, arguments in wanted:
            say(f"opening {name} ...")
            try:
                workers[name] = (kind, stack.enter_context(start(kind, arguments, threads=threads)))
            except WorkerError as error:
                rows.append(Row(name, "", kind == "folder", "not run", reason=str(error)))
                say(f"{name}: not run: {error}")
        entries: dict[str, Turn] = {
            f"{name}{_SEPARATOR}{call}": worker.turn(call)
            for name, (_, worker) in workers.items()
            for call in worker.names
        }
        measured = interleave(entries, plan, say=say, progress=progress)
        for name, (kind, worker) in workers.items():
            for call in worker.names:
                entry = f"{name}{_SEPARATOR}{call}"
                n = settings.folder_images if kind == "folder" else worker.facts["images"]
                rows.append(_row(name, call, kind == "folder", worker.facts, n, entry, measured.times, measured.failed))
    compared = [_compared(row, rows) for row in rows]
    return sorted(compared, key=lambda row: (not row.ours, [name for name, _, _ in wanted].index(row.name)))


def _row(
    name: str,
    call: str,
    ours: bool,
    facts: Mapping[str, Any],
    n: int,
    entry: str,
    found: Mapping[str, Times],
    failed: Mapping[str, str],
) -> Row:
    what = f"folder of {n}, files to results" if ours else call
    details = facts["engine"] if ours else f"{facts['library']}: {facts['details']}"
    if entry not in found:
        return Row(name, what, ours, "not run", details, failed[entry], n)
    seconds = found[entry].median / n
    return Row(name, what, ours, "measured", details, "", n, found[entry], seconds)


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """``row`` compared with each of our models."""
    if row.times is None:
        return row
    slower = {
        other.name: ratio(row.times.seconds, other.times.seconds).scaled(other.images_per_call / row.images_per_call)
        for other in rows
        if other.ours and other.times is not None
    }
    return replace(row, slower=slower)


def png(report: PeersReport) -> bytes:
    """Bar chart: time relative to our first model, one bar per row."""
    first = next((row.name for row in report.rows if row.ours and row.times), "")
    bars = []
    for row in report.rows:
        found = (row.slower or {}).get(first)
        label = row.name if row.ours else f"{row.name}{_SEPARATOR}{row.what}"
        note = NOT_RUN if found is None else f"{found.median:.3g}x"
        bars.append(
            Bar(label, None if found is None else found.median, note=note, group="ours" if row.ours else "others")
        )
    panel = Bars(f"Time of an image, {first} = 1", "times as long", tuple(bars), logarithmic=True)
    return panels_png([panel], title=report.conditions.machine.processor)


@click.command("peers", context_settings=shared.SETTINGS)
@click.argument("paths", metavar="[IMAGE]...", nargs=-1, type=shared.PATH)
@click.option(
    "--model", "models", multiple=True, type=shared.PATH, help="Our model file; can be repeated.  [default: shipped]"
)
@click.option(
    "--peers", default=Settings.peers, metavar="NAME,...", help="Some of cellpose, stardist, instanseg.  [default: all]"
)
@click.option(
    "--cell-diameter",
    type=float,
    metavar="PX",
    help="Diameter of cells in the images, from which every tool gets its scale.  [default: that of sample smears]",
)
@click.option(
    "--megapixels", type=float, default=Settings.megapixels, show_default=True, help="Size of the sample smear."
)
@click.option(
    "--folder-images",
    type=click.IntRange(1),
    default=Settings.folder_images,
    show_default=True,
    help="Images in our folder run.",
)
@click.option("--cellpose-weights", type=shared.PATH, help="Cellpose 4 model file.  [default: random weights]")
@shared.engine_options
@shared.rounds_options(5, min_seconds=0.0)
@shared.measuring_options
def peers_command(paths: tuple[Path, ...], **given: Any) -> None:
    """The same images through Cellpose 4, StarDist and InstanSeg: how many times as long they take.

    Tools that are not installed are rows that say so: pip install cellpose, stardist with tensorflow-cpu,
    instanseg-torch. All images must have one size. Writes peers.json, peers.md and peers.png to DIR. Exit code 8 if
    none of ours could be timed.
    """
    settings = shared.settings_of(Settings, given)
    if paths and settings.cell_diameter is None:
        raise click.UsageError("--cell-diameter must be given with images of your own: every tool needs its scale")
    settings = settings.checked()
    plan = shared.settings_of(Plan, given)
    bench = shared.Bench("peers", given)
    labels = None
    if paths:
        images = list(image_set.given_images(paths))
    else:
        smear = image_set.smear_with_truth(image_set.size_for(settings.megapixels))
        images, labels = [smear.image_hwc], smear.labels_hw
        settings = replace(settings, cell_diameter=image_set.DIAMETER_PX)
    if len({image.shape for image in images}) > 1:
        raise UsageError("the images have different sizes; give images of one size, or one image")
    progress = bench.begin()
    with tempfile.TemporaryDirectory(dir=bench.output, prefix="work-") as place:
        rows = measure_peers(images, labels, settings, Path(place), plan, say=bench.say, progress=progress)
    assert settings.cell_diameter is not None
    report = PeersReport(
        conditions=bench.conditions(),
        threads=bench.threads,
        plan=plan,
        image_hw=images[0].shape[:2],
        images_from="given images" if paths else "a sample smear",
        diameter_px=settings.cell_diameter,
        rows=tuple(rows),
        not_run=settings.engine.not_run(bench.machine),
    )
    bench.publish(report, png(report))
    if not any(row.ours and row.times for row in rows):
        raise BackendUnavailableError("none of our models could be timed; the report says why")
