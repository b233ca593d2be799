"""Starting and resuming a run: folders, split and progress around ``loop.train``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.cli.console import say
from cellseg_deploy.cli.progress import in_words
from cellseg_deploy.errors import DataError, ModelError, plural
from cellseg_deploy.evaluate import specks
from cellseg_deploy.files.atomic import make_folder, remove_stale
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.images.find import Pair
from cellseg_deploy.models.spec import MIN_OBJECT_REL, WeightsInfo
from cellseg_train import checkpoint, loop, same_content
from cellseg_train.cell_classes import CellClasses, read_classes
from cellseg_train.cell_size import check_cell_size
from cellseg_train.checkpoint import RunInputs, RunRecord
from cellseg_train.config import DataConfig, TrainConfig
from cellseg_train.data import ExampleStore, Split, TrainingCells, cell_areas, find_pairs, split_by_image
from cellseg_train.model import CellSegNet
from cellseg_train.weights import class_remark, taught_diameter_px

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_AVERAGED = 86_400.0  # validations are part of the whole; rich's default is 30 s, which an update may take


def begin(run: Path, record: RunRecord, *, quiet: bool, measure_specks: bool = False) -> None:
    """Find and split the data, get the weights, read the data, make the run folder, train.

    ``measure_specks``: take the usual share of the training masks' median object for ``min_object_px``.

    Nothing is written before everything has been checked.
    """
    loop.check_settings(record.config)
    split = make_split(record.inputs, record.config)
    classes = find_classes(record.inputs, split)
    if classes is not None:
        model = replace(record.config.model, classes=classes.names)
        record = replace(record, config=replace(record.config, model=model))
    initial = loop.initial_network(record.config)
    with _reporter(quiet) as reporter:
        if split.remark:
            reporter.say(split.remark)
        if said := class_remark(record.config.model, record.config.weights):
            reporter.say(said)
        limit = specks.speck_limit(
            cell_areas(split.train, record.config.data.mask_foreground, classes),
            share=MIN_OBJECT_REL,
            given_px=None if measure_specks else record.config.data.min_object_px,
        )
        reporter.say(limit.words)
        data = replace(record.config.data, min_object_px=limit.px, min_object_rel=limit.share)
        if data.cell_diameter_px is not None:
            scales = folder_scales(split, data, classes)
            for folder, scale in scales.items():
                reporter.say(f"{folder}: scale {scale:.3g}")
            data = replace(data, folder_scales=scales, image_scale=round(next(iter(scales.values())), 4))
        record = replace(record, config=replace(record.config, data=data))
        store, cells = _load(record, split, reporter, classes)
        remark = check_cell_size(record.config, cells.diameter_px, taught_diameter_px(record.config.weights))
        if remark:
            reporter.warn(remark)
        make_folder(run)
        with exclusive(run):
            checkpoint.save_record(run, record)
            checkpoint.save_json(run / checkpoint.SPLIT_FILE, describe_split(split, classes))
            _train(run, record, split, store, cells, reporter, classes, initial)


def resume(run: Path, *, quiet: bool) -> None:
    """Resume ``run`` from its last checkpoint.

    Raises ``ModelError`` if an image or mask has changed, ``OutputInUseError`` if the run is still being trained.
    """
    record = checkpoint.load_record(run)
    with exclusive(run), _reporter(quiet) as reporter:
        remove_stale(run)
        split = make_split(record.inputs, record.config)
        classes = find_classes(record.inputs, split)
        if not (run / checkpoint.SPLIT_FILE).exists():  # killed before it started
            checkpoint.save_json(run / checkpoint.SPLIT_FILE, describe_split(split, classes))
        recorded = checkpoint.load_json(run / checkpoint.SPLIT_FILE)
        if recorded != describe_split(split, classes):
            raise ModelError(
                f"images, masks or classes of {run} are not those it was started with (fingerprint "
                f"{split.sha256[:12]}, recorded {str(recorded.get('sha256'))[:12]}); restore them, or start a new run"
            )
        _train(run, record, split, *_load(record, split, reporter, classes), reporter, classes)


def make_split(inputs: RunInputs, config: TrainConfig) -> Split:
    """Split given by ``inputs`` and the seed. Raises ``UsageError`` or ``DataError`` naming a missing partner."""
    pairs = find_pairs(_paths(inputs.images), _paths(inputs.masks))
    if inputs.val_images or inputs.val_masks:
        return Split(train=pairs, val=find_pairs(_paths(inputs.val_images), _paths(inputs.val_masks)))
    groups = same_content.groups_of([pair.image for pair in pairs])
    split = split_by_image(pairs, config.data.val_fraction, config.seed, groups)
    return replace(split, remark=same_content.words(groups))


def folder_scales(split: Split, data: DataConfig, classes: CellClasses | None = None) -> dict[str, float]:
    """Model px per image px for each mask folder, so that its median cell is ``data.cell_diameter_px`` wide.

    Cells that ``classes`` exclude do not count. Raises ``DataError`` for a folder whose masks contain no other cells.
    """
    pairs_of: dict[Path, dict[Path, Pair]] = {}  # a folder may be passed twice, to draw more tiles from it
    for pair in (*split.train, *split.val):
        pairs_of.setdefault(pair.mask.parent, {})[pair.mask] = pair
    scales = {}
    for folder, pairs in pairs_of.items():
        areas = cell_areas(list(pairs.values()), data.mask_foreground, classes)
        cells = areas[areas >= max(data.min_object_px, 1)]
        if not len(cells):
            raise DataError(f"the masks in {folder} hold no object of {data.min_object_px} px or more to measure")
        assert data.cell_diameter_px is not None
        scales[str(folder)] = data.cell_diameter_px / math.sqrt(4 / math.pi * float(np.median(cells)))
    return scales


def find_classes(inputs: RunInputs, split: Split) -> CellClasses | None:
    """Classes of the cells of both sides, None if no class file was passed. Raises what ``read_classes`` raises."""
    if not inputs.classes:
        return None
    images = dict.fromkeys(pair.image for pair in (*split.train, *split.val))
    return read_classes(_paths(inputs.classes), list(images))


def describe_split(split: Split, classes: CellClasses | None = None) -> dict[str, Any]:
    """Content of ``split.json``: stems and fingerprint of both sides, and fingerprint of the classes if any."""
    described = {
        "sha256": split.sha256,
        "train": [pair.stem for pair in split.train],
        "val": [pair.stem for pair in split.val],
    }
    return described if classes is None else described | {"classes_sha256": classes.sha256}


def _paths(names: tuple[str, ...]) -> list[Path]:
    return [Path(name) for name in names]


def _load(
    record: RunRecord, split: Split, reporter: loop.Reporter, classes: CellClasses | None
) -> tuple[ExampleStore, TrainingCells]:
    reporter.say(f"{plural(len(split.train), 'training image')}, {plural(len(split.val), 'validation image')}")
    store, cells = loop.load(record.config, split, reporter, classes)
    if classes is not None:
        absent = [name for name, n in zip(classes.names, cells.class_cells, strict=True) if not n]
        if absent:
            raise DataError(
                f"no training image holds a cell of class {', '.join(absent)}, so it cannot be learned; take it out of "
                f"{', '.join(record.inputs.classes)}, or add images of it"
            )
        counts = zip(classes.names, cells.class_cells, cells.class_weights(), strict=True)
        reporter.say("classes: " + ", ".join(f"{name} {n:,} (weight {weight:.2g})" for name, n, weight in counts))
    return store, cells


def _train(
    run: Path,
    record: RunRecord,
    split: Split,
    store: ExampleStore,
    cells: TrainingCells,
    reporter: loop.Reporter,
    classes: CellClasses | None,
    initial: tuple[CellSegNet, WeightsInfo] | None = None,
) -> None:
    loop.train(
        run,
        record.config,
        split,
        store,
        cells=cells,
        data_note=record.data_note,
        reporter=reporter,
        initial=initial,
        classes=classes,
    )


@contextmanager
def _reporter(quiet: bool) -> Iterator[loop.Reporter]:
    """On a terminal a bar with loss, rate and time left, elsewhere lines; warnings only if ``quiet``."""
    if quiet:
        yield QuietReporter()
        return
    if not sys.stderr.isatty():
        yield LineReporter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, console=Console(stderr=True), speed_estimate_period=_SECONDS_AVERAGED) as bar:
        yield BarReporter(bar)


def epoch_words(row: Mapping[str, float], epochs: int) -> str:
    """Progress line for one of ``epochs`` epochs: ``row`` of ``log.csv`` in words."""
    words = f"epoch {row['epoch']} of {epochs}: loss {row['loss']:.4f}, lr {row['lr']:.1e}"
    if "val_f1" not in row:
        return words
    classes = [f"{key.removeprefix('val_f1_')} {value:.3f}" for key, value in row.items() if key.startswith("val_f1_")]
    return (
        f"{words}, val Dice {row['val_dice']:.4f}, F1 {row['val_f1']:.4f}, "
        f"count error {row['val_count_mae']:.1f} cells per image"
        + (f"; F1 by class: {', '.join(classes)}" if classes else "")
    )


class QuietReporter(loop.Reporter):
    """Prints warnings only."""

    def warn(self, line: str) -> None:
        """Print ``line``."""
        say(f"warning: {line}")


class LineReporter(loop.Reporter):
    """Prints events as plain lines: one per epoch and one every half minute, each with the time left.

    ``clock``: returns seconds from any starting point.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_line = clock()
        self._begun: tuple[int, float] | None = None
        self._left = ""

    def say(self, line: str) -> None:
        """Print ``line``."""
        self._last_line = self._clock()
        say(line)

    def warn(self, line: str) -> None:
        """Print ``line``."""
        self.say(f"warning: {line}")

    def update(self, state: loop.Progress) -> None:
        """One more update was made."""
        self._note(state.step, state.steps)
        if self._is_due():
            rate = f"{state.tiles_per_second:.1f} tiles/s"
            words = f"epoch {state.epoch} of {state.epochs}: update {state.step} of {state.steps}"
            self.say(f"{words}, loss {state.loss:.3f}, {rate}{self._left}")

    def epoch(self, row: Mapping[str, float], epochs: int) -> None:
        """Print the figures of an epoch."""
        self.say(epoch_words(row, epochs) + self._left)

    def calibrate(self, done: int, total: int) -> None:
        """One more step of the calibration was made."""
        if done == 0:
            self._begun = None
            self.say("calibrating the operating points on the validation images")
        self._note(done, total)
        if self._is_due():
            self.say(f"calibrating: {done} of at most {total} steps{self._left}")

    def _note(self, done: int, total: int) -> None:
        """Report ``done`` of ``total`` steps and the time left at the rate since the first call."""
        now = self._clock()
        if self._begun is None:
            self._begun = done, now
        first, start = self._begun
        is_known = first < done < total
        self._left = f", {in_words((now - start) / (done - first) * (total - done))} left" if is_known else ""

    def _is_due(self) -> bool:
        return self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES


