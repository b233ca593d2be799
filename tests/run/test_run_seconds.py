"""Times and writes of a run: waiting is no work, and a table is renamed once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import THREE, DarknessBackend, draw_discs
from PIL import Image
from running import infer

from cellseg_deploy.cli.infer import _print_table
from cellseg_deploy.images.find import FoundImage, find_images
from cellseg_deploy.run import session
from cellseg_deploy.run.folder import inputs_of
from cellseg_deploy.run.output_folder import ALWAYS
from cellseg_deploy.run.record import ImageResult, RunOptions, RunSummary
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import plan


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(draw_discs((100, 130), THREE)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_time_in_which_no_image_comes_is_idle(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0.0
    real = session.time.perf_counter
    monkeypatch.setattr(session.time, "perf_counter", lambda: real() + waited)
    images = find_images([image])

    def rounds() -> Iterator[Sequence[FoundImage]]:
        nonlocal waited
        yield images
        waited += 5000
        yield []

    setup = session.RunSetup(
        Segmenter(DarknessBackend()), tmp_path / "out", RunOptions(), plan(device="cpu"), inputs_of(images)
    )
    summary = session.run(setup, rounds())
    assert summary.idle_seconds >= 5000
    assert summary.wall_seconds > 5000
    assert summary.wall_seconds - summary.idle_seconds < 1000


def test_the_rate_is_that_of_the_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = RunSummary(tmp_path, wall_seconds=3610.0, idle_seconds=3600.0, engine_seconds=5.0, others=1)
    summary.images = {f"{n}.png": ImageResult(f"{n}.png", "done", 1, 1) for n in range(20)}
    _print_table(summary)
    said = capsys.readouterr().out
    assert "10.0 s of work in 3610.0 s, 2.00 images/s" in said
    assert "1 row of earlier images" in said
    assert summary.engine_busy == 0.5


def test_a_table_is_renamed_once(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = list[str]()
    real = Path.replace

    def replace(path: Path, target: Any) -> Path:
        renamed.append(Path(target).name)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    Segmenter(DarknessBackend()).run(image, tmp_path / "out", save=["coco"])
    tables = [name for name in renamed if name not in ("run.json", "journal.jsonl", "a.png.json")]
    assert sorted(tables) == sorted([*ALWAYS, "coco.json"])
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".cellseg-")]  # noqa: PTH208


def test_usage_is_checked_before_progress_is_said(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [image, "-o", tmp_path / "out", "--model", model]
    assert infer(*words) == 0
    assert infer(*words, "--halo", 100_000) == 2
    assert "comparing" not in capsys.readouterr().err
    assert infer(*words) == 0
    assert "comparing the images with 1 image recorded in" in capsys.readouterr().err
