"""``cellseg-evaluate calibrate``: choose operating points on images with masks, and write them into a model file.

MODEL.onnx                      the same graph and weights (so the same identity) with the chosen operating points
MODEL.calibration.json          the choice, its quality on images it was not chosen on, and the other settings tried
MODEL.calibration.png           reliability of the probabilities
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cellseg_deploy.cli import console, model_files
from cellseg_deploy.cli.evaluate_options import Shared, with_progress
from cellseg_deploy.cli.masks import label_pairs
from cellseg_deploy.errors import DataError, OutputError, plural
from cellseg_deploy.evaluate import calibration, plots, score
from cellseg_deploy.evaluate.probability_store import KeptImages, kept_images, reliability_record
from cellseg_deploy.files import atomic
from cellseg_deploy.files.json_record import was_written_by

if TYPE_CHECKING:
    from cellseg_deploy.evaluate.calibration import TaskCalibration
    from cellseg_deploy.evaluate.truths import Truths
    from cellseg_deploy.images.read import Pair
    from cellseg_deploy.models.spec import InstanceParams, Task
    from cellseg_deploy.segmenter import Segmenter

REPORT_SUFFIX, FIGURE_SUFFIX = ".calibration.json", ".calibration.png"
_SECONDS_BETWEEN_LINES = 10.0
_MAIN = {"counting": "f1_apart", "confluence": "dice"}


def run(shared: Shared, folder: Path, masks: Path) -> int:
    """Calibrate on the images in ``folder`` and their ``masks``; return the exit code."""
    out = shared.output
    model = model_files.read(shared.engine["model"])
    if model.path.suffix.lower() != model_files.ONNX:
        raise click.UsageError(f"calibrate takes a model ending in {model_files.ONNX}, got {model.path}")
    model_files.check_target(out, model, (folder, masks))
    check_report(out)
    with label_pairs(folder, masks, quiet=shared.quiet) as paired, kept_images() as kept:
        pairs = paired.pairs
        calibration.deal(len(pairs))  # refuse too few images before any work
        atomic.make_folder(out.parent)
        with shared.open_segmenter(folder) as segmenter:
            limit, truths = shared.truths(pairs, segmenter.backend.spec)
            _predict(segmenter, pairs, kept, shared, truths)
        if not any(item.true_labels.any() for item in kept):
            raise DataError(f"the masks in {masks} contain no cell; calibration needs cells to choose the settings by")
        spec = model.spec
        labelling = calibration.Labelling(spec.channels, spec.cell_diameter_px, limit.px)
        scorer = calibration.Scorer(kept, labelling, workers=os.cpu_count() or 1)
        scorer.on_trial = None if shared.quiet else _Ticker(scorer)
        found = calibration.calibrate(scorer, spec.operating_points, spec.variant)
        reliability = kept.reliability()
        n_tried = scorer.n_tried
    points: dict[str, InstanceParams] = {**spec.operating_points, **{task: one.chosen for task, one in found.items()}}
    # Scored on images not used for the choice; the model's earlier figures were measured at other settings.
    held_out = {name: round(value, 5) for name, value in found["counting"].fit_figures.items() if math.isfinite(value)}
    training = msgspec.structs.replace(spec.training, val_metrics=held_out)
    data = model.rewritten(msgspec.structs.replace(spec, operating_points=points, training=training))
    record = {
        "program": score.PROGRAM,
        "model": {"path": str(model.path), "name": spec.name, "model_identity": model.identity},
        "written": {"file": out.name, "file_sha256": hashlib.sha256(data).hexdigest()},
        "data": {"images": str(folder), "masks": str(masks), "n_images": len(pairs)},
        "mask_foreground": shared.mask_foreground,
        "min_area_px": limit.px,
        "min_object_rel": limit.share,
        "n_true_dropped": limit.dropped,
        "settings_tried": n_tried,
        "how": {
            "held_out": f"images scored with settings chosen without them, {min(calibration.FOLDS, len(pairs))} folds",
            "interval": f"95 % percentile bootstrap over images, {calibration.BOOTSTRAPS} repeats",
            "chosen": "on all images: written into the model; its figures on these images are optimistic",
        },
        "tasks": {task: _task_record(task, one) for task, one in found.items()},
        "reliability": reliability_record(reliability),
    }
    figure = plots.reliability_png(reliability, title=f"{spec.name}: {plural(len(pairs), 'image')}")
    _replace(out, data, _json(record), figure)
    if not shared.quiet:
        click.echo(limit.words)
        _print(found, len(pairs), reliability.ece, out)
    return console.EXIT_OK


def _replace(out: Path, model: bytes, report: bytes, figure: bytes) -> None:
    """Write all three files. If interrupted, an existing report still matches the existing model, and a figure has a
    report next to it, by which the next calibration recognises the figure as its own."""
    report_path, figure_path = out.with_suffix(REPORT_SUFFIX), out.with_suffix(FIGURE_SUFFIX)
    for path in (figure_path, report_path):
        with atomic.writing(path):
            path.unlink(missing_ok=True)
    atomic.write_bytes(out, model)
    atomic.write_bytes(report_path, report)
    atomic.write_bytes(figure_path, figure)


def check_report(out: Path) -> None:
    """Raise ``OutputError`` if a file not written by calibration is in the place of its report."""
    report, figure = out.with_suffix(REPORT_SUFFIX), out.with_suffix(FIGURE_SUFFIX)
    there = [path for path in (report, figure) if os.path.lexists(path)]
    if there and not was_written_by(score.PROGRAM, report):
        raise OutputError(f"{there[0]}: not written by {score.PROGRAM}, so it is not replaced; choose another -o")


def _predict(segmenter: Segmenter, pairs: list[Pair], kept: KeptImages, shared: Shared, truths: Truths) -> None:
    """Run the network once per photograph and keep its output with the truth."""
    found = score.predicted_pairs(
        pairs,
        shared.predictor(segmenter),
        lambda pair, true, found: (pair.stem, found.probabilities_khw, true),
        truths,
    )
    with closing(found):
        for name, probabilities_khw, true in with_progress(found, len(pairs), shared.quiet):
            kept.add(name, probabilities_khw, true)


class _Ticker:
    """Prints a line every ten seconds: the number of settings to try is not known in advance."""

    def __init__(self, scorer: calibration.Scorer) -> None:
        self._scorer = scorer
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            console.say(f"{plural(self._scorer.n_tried, 'setting')} tried")


def _task_record(task: Task, one: TaskCalibration) -> dict[str, Any]:
    main = _MAIN[task]
    return {
        "chosen": msgspec.to_builtins(one.chosen),
        "before": msgspec.to_builtins(one.before),
        "held_out": _finite(one.fit_figures),
        "held_out_intervals": {name: [_or_none(low), _or_none(high)] for name, (low, high) in one.intervals.items()},
        "chosen_on_these_images": _finite(one.chosen_figures),
        "before_on_these_images": None if one.before_figures is None else _finite(one.before_figures),
        "chosen_by_fold": [msgspec.to_builtins(choice) for choice in one.fit.choices],
        "matters": {
            name: {"metric": main, "lowest": low, "highest": high} for name, (low, high) in matters(task, one).items()
        },
        "one_setting_moved": [
            {"parameter": s.parameter, "value": s.value, **{n: _or_none(s.figures[n]) for n in calibration.REPORTED}}
            for s in one.steps
        ],
    }


def matters(task: Task, one: TaskCalibration) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest value of the task's first figure as each setting alone is moved."""
    values: dict[str, list[float]] = {}
    for step in one.steps:
        values.setdefault(step.parameter, []).append(step.figures[_MAIN[task]])
    return {name: (min(found), max(found)) for name, found in values.items()}