class BarReporter(loop.Reporter):
    """A bar for reading the images, one for the updates of the whole run, and one for the calibration."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("reading images", total=None, note="")

    def say(self, line: str) -> None:
        """Print ``line`` above the bar."""
        self._bar.console.print(line, markup=False, highlight=False)

    def warn(self, line: str) -> None:
        """Print ``line`` above the bar."""
        self.say(f"warning: {line}")

    def read(self, done: int, total: int) -> None:
        """``done`` of ``total`` images were read and checked."""
        self._bar.update(self._task, total=total, completed=done)
        if done == total:
            self._next("training")

    def update(self, state: loop.Progress) -> None:
        """One more update was made."""
        note = f"loss {state.loss:.3f}  lr {state.lr:.1e}  {state.tiles_per_second:.1f} tiles/s"
        words = f"epoch {state.epoch} of {state.epochs}"
        self._bar.update(self._task, total=state.steps, completed=state.step, description=words, note=note)

    def epoch(self, row: Mapping[str, float], epochs: int) -> None:
        """Print the figures of a validated epoch; the bar shows those of the others."""
        if "val_f1" in row:
            self.say(epoch_words(row, epochs))

    def calibrate(self, done: int, total: int) -> None:
        """One more step of the calibration was made."""
        if done == 0:
            self._next("calibrating")
        self._bar.update(self._task, total=total, completed=done)

    def _next(self, description: str) -> None:
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(description, total=None, note="")
