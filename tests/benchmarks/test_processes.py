"""``python -m cellseg_benchmarks processes``: the same bytes in every form, and an error where a process fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import processes
from cellseg_benchmarks.folder.processes import Form, ProcessesReport, Run, StubEngine
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError
from cellseg_deploy.models import default_model_path
from cellseg_deploy.models.onnx_file import read_model_file


def test_the_command_measures_two_processes_with_the_bytes_of_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ["--images", "3", "--megapixels", "0.05", "--rounds", "1", "--processes", "2", "--ms-per-tile", "0"]
    assert run(cli.command, ["processes", *size, "-q", "-o", str(out)]) == 0
    found = json.loads((out / "processes.json").read_text())
    assert [item["form"]["processes"] for item in found["runs"]] == [1, 2]
    assert len({item["labels"] for item in found["runs"]}) == 1
    assert "label images of all 2 runs have the same bytes" in (out / "processes.md").read_text()


def test_other_labels_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter("ab")
    form = Form(1, 1, apart=False)
    monkeypatch.setattr(processes, "run", lambda *_: Run(form, 0, 1.0, 1.0, next(names)))
    with pytest.raises(DataError, match="are not those of"):
        processes.measure([tmp_path], [form, replace(form, apart=True)], 1, 1.0, tmp_path, lambda _: None)


def test_the_stub_finds_dark_things_of_one_class() -> None:
    spec = read_model_file(default_model_path()).spec
    tiles = np.full((2, spec.tile_size, spec.tile_size, 3), 250, np.uint8)
    tiles[1, 50:100, 50:100] = 120
    with StubEngine(spec, 0.0) as engine:
        maps = engine.predict(tiles)
    assert maps[0, 0].max() < 0.01
    assert maps[1, 0, 60, 60] > 0.99
    assert np.allclose(maps[:, -len(spec.classes) :].sum(axis=1), 1)


def test_ratios_are_taken_within_a_round() -> None:
    one, two = Form(1, 2, apart=False), Form(2, 1, apart=True)
    runs = [Run(one, 0, 10, 15, "x"), Run(two, 0, 8, 15, "x"), Run(one, 1, 30, 15, "x"), Run(two, 1, 24, 15, "x")]
    report = ProcessesReport.__new__(ProcessesReport)
    for name, value in {"images": 5, "megapixels": 2.0, "ms_per_tile": 1.0, "cores": 2, "runs": tuple(runs)}.items():
        object.__setattr__(report, name, value)
    rows = [line for line in report.rows() if "2 processes" in line[0]]
    assert rows[0][2] == "1.25"