def _print(found: dict[Task, TaskCalibration], n_images: int, ece: float, out: Path) -> None:
    click.echo(
        f"{plural(n_images, 'image')}; figures with an interval (95 %, bootstrap over images) are from images not"
    )
    click.echo("used to choose the settings; 'before', the model's own point, is optimistic if chosen on these images;")
    click.echo("'moved alone' and ece cover all images")
    for task, one in found.items():
        click.echo(f"\n{task}: {_words(one.chosen)}")
        for name in calibration.REPORTED[:4]:
            low, high = one.intervals[name]
            before = "" if one.before_figures is None else f"   before {one.before_figures[name]:.4f}"
            click.echo(f"  {name:<17} {one.fit_figures[name]:.4f}  [{low:.4f}, {high:.4f}]{before}")
        agreeing = sum(choice == one.chosen for choice in one.fit.choices)
        click.echo(f"  the same choice in {agreeing} of {len(one.fit.choices)} folds")
        for name, (low, high) in matters(task, one).items():
            click.echo(f"  {name:<21} moved alone: {_MAIN[task]} {low:.4f} to {high:.4f}")
    click.echo(f"\nece      {ece:.4f}")
    click.echo(f"results  {console.printable(out)}")


def _words(params: InstanceParams) -> str:
    values = msgspec.to_builtins(params)
    return f"{values.pop('method')}, " + ", ".join(f"{name} {value:g}" for name, value in values.items())


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in figures.items()}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
