"""The study: networks that differ in one thing, trained on the same images for the same time, several seeds each.

    each run and seed:  train -> predict the validation images -> sweep, cross-fitted points -> results/RUN-SEED.json
    all results:        study.md, sweep.png

Validation images do not influence any network: nothing is selected or calibrated in training, the last epoch's network
is used as it is. Operating points are cross-fitted in two folds: those for one half of the validation images are chosen
on the other half, and only the pooled figures of images not used in the choice are reported. The sweep chooses
nothing, so it covers all of them.

Each finished run is one small JSON file and is not trained again; a stopped run is resumed from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import msgspec

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_benchmarks.quality.study_report import METRICS, SWEPT_METRICS, write_report
from cellseg_deploy.cli import console
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.evaluate.calibration import Labelling, Scorer, cross_fit, deal, figures, intervals
from cellseg_deploy.evaluate.sweep import Point, method_name, sweep
from cellseg_deploy.files.atomic import make_folder
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.models.spec import TASKS, InstanceParams, Variant, default_operating_points

if TYPE_CHECKING:
    from cellseg_train.checkpoint import RunInputs, RunRecord
    from cellseg_train.config import TrainConfig
    from cellseg_train.data import Split
    from cellseg_train.validate import Prediction

FOLDS = 2
RESULT_VERSION = 1


class _Point(msgspec.Struct):
    figures: dict[str, float | None]


class _SweepPoint(_Point):
    method: str
    parameter: str
    threshold: float


class _Seconds(msgspec.Struct):
    train: float
    measure: float


class _Result(msgspec.Struct):
    """Fields that the report needs from a result file, which may hold more."""

    version: int
    run: str
    seed: int
    settings: dict[str, Any]
    split_sha256: str
    n_train_images: int
    n_val_images: int
    points: Annotated[dict[str, dict[str, _Point]], msgspec.Meta(min_length=1)]
    sweep: Annotated[list[_SweepPoint], msgspec.Meta(min_length=1)]
    seconds: _Seconds


@dataclass(frozen=True)
class Arm:
    """One kind of network: its changes to the settings shared by all.

    ``loss``: fields of ``LossConfig`` with non-default values.
    """

    name: str
    variant: Variant
    says: str
    loss: dict[str, float] = field(default_factory=dict)

    def config(self, base: TrainConfig, seed: int) -> TrainConfig:
        """Settings of this arm with ``seed``; everything else is ``base``."""
        return replace(
            base,
            model=replace(base.model, variant=self.variant),
            loss=replace(base.loss, **self.loss),
            seed=seed,
            name=f"{self.name}-{seed}",
            validate_every=base.optim.epochs,
            calibrate=False,
        )


ARMS: tuple[Arm, ...] = (
    Arm("plain", "plain", "foreground only"),
    Arm("boundary", "boundary", "foreground and boundary"),
    Arm("distance", "distance", "foreground and distance to the edge"),
    Arm("boundary-surface", "boundary", "boundary with the surface loss", {"surface_weight": 1.0}),
    Arm("boundary-no-gaps", "boundary", "boundary without weights on thin gaps", {"gap_weight": 0.0}),
    Arm("plain-no-gaps", "plain", "foreground only, without weights on thin gaps", {"gap_weight": 0.0}),
)
DEFAULT_ARMS = ("plain", "boundary", "distance", "boundary-surface", "boundary-no-gaps")


def arms_named(names: Sequence[str]) -> list[Arm]:
    """The arms with these names, in this order. Raises ``UsageError`` for an unknown or repeated one."""
    known = {arm.name: arm for arm in ARMS}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise UsageError(f"runs {', '.join(names) or '(none)'}: expected some of {', '.join(known)}, each once")
    return [known[name] for name in names]


def run_study(
    out: Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    base: TrainConfig,
    inputs: RunInputs,
    *,
    say: Callable[[str], None],
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Train, measure and report whatever is missing in ``out``; returns all results in the order of arms and seeds.

    Seeds go first, so that a stopped study has every arm equally often. Raises what a training raises, and
    ``UsageError`` if ``out`` holds results of other settings or images.
    """
    from cellseg_train import run as start

    make_folder(out)
    with exclusive(out):
        split = start.make_split(inputs, base)
        if len(split.val) < FOLDS:
            raise UsageError(
                f"got {len(split.val)} validation image; {FOLDS} are needed, to choose on one and report on the other"
            )
        results: dict[tuple[str, int], dict[str, Any]] = {}
        planned = [(arm, seed) for seed in seeds for arm in arms]
        order = {arm.name: place for place, arm in enumerate(arms)}
        for number, (arm, seed) in enumerate(planned, start=1):
            say(f"[{number}/{len(planned)}] {arm.name}, seed {seed}")
            results[arm.name, seed] = _one(out, arm, arm.config(base, seed), inputs, split, say=say, quiet=quiet)
            done = [results[key] for key in sorted(results, key=lambda key: (order[key[0]], key[1]))]
            # After each run, so that a stopped study has a report of its results.
            known = [(a.name, a.says) for a in arms if any(a.name == name for name, _ in results)]
            missing = [f"{later.name} with seed {its}" for later, its in planned[number:]]
            write_report(out, known, done, missing=missing)
    return done


