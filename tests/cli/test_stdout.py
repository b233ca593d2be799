"""Where nobody takes what a command prints: one sentence, a code of its own, and files that are whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_discs
from running import rows, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs /dev/full and pipes as POSIX has them")


@pytest.fixture
def command(model: Path, tmp_path: Path) -> list[str]:
    folder = tmp_path / "in"
    folder.mkdir()
    save(folder / "a.png", draw_discs((100, 130), [(30, 30), (80, 60)]))
    program = "from cellseg_deploy.cli.infer import main; main()"
    return [sys.executable, "-c", program, str(folder), "-o", str(tmp_path / "out"), "--model", str(model)]


@pytest.mark.reliability
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_disk_behind_stdout(command: list[str], more: list[str], tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([*command, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 6
    assert "error: stdout cannot be written to (No space left on device); files that were written are complete" in (
        done.stderr
    )
    assert "internal error" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert [row["cells"] for row in rows(tmp_path / "out/images.csv")] == ["2"]


COMMANDS = (
    *("cellseg_deploy.cli.infer command", "cellseg_deploy.cli.evaluate command", "cellseg_train.cli command"),
    *("cellseg_export.cli command", "cellseg_benchmarks.cli command", "cellseg_deploy.samples.__main__ main"),
)


@pytest.mark.reliability
@pytest.mark.parametrize("place", COMMANDS)
def test_every_command_says_it(place: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    module, name = place.split()
    program = f"import sys; from cellseg_deploy.cli.console import run; from {module} import {name} as command\n"
    program += "sys.exit(run(command, ['--help']))"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 6
    assert done.stderr.startswith("error: stdout cannot be written to (No space left on device)")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.reliability
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_pipe_that_nobody_reads(command: list[str], more: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*command, *more], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 6
    assert "error: stdout cannot be written to (Broken pipe)" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert [row["cells"] for row in rows(tmp_path / "out/images.csv")] == ["2"]
