"""Saving work: time saved and cells lost by each setting of the runtime.

Three experiments. ``compare`` runs the same images with other settings (halo, scale, tiles of another size),
interleaved, and scores the cells found against true masks. ``halo_curve`` shows where the network stops needing more
context. ``empty_tiles`` counts tiles that could be skipped if empty background were known beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.figures import Bar, Bars, Lines, panels_png
from cellseg_benchmarks.harness.images import judged_pairs, smear_with_truth
from cellseg_benchmarks.harness.machine import Conditions
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import REPORT_VERSION, machine_lines, number, percent, table, times
from cellseg_benchmarks.harness.timer import Measured, Plan, Ratio, interleave, times_faster, turn_of
from cellseg_benchmarks.quality.halo_curve import HaloCurve, halo_curve
from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells import tiling
from cellseg_deploy.cells.metrics import pool, score_image
from cellseg_deploy.cli import console
from cellseg_deploy.errors import CellsegError, UsageError
from cellseg_deploy.evaluate.specks import speck_px
from cellseg_deploy.images.mask_foreground import MaskForeground
from cellseg_deploy.models import default_model_path
from cellseg_deploy.segmenter import Segmenter

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]

USUAL = "as the model says"
HALOS = (0, 8, 16, 24, 32, 48)
SCALES = (0.5, 0.7, 0.85, 1.0, 1.2)
"""Factors relative to the model's own scale."""
REPORTED = ("dice", "f1", "f1_apart", "count_mape", "count_mape_apart", "n_true", "n_predicted")


@dataclass(frozen=True)
class Setting:
    """One way to run a network. ``halo``, ``tile_size`` in model px, ``scale`` in model px per image px."""

    name: str
    halo: int
    scale: float
    tile_size: int


@dataclass(frozen=True)
class Outcome:
    """``tiles``: of all images. ``seconds``: median of a pass over them. ``faster``: how many times as fast as the
    usual setting, with the bootstrap interval (None for a single round)."""

    setting: Setting
    tiles: int
    seconds: float
    faster: tuple[float, float | None, float | None]
    figures: dict[str, float]

    def flat(self) -> dict[str, Any]:
        """Return the outcome as JSON types."""
        median, low, high = self.faster
        return {
            "setting": self.setting.name,
            "halo_px": self.setting.halo,
            "scale": self.setting.scale,
            "tile_size_px": self.setting.tile_size,
            "tiles": self.tiles,
            "seconds": self.seconds,
            "times_faster": {"median": median, "low": low, "high": high},
            **self.figures,
        }


def settings_for(backend: Backend, halos: Sequence[int] = HALOS, scales: Sequence[float] = SCALES) -> list[Setting]:
    """The usual setting, then every other halo at the usual scale and every other scale at the usual halo."""
    usual = usual_setting(backend, USUAL)
    fits = [halo for halo in halos if halo != usual.halo and 2 * halo < usual.tile_size]
    found = [usual, *(replace(usual, name=f"halo {halo}", halo=halo) for halo in fits)]
    return [*found, *(replace(usual, name=f"scale x {by:g}", scale=usual.scale * by) for by in scales if by != 1)]


def usual_setting(backend: Backend, name: str) -> Setting:
    """The model's own setting."""
    return Setting(name, backend.spec.halo, backend.spec.image_scale, backend.spec.tile_size)


def compare(
    backend: Backend,
    pairs: Sequence[tuple[Image, Labels]],
    settings: Sequence[Setting],
    plan: Plan,
    *,
    others: Sequence[tuple[Setting, Backend]] = (),
    batch_size: int = 8,
    min_area_px: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> tuple[list[Outcome], Measured]:
    """Time and score each of ``settings``; the others are compared with the first.

    ``pairs``: images uint8 RGB (h, w, 3) with true labels (h, w). A turn of the timer is one pass over all of them,
    from decoded pixels to labels and table; all are scored before the first turn. ``others``: settings of separate
    models, such as the same network for other tiles. ``min_area_px``: limit for specks, None for the limit that
    ``cellseg-evaluate`` derives from the true labels.
    """
    if not pairs:
        raise UsageError("there must be at least one image to compare settings on")
    if min_area_px is None:
        min_area_px = speck_px((labels for _, labels in pairs), backend.spec)
    ways = [*((setting, backend) for setting in settings), *others]
    names = Counter(setting.name for setting, _ in ways)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"two settings are called {', '.join(twice)}; give files of different names")
    segmenters = {s.name: Segmenter(of, halo=s.halo, scale=s.scale, batch_size=batch_size) for s, of in ways}

    def passing(segmenter: Segmenter) -> Callable[[], None]:
        def all_images() -> None:
            for image, _ in pairs:
                segmenter(image)

        return all_images

    progress = progress or Progress()
    figures = {}
    for setting, _ in ways:
        segmenter = segmenters[setting.name]
        try:
            scores = [score_image(labels, segmenter(image).labels, min_area_px=min_area_px) for image, labels in pairs]
        except (CellsegError, MemoryError) as error:
            raise UsageError(f"{setting.name}: {error or 'out of memory'}") from error
        pooled = pool(scores)
        figures[setting.name] = {name: float(pooled[name]) for name in REPORTED}
        progress.keep("figures", figures)
        say(f"{setting.name}: F1 {figures[setting.name]['f1']:.4f}")
    turns = {name: turn_of(passing(s)) for name, s in segmenters.items()}
    measured = interleave(turns, plan, say=say, progress=progress)
    if progress.stopped and not measured.times:
        raise progress.stopped
    outcomes = []
    for setting, _ in ways:
        if setting.name in measured.failed:
            raise UsageError(f"{setting.name}: {measured.failed[setting.name]}")
        taken = measured.times[setting.name]
        faster = times_faster(measured.times[settings[0].name], taken)
        outcomes.append(
            Outcome(
                setting,
                sum(_tiles(image, setting) for image, _ in pairs),
                taken.median,
                (faster.median, faster.low, faster.high),
                figures[setting.name],
            )
        )
        say(f"{setting.name}: {faster.median:.2f} times as fast")
    return outcomes, measured