def _one(
    out: Path,
    arm: Arm,
    config: TrainConfig,
    inputs: RunInputs,
    split: Split,
    *,
    say: Callable[[str], None],
    quiet: bool,
) -> dict[str, Any]:
    """Return the result of one run, read from its file or computed."""
    from cellseg_train import checkpoint

    path = out / "results" / f"{arm.name}-{config.seed}.json"
    about = {
        "version": RESULT_VERSION,
        "run": arm.name,
        "seed": config.seed,
        "settings": _comparable(config),
        "split_sha256": split.sha256,
        "n_train_images": len(split.train),
        "n_val_images": len(split.val),
    }
    if path.exists():
        found = read_result(path)
        differing = [key for key, value in about.items() if found.get(key) != value]
        if differing:
            raise UsageError(
                f"{path} is of other {' and '.join(differing)} than requested now; give the settings and images it was "
                "made with, or another -o"
            )
        say("  finished before")
        return found
    folder = out / "runs" / f"{arm.name}-{config.seed}"
    seconds_since = stopwatch()
    _train(folder, checkpoint.RunRecord(config, inputs), quiet=quiet)
    trained = seconds_since()
    result: dict[str, Any] = about | measure_run(folder, config, split)
    seconds = {"train": round(trained, 1), "measure": round(seconds_since() - trained, 1)}
    result["seconds"] = seconds
    make_folder(path.parent)
    checkpoint.save_json(path, result)
    say(f"  {summary(result)}; {seconds['train']:.0f} s + {seconds['measure']:.0f} s")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """The result of a finished run. Raises ``ModelError`` if the file is damaged or lacks what the report needs."""
    try:
        content = path.read_bytes()
        shape = msgspec.json.decode(content, type=_Result)
        for needed, found_figures in _figures_of(shape):
            missing = [name for name in needed if name not in found_figures]
            if missing:
                raise ValueError(f"figures without {', '.join(missing)}")
        found: dict[str, Any] = json.loads(content)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ModelError(
            f"{path}: damaged result of a finished run ({error}); remove the file, and this run is measured again (and "
            "trained again if its folder in runs is gone)"
        ) from error
    return found


def _figures_of(result: _Result) -> Iterator[tuple[Sequence[str], dict[str, float | None]]]:
    """Names that the report needs, and the figures that must contain them."""
    for tasks in result.points.values():
        missing = [task for task in TASKS if task not in tasks]
        if missing:
            raise ValueError(f"no point for {', '.join(missing)}")
        yield from ((METRICS, point.figures) for point in tasks.values())
    yield from ((SWEPT_METRICS, point.figures) for point in result.sweep)


def _train(folder: Path, record: RunRecord, *, quiet: bool) -> None:
    from cellseg_train import checkpoint
    from cellseg_train import run as start

    if not (folder / checkpoint.CONFIG_FILE).exists():
        start.begin(folder, record, quiet=quiet)
        return
    found = checkpoint.load_record(folder)
    if _comparable(found.config) != _comparable(record.config) or found.inputs != record.inputs:
        raise UsageError(
            f"{folder} was started with other settings or folders; give those, or another -o (compare with "
            f"{folder / checkpoint.CONFIG_FILE})"
        )
    start.resume(folder, quiet=quiet)


def measure_run(folder: Path, config: TrainConfig, split: Split) -> dict[str, Any]:
    """Sweep and cross-fitted operating points of the network in ``folder`` on the validation images of ``split``.

    ``sweep``: a list of ``{method, parameter, threshold, figures}``. ``points``: method, then task: pooled ``figures``
    of images not used in the choice, their bootstrap ``intervals``, and the ``choices`` of each fold.
    """
    from cellseg_train import checkpoint, validate
    from cellseg_train.optim import choose_device

    network = checkpoint.load_network(folder)
    if network.spec.training.epochs != config.optim.epochs:
        raise ModelError(
            f"{folder} holds the network of epoch {network.spec.training.epochs}, expected the last of "
            f"{config.optim.epochs}; delete the folder to train this run again"
        )
    device = choose_device(config.device)
    items = list(validate.predict_pairs(network.net.to(device), split.val, config, network.spec.halo, device))
    labelling = Labelling(network.spec.channels, network.spec.cell_diameter_px, config.data.min_object_px)
    workers = os.cpu_count() or 1
    scorer = Scorer(items, labelling, workers=workers)
    folds = deal(len(items), FOLDS)
    points: dict[str, Any] = {}
    for variant in dict.fromkeys(("plain", network.spec.variant)):
        defaults = default_operating_points(variant)
        for task in TASKS:
            fit = cross_fit(scorer, [defaults[task]], task, folds)
            points.setdefault(method_name(defaults[task]), {})[task] = {
                "figures": _finite(figures(fit.scores)),
                "intervals": {name: [_number(v) for v in pair] for name, pair in intervals(fit.scores).items()},
                "choices": [msgspec.to_builtins(choice) for choice in fit.choices],
            }
    methods = [default_operating_points(v)["counting"] for v in dict.fromkeys(("plain", network.spec.variant))]
    swept = _sweep(items, labelling, methods, workers)
    return {
        "points": points,
        "sweep": [
            {"method": p.method, "parameter": p.parameter, "threshold": p.threshold, "figures": _finite(p.figures)}
            for p in swept
        ],
    }


