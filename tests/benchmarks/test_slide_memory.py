"""``python -m cellseg_benchmarks slide-memory``: the command as shipped, its peak memory, and its cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder import slide_memory
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError


def test_the_command_measures_blank_images_and_images_of_cells(tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ["--blank", "600", "--cells", "2560", "--memory", "0.5"]
    assert run(cli.command, ["slide-memory", *size, "--threads", "1", "-q", "-o", str(out)]) == 0
    blank, cells = json.loads((out / "slide-memory.json").read_text())["runs"]
    assert (blank["true_cells"], blank["cells"]) == (0, 0)
    assert cells["cells"] == pytest.approx(cells["true_cells"], rel=0.1)
    assert all(50e6 < each["peak_bytes"] < 2e9 for each in (blank, cells))
    assert "| cells | 2,560 x 2,560 |" in (out / "slide-memory.md").read_text()
    assert [path.name for path in out.iterdir() if path.name.startswith("work-")] == []


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ended with 2: .*memory"):
        slide_memory.measure("blank", 600, tmp_path, memory=1000, threads=1)


def test_a_side_that_the_generator_cannot_make_is_refused(tmp_path: Path) -> None:
    assert run(cli.command, ["slide-memory", "--cells", "1000", "-q", "-o", str(tmp_path / "out")]) == 2