def _tiles(image_hwc: Image, setting: Setting) -> int:
    height, width = (max(1, round(side * setting.scale)) for side in image_hwc.shape[:2])
    return len(tiling.plan((height, width), setting.tile_size, setting.halo))


def empty_tiles(backend: Backend, images: Iterable[Image], *, batch_size: int = 8) -> tuple[int, int]:
    """Count tiles in whose own part the network finds no cell pixel (foreground below 0.5), and all tiles."""
    segmenter = Segmenter(backend, batch_size=batch_size)
    foreground = list(backend.spec.channels).index("foreground")
    empty = total = 0
    for image in images:
        seen_hw = segmenter.probabilities(image)[foreground] >= 0.5
        tiles = tiling.plan((seen_hw.shape[0], seen_hw.shape[1]), backend.spec.tile_size, segmenter.halo).tiles
        empty += sum(1 for tile in tiles if not seen_hw[tile.write].any())
        total += len(tiles)
    return empty, total


@dataclass(frozen=True)
class SavingsReport:
    """All experiments. ``curve``: of ``halo_curve``, one row per distance; ``halo_needed_px``: its ``needed``.
    ``empty_tiles``: result of the function of that name."""

    conditions: Conditions
    threads: int | None
    model: str
    engine: str
    n_images: int
    halo_needed_px: int
    empty_tiles: tuple[int, int]
    curve: dict[str, tuple[float | None, ...]]
    outcomes: tuple[dict[str, Any], ...]
    raw_seconds: dict[str, tuple[float, ...]]
    benchmark: str = "savings"
    report_version: int = REPORT_VERSION

    def to_markdown(self) -> str:
        """Return the table of settings, then the conclusions from the curve."""
        lines = ["# Less work: what it saves and what it costs", "", *machine_lines(self.conditions, self.threads)]
        lines += [
            f"Model {self.model}, {self.engine}; {self.n_images} images, from decoded pixels to labels and table, all "
            "settings interleaved. Times are of one pass over all images; *times as fast* as the first row.",
            "",
            *table(_HEAD, [_row(outcome) for outcome in self.outcomes]),
            "",
            f"**Context.** From {self.halo_needed_px} px inside a cut edge on, pixels change sides of 0.5 no more than "
            "twice as often as in the tile's inner half.",
            "",
            f"**Empty background.** {self.empty_tiles[0]} of {self.empty_tiles[1]} tiles hold no pixel of a cell: more "
            "than these cannot be skipped.",
            "",
        ]
        shown = [d for d in (0, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96) if d < len(self.curve["mean"])]
        rows = [
            [str(d), *(number(self.curve[name][d]) for name in ("mean", "p99")), percent(self.curve["flipped"][d])]
            for d in shown
        ]
        head = ("px from the cut edge", "mean difference", "99th percentile", "pixels that change sides")
        return "\n".join([*lines, *table(head, rows, words=0), ""])


def report_of(
    outcomes: Sequence[Outcome],
    measured: Measured,
    curve: HaloCurve,
    *,
    empty: tuple[int, int],
    conditions: Conditions,
    threads: int | None,
    backend: Backend,
    n_images: int,
) -> SavingsReport:
    """Return the whole report in the form that is written."""
    return SavingsReport(
        conditions=conditions,
        threads=threads,
        model=backend.spec.name,
        engine=f"{backend.name} {backend.precision} on {backend.device}",
        n_images=n_images,
        halo_needed_px=curve.needed(),
        empty_tiles=empty,
        curve={
            name: tuple(None if np.isnan(v) else float(v) for v in getattr(curve, name))
            for name in ("mean", "p99", "flipped")
        },
        outcomes=tuple(outcome.flat() for outcome in outcomes),
        raw_seconds={name: times.seconds for name, times in measured.times.items()},
    )