def _sweep(
    items: Sequence[Prediction], labelling: Labelling, methods: Sequence[InstanceParams], workers: int
) -> list[Point]:
    """Run ``sweep`` with the thresholds distributed over threads."""
    from cellseg_deploy.evaluate.sweep import THRESHOLDS

    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda t: sweep(items, labelling, methods, thresholds=(t,)), THRESHOLDS))
    by_curve: dict[str, list[Point]] = {}
    for point in (point for part in parts for point in part):
        by_curve.setdefault(point.curve, []).append(point)
    return [point for curve in by_curve.values() for point in curve]


def summary(result: dict[str, Any]) -> str:
    """Describe the counting figures of the network's own method in words."""
    method = list(result["points"])[-1]
    found = result["points"][method]["counting"]["figures"]
    return (
        f"{method}: F1 {found['f1']:.3f} (apart {found['f1_apart']:.3f}), Dice {found['dice']:.4f}, "
        f"count error {_percent(found['count_mape'])}"
    )


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """Settings that affect what is learned; without device and threads."""
    settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))  # as read back from a file
    for name in ("device", "threads", "workers"):
        del settings[name]
    del settings["data"]["min_object_rel"]  # follows from min_object_px and the masks
    return settings


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(found: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON: integers as integers, others with six digits, undefined ones null."""
    return {
        name: value if isinstance(value, int) else (round(float(value), 6) if math.isfinite(value) else None)
        for name, value in found.items()
    }


def _percent(share: float | None) -> str:
    """Format a share in percent; unknown if there are no true cells."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


@click.command("study", context_settings=shared.SETTINGS)
@click.option("--images", required=True, type=shared.FOLDER, help="Training images.")
@click.option("--masks", required=True, type=shared.FOLDER, help="Masks of these images.")
@click.option("--val-images", required=True, type=shared.FOLDER, help="Images that every figure is measured on.")
@click.option("--val-masks", required=True, type=shared.FOLDER, help="Masks of these images.")
@console.mask_options
@click.option("-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="Study folder.")
@click.option(
    "--runs",
    metavar="NAME,...",
    help="Some of plain, boundary, distance, boundary-surface, boundary-no-gaps (the default) and plain-no-gaps.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training runs of each.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True)
@click.option("--patches-per-image", type=click.IntRange(1), default=1, show_default=True, help="Tiles per epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Tiles per update.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak learning rate.")
@click.option("--ema-decay", type=float, default=0.99, show_default=True, help="Decay of the averaged weights.")
@click.option("--image-scale", type=float, default=0.5, show_default=True, help="Model px per image px.")
@click.option("--tile-size", type=int, default=224, show_default=True, help="Side of the network's input in px.")
@click.option("--encoder", default="tiny", show_default=True, help="See cellseg-train --help.")
@click.option("--tiny-width", type=int, default=192, show_default=True, help="Width of the tiny encoder.")
@click.option("--tiny-depth", type=int, default=6, show_default=True, help="Blocks of the tiny encoder.")
@click.option("--weights", default="none", show_default=True, help="See cellseg-train --help.")
@click.option("--layer-decay", type=float, default=1.0, show_default=True, help="See cellseg-train --help.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="CPU threads; 0: PyTorch's own.")
@click.option("-q", "--quiet", is_flag=True, help="One line per run only.")
def study_command(
    images: Path, masks: Path, val_images: Path, val_masks: Path, output: Path, seeds: int, **given: Any
) -> None:
    """Train networks that differ in one setting on the same images, and measure the effect of that setting.

    \b
    python -m cellseg_benchmarks study --images train/images --masks train/masks \\
        --val-images val/images --val-masks val/masks -o study/

    The same command resumes a study that was stopped. DIR/results keeps a small JSON file for each
    finished run, DIR/runs the networks, DIR/study.md and DIR/sweep.png the results.
    """
    console.require_packages("train", "torch", "torchvision", "timm", "safetensors", "tensorboard")
    console.require_packages("plots", "matplotlib")
    from cellseg_train.checkpoint import RunInputs
    from cellseg_train.cli import absolute_source
    from cellseg_train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

    arms = arms_named(DEFAULT_ARMS if given["runs"] is None else shared.words(given["runs"]) or [])
    base = TrainConfig(
        model=shared.settings_of(ModelConfig, given),
        data=shared.settings_of(DataConfig, given),
        optim=shared.settings_of(OptimConfig, given),
        weights=absolute_source(given["weights"]),
        device=given["device"],
        threads=given["threads"],
    )
    inputs = RunInputs(*((str(path.absolute()),) for path in (images, masks, val_images, val_masks)))
    run_study(output, arms, range(seeds), base, inputs, say=shared.teller(False), quiet=given["quiet"])
    click.echo(f"report: {console.printable(output / 'study.md')}")
