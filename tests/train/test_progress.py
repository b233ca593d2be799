"""What a training says of itself while it runs: the whole of it with the time left, and its calibration."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from cellseg_deploy.cli import console
from cellseg_deploy.samples import write_samples
from cellseg_train import loop
from cellseg_train import run as train_run
from cellseg_train.cli import command
from cellseg_train.run import BarReporter, LineReporter

ROW = {"epoch": 2, "step": 8, "lr": 1e-3, "loss": 0.25}
VALIDATED = {**ROW, "val_dice": 0.9, "val_f1": 0.8, "val_map": 0.7, "val_count_mae": 3.21, "val_count_bias": 0}


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def progress(step: int, steps: int = 40) -> loop.Progress:
    return loop.Progress((step - 1) // 4 + 1, steps // 4, step, steps, 0.5, 1e-3, 2.25)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_lines_tell_of_the_whole_run_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reporter = LineReporter(clock)
    for step in range(1, 9):
        reporter.update(progress(step))
        clock.now += 10
    assert lines(capsys) == [
        "epoch 1 of 10: update 4 of 40, loss 0.500, 2.2 tiles/s, 6 min 0 s left",
        "epoch 2 of 10: update 7 of 40, loss 0.500, 2.2 tiles/s, 5 min 30 s left",
    ]
    reporter.epoch(ROW, 10)
    reporter.epoch(VALIDATED, 10)
    assert lines(capsys) == [
        "epoch 2 of 10: loss 0.2500, lr 1.0e-03, 5 min 20 s left",
        "epoch 2 of 10: loss 0.2500, lr 1.0e-03, val Dice 0.9000, F1 0.8000, count error 3.2 cells per image, "
        "5 min 20 s left",
    ]


def test_lines_tell_of_the_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reporter = LineReporter(clock)
    reporter.update(progress(40))
    for done in range(8):
        reporter.calibrate(done, 100)
        clock.now += 10
    assert lines(capsys) == [
        "calibrating the operating points on the validation images",
        "calibrating: 3 of at most 100 steps, 16 min 10 s left",
        "calibrating: 6 of at most 100 steps, 15 min 40 s left",
    ]


def test_a_resumed_run_judges_by_its_own_pace(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    reporter = LineReporter(clock)
    for step in (31, 32):
        reporter.update(progress(step))
        clock.now += 30
    assert lines(capsys) == ["epoch 8 of 10: update 32 of 40, loss 0.500, 2.2 tiles/s, 4 min 0 s left"]


def test_the_bar_is_that_of_the_whole_run() -> None:
    bar = Bar(console=Console(file=(said := io.StringIO())))
    reporter = BarReporter(bar)
    reporter.read(3, 3)
    reporter.update(progress(8))
    (task,) = bar.tasks
    assert (task.completed, task.total, task.description) == (8, 40, "epoch 2 of 10")
    reporter.epoch(ROW, 10)
    reporter.epoch(VALIDATED, 10)
    assert said.getvalue().count("epoch 2 of 10") == 1
    reporter.calibrate(0, 100)
    reporter.calibrate(9, 100)
    (task,) = bar.tasks
    assert (task.completed, task.total, task.description) == (9, 100, "calibrating")


def test_a_calibration_tells_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to its end, and never more than it said."""
    steps: list[tuple[int, int]] = []
    epochs: list[tuple[float, int]] = []

    class Listener(loop.Reporter):
        def calibrate(self, done: int, total: int) -> None:
            steps.append((done, total))

        def epoch(self, row: object, epochs_in_all: int) -> None:
            epochs.append((dict(row)["epoch"], epochs_in_all))  # type: ignore[call-overload]

    @contextmanager
    def listening(_quiet: bool) -> Iterator[loop.Reporter]:
        yield Listener()

    monkeypatch.setattr(train_run, "_reporter", listening)
    write_samples(tmp_path / "data", 2, 5, (150, 200))
    folders = ["--images", str(tmp_path / "data/images"), "--masks", str(tmp_path / "data/masks")]
    small = ["--tile-size", "56", "--tiny-width", "48", "--tiny-depth", "1", "--decoder-channels", "16,16,8"]
    fast = ["--image-skip", "none", "--epochs", "2", "--device", "cpu", "--threads", "1", "--image-scale", "0.4"]
    assert console.run(command, [*folders, "-o", str(tmp_path / "run"), *small, *fast]) == 0
    assert epochs == [(1, 2), (2, 2)]
    done, totals = zip(*steps, strict=True)
    assert len(set(totals)) == 1
    assert done[0] == 0
    assert done[-1] == totals[0]
    assert list(done) == sorted(done)
    assert len(done) > 20