def png(report: SavingsReport) -> bytes:
    """Plot the context curve, and F1 against time."""

    def line(name: str) -> tuple[list[float], list[float]]:
        known = [(float(d), value) for d, value in enumerate(report.curve[name]) if value is not None]
        return [d for d, _ in known], [value for _, value in known]

    context = Lines(
        "what a pixel loses near a cut edge",
        "px from the cut edge of the tile",
        "difference to the middle of a tile",
        {"mean difference": line("mean"), "pixels that change sides of 0.5": line("flipped")},
        logarithmic=False,
    )
    speed = Bars(
        "time of a pass over all images",
        "s",
        tuple(
            Bar(
                o["setting"],
                o["seconds"],
                note=f"F1 {o['f1']:.3f}, {o['times_faster']['median']:.2f}x",
                group=o["setting"].split()[0],
            )
            for o in report.outcomes
        ),
    )
    return panels_png([context, speed], title=f"{report.model}: less work")


_HEAD = (
    *("setting", "tile px", "halo px", "scale", "tiles", "s"),
    *("times as fast", "Dice", "F1", "F1 apart", "count error apart"),
)


def _row(outcome: dict[str, Any]) -> list[str]:
    return [
        outcome["setting"],
        str(outcome["tile_size_px"]),
        str(outcome["halo_px"]),
        number(outcome["scale"]),
        str(outcome["tiles"]),
        number(outcome["seconds"]),
        times(Ratio(**outcome["times_faster"], rounds=0)),
        *(f"{outcome[name]:.4f}" for name in ("dice", "f1", "f1_apart")),
        f"{outcome['count_mape_apart']:.1%}",
    ]


@click.command("savings", context_settings=shared.SETTINGS)
@shared.model_option
@click.option(
    "--also",
    multiple=True,
    metavar="MODEL",
    type=shared.PATH,
    help="Another model file, as the same network for tiles of another size; may be given more than once.",
)
@click.option("--images", metavar="DIR", type=shared.FOLDER, help="Images.  [default: six sample smears]")
@click.option("--masks", metavar="DIR", type=shared.FOLDER, help="Masks of these images.")
@console.mask_options
@click.option("--most", type=click.IntRange(1), default=10, show_default=True, help="Images, held in memory.")
@shared.engine_options
@shared.rounds_options(3)
@shared.measuring_options
def savings_command(
    model: Path | None,
    also: tuple[Path, ...],
    images: Path | None,
    masks: Path | None,
    mask_foreground: MaskForeground,
    most: int,
    **given: Any,
) -> None:
    """What less context around a tile, a smaller scale and other tiles save, and what they cost in cells found.

    Writes savings.json, savings.md and savings.png to DIR. The curve of context takes some fifty times the tiles of
    a usual run.
    """
    shared.check_pair(images, masks)
    plan = shared.settings_of(Plan, given)
    asked = shared.settings_of(shared.Engine, given)
    batch_size = asked.batch_size
    bench = shared.Bench("savings", given)
    engine = EngineOptions(asked.backend, asked.device, asked.precision, bench.threads, asked.streams)
    with ExitStack() as stack:
        opened, *others = (
            stack.enter_context(open_backend(path, engine)) for path in (model or default_model_path(), *also)
        )
        named = [(usual_setting(other, f"model {path.stem}"), other) for path, other in zip(also, others, strict=True)]
        progress = bench.begin()
        pairs = list(_pairs(images, masks, most, mask_foreground))
        curve = halo_curve(
            opened,
            (image for image, _ in pairs),
            scale=opened.spec.image_scale,
            batch_size=batch_size,
            say=bench.say,
        )
        empty = empty_tiles(opened, (image for image, _ in pairs), batch_size=batch_size)
        outcomes, measured = compare(
            opened,
            pairs,
            settings_for(opened),
            plan,
            others=named,
            batch_size=batch_size,
            say=bench.say,
            progress=progress,
        )
        report = report_of(
            outcomes,
            measured,
            curve,
            empty=empty,
            conditions=bench.conditions(),
            threads=bench.threads,
            backend=opened,
            n_images=len(pairs),
        )
    bench.publish(report, png(report))


def _pairs(images: Path | None, masks: Path | None, most: int, foreground: MaskForeground) -> Iterator[tuple[Any, Any]]:
    if images is not None and masks is not None:
        yield from judged_pairs(images, masks, most, foreground)
        return
    for index in range(min(most, 6)):
        smear = smear_with_truth(index=index, seed=0)
        yield smear.image_hwc, smear.labels_hw
