"""Beginning and resuming a run: folders, split and progress around ``loop.train``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cellseg_deploy.errors import ModelError
from cellseg_deploy.outputs.atomic import make_folder
from cellseg_train import checkpoint, loop
from cellseg_train.checkpoint import RunInputs, RunRecord
from cellseg_train.config import TrainConfig
from cellseg_train.data import Split, find_pairs, split_by_image

logger = logging.getLogger(__name__)


def begin(run: Path, record: RunRecord, *, quiet: bool) -> None:
    """Find and split the data, make the run folder, train. Nothing is written before all of it was found right."""
    loop.check_settings(record.config)
    split = make_split(record.inputs, record.config)
    make_folder(run)
    checkpoint.save_record(run, record)
    checkpoint.save_json(run / checkpoint.SPLIT_FILE, describe_split(split))
    _train(run, record, split, quiet)


def resume(run: Path, *, quiet: bool) -> None:
    """Go on from the last checkpoint of ``run``. Raises ``ModelError`` if its images are no longer the same."""
    record = checkpoint.load_record(run)
    split = make_split(record.inputs, record.config)
    recorded = checkpoint.load_json(run / checkpoint.SPLIT_FILE)
    if recorded != describe_split(split):
        raise ModelError(
            f"the images of {run} are not those it was started with (split {split.sha256[:12]}, recorded "
            f"{recorded.get('sha256', '?')[:12]}); bring them back, or start a new run"
        )
    _train(run, record, split, quiet)


def make_split(inputs: RunInputs, config: TrainConfig) -> Split:
    """The split that ``inputs`` and the seed give. Raises ``UsageError`` or ``DataError`` naming a missing partner."""
    pairs = find_pairs(_paths(inputs.images), _paths(inputs.masks))
    if inputs.val_images or inputs.val_masks:
        return Split(train=pairs, val=find_pairs(_paths(inputs.val_images), _paths(inputs.val_masks)))
    return split_by_image(pairs, config.data.val_fraction, config.seed)


def describe_split(split: Split) -> dict[str, Any]:
    """``split.json``: stems of both sides and their fingerprint."""
    return {
        "sha256": split.sha256,
        "train": [pair.stem for pair in split.train],
        "val": [pair.stem for pair in split.val],
    }


def _paths(names: tuple[str, ...]) -> list[Path]:
    return [Path(name) for name in names]


def _train(run: Path, record: RunRecord, split: Split, quiet: bool) -> None:
    click.echo(f"{len(split.train)} training images, {len(split.val)} validation images -> {run}", err=True)
    with _progress(quiet) as (report, announce):
        loop.train(run, record.config, split, data_note=record.data_note, report=report, announce=announce)
    click.echo(f"network: {run / checkpoint.WEIGHTS_FILE}")
    click.echo(f"next:    cellseg-export onnx {run} -o model.onnx")


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Any, Any]]:
    """A bar with loss, rate and time left on a terminal; elsewhere, or when ``quiet``, one line a validation."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None, lambda line: click.echo(line, err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, epoch=0, note="")

        def report(state: loop.Progress) -> None:
            note = f"loss {state.loss:.3f}  lr {state.lr:.1e}  {state.tiles_per_second:.1f} tiles/s"
            bar.update(task, total=state.steps, completed=state.step, epoch=state.epoch, note=note)

        yield report, lambda line: bar.console.print(line, markup=False, highlight=False)
