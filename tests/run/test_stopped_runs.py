"""Runs that are stopped: what tells of all images is there, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DarknessBackend
from running import results, rows

from cellseg_deploy.errors import OutputError
from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import ImageResult, RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("no_thread_is_left", "quick_disk")


def test_what_tells_of_all_images_is_there_after_an_interrupt_too(folder: Path, tmp_path: Path) -> None:
    for module in ("pycocotools", "pyarrow"):
        pytest.importorskip(module)
    out, options = tmp_path / "out", RunOptions(save=("coco", "parquet"))
    run_folder(Segmenter(DarknessBackend()), find_images([folder]), out, options=options)
    expected = results(out)
    assert {"coco.json", "cells.parquet"} <= expected.keys()
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend()), find_images([folder]), out, options=options, on_plan=stop)
    assert results(out) == expected


def test_what_cannot_be_written_at_a_stop_keeps_nothing_else_from_it(folder: Path, tmp_path: Path) -> None:
    """A file of the whole run fails at its end; run.json says that it was stopped, and the other files are there."""
    for module in ("pycocotools", "pyarrow"):
        pytest.importorskip(module)
    out, options, told = tmp_path / "out", RunOptions(save=("coco", "parquet")), list[str]()

    def lose_a_part(result: ImageResult) -> None:
        told.append(result.image)
        if len(told) == 5:
            (out / "coco/a.png.json").unlink()

    with pytest.raises(OutputError, match=r"coco/a\.png\.json: cannot be read"):
        run_folder(Segmenter(DarknessBackend()), find_images([folder]), out, options=options, on_result=lose_a_part)
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    assert (out / "cells.parquet").exists()
    assert len(rows(out / "images.csv")) == 5


def test_a_run_that_was_killed_and_then_stopped_before_its_work_is_not_running(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_folder(Segmenter(DarknessBackend()), find_images([folder]), out)
    record = out / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "running"'))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder(Segmenter(DarknessBackend()), find_images([folder]), out, on_plan=stop)
    assert json.loads(record.read_text())["status"] == "stopped"
