"""``python -m cellseg_benchmarks soak``: what passes, and that each leak fails the very criterion it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import make_conditions
from conftest import ROOT

from cellseg_benchmarks.cli import command
from cellseg_benchmarks.folder import soak as module
from cellseg_benchmarks.folder import soak_files
from cellseg_benchmarks.folder.soak import Criterion, Limits, Sample, Settings, Soak, slope
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import BackendUnavailableError

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors are read from /proc")
FILES = 300


# --- the real run


OVERHEAD = "overhead outside the network, median"
GROWTH = "memory growth in the second half"
SHORT_RUN_GROWTH = 3 * module.LEAKED_BYTES // 4
"""Bytes a file: three quarters of what the leaking network keeps. In a run of 300 files another worker or two may
begin, with some megabytes each; the command's own limit is for the 10,000 files of a real soak."""


def soaked(out: Path, *options: object) -> tuple[int, dict[str, Any]]:
    """Exit code and soak.json of the command in a process of its own: memory that others freed is none that leaks."""
    pytest.importorskip("matplotlib")
    words = [sys.executable, "-m", "cellseg_benchmarks", "soak", "-o", out, "--files", FILES, "-q", *options]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 5), done.stderr
    assert done.stdout.startswith("# Soak")
    return done.returncode, json.loads((out / "soak.json").read_text())


def broken(record: dict[str, Any]) -> set[str]:
    return {c["name"] for c in record["criteria"] if not c["measured"] <= c["allowed"]}


def leaks(record: dict[str, Any]) -> set[str]:
    """What is broken whatever the machine does, in a run as short as these."""
    (growth,) = (c["measured"] for c in record["criteria"] if c["name"] == GROWTH)
    return broken(record) - {OVERHEAD} - ({GROWTH} if growth < SHORT_RUN_GROWTH else set())


@linux
@pytest.mark.reliability
def test_a_run_that_leaks_nothing(tmp_path: Path) -> None:
    code, record = soaked(tmp_path / "soak")
    # The allowed overhead is that of an idle machine; this one may be at work.
    assert leaks(record) == set(), record["criteria"]
    assert code == (5 if broken(record) else 0)
    assert record["verdict"].startswith("fails: " if broken(record) else "holds")
    assert (record["soak"]["n_files"], record["soak"]["n_bad"]) == (FILES, 15)
    assert len(record["soak"]["overhead_ms"]) == FILES
    assert {path.name for path in (tmp_path / "soak").iterdir()} == {
        *("files", "run", "soak.json", "soak.md", "soak.png")
    }
    assert (tmp_path / "soak" / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert run(command, ["soak", "-o", str(tmp_path / "soak")]) == 6  # not a new folder


@linux
@pytest.mark.reliability
@pytest.mark.night
def test_the_run_of_ten_thousand_files(tmp_path: Path) -> None:
    _, record = soaked(tmp_path / "soak", "--files", 10_000)
    assert broken(record) - {OVERHEAD} == set(), record["criteria"]
    assert record["soak"]["n_files"] == 10_000


@linux
@pytest.mark.reliability
@pytest.mark.parametrize(
    ("leak", "criterion"),
    [
        ("memory", "memory growth in the second half"),
        ("descriptors", "file descriptors afterwards"),
        ("files", "temporary files afterwards"),
    ],
)
def test_a_leak_fails_its_criterion(leak: str, criterion: str, tmp_path: Path) -> None:
    code, record = soaked(tmp_path / "soak", "--leak", leak)
    assert code == 5
    assert leaks(record) == {criterion}, record["criteria"]
    assert criterion in record["verdict"]


@linux
def test_a_wrong_result_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = soak_files.make_files

    def mistaken(folder: Path, *numbers: int) -> dict[str, int | None]:
        made = real(folder, *numbers)
        sound = [name for name, cells in made.items() if cells is not None]
        made[sound[3]], made[sound[4]], made["00/none.png"] = 99, None, 1
        return made

    monkeypatch.setattr(module, "make_files", mistaken)
    found = module.soak(tmp_path, Settings(files=20, bad=0.1))
    assert len(found.wrong) == 3
    assert "made with 99" in found.wrong[0]
    assert "made with None" in found.wrong[1]
    assert found.wrong[2] == "00/none.png: never reported"


# --- files


def test_discs_do_not_touch() -> None:
    import cv2

    for number in range(7):
        image, cells = soak_files.picture(number)
        assert cv2.connectedComponents((image[..., 1] < 100).astype(np.uint8))[0] - 1 == cells == number


# --- verdict


def samples(bytes_a_file: float, step: float = 0.0) -> tuple[Sample, ...]:
    """Memory that rises by so much a file, and by ``step`` at once at three quarters of the run."""
    return tuple(
        Sample(files, int(1e8 + files * bytes_a_file + (step if files > 150 else 0)), 5, 2, 0)
        for files in range(10, 201, 10)
    )


def made_soak(**changes: Any) -> Soak:
    values: dict[str, Any] = {
        "n_files": 200,
        "n_bad": 10,
        "before": Sample(0, 100_000_000, 5, 2, 0),
        "after": Sample(200, 100_000_000, 5, 2, 0),
        "samples": samples(0),
        "overhead_ms": (5.0,) * 150 + (900.0,) * 50,
        "wrong": (),
        "wall_seconds": 2.0,
    }
    return Soak(**(values | changes))


def failed(soak: Soak) -> list[str]:
    return [criterion.name for criterion in soak.criteria(Limits()) if not criterion.holds]


def test_criteria() -> None:
    sound = made_soak()
    assert failed(sound) == []
    assert failed(made_soak(samples=samples(4000))) == []
    assert failed(made_soak(samples=samples(4200))) == ["memory growth in the second half"]
    assert failed(made_soak(samples=samples(0, step=300_000))) == []  # once, and no trend
    after = sound.after
    assert failed(made_soak(after=replace(after, descriptors=6))) == ["file descriptors afterwards"]
    assert failed(made_soak(after=replace(after, threads=3))) == ["threads afterwards"]
    assert failed(made_soak(after=replace(after, temporary_files=1))) == ["temporary files afterwards"]
    assert failed(made_soak(overhead_ms=(31.0,) * 3)) == ["overhead outside the network, median"]
    assert failed(made_soak(wrong=("a.png",))) == ["files with a wrong result"]
    assert not Criterion("unknown", float("nan"), 1).holds
    assert len(failed(made_soak(samples=sound.samples[-1:], overhead_ms=()))) == 2  # nothing to judge by is no yes
    settings = Settings(files=200)
    text = module.judged(made_soak(samples=sound.samples[-1:]), Limits(), make_conditions(), settings).to_markdown()
    assert "| memory growth in the second half | unknown |" in text
    assert "unknown MiB in the middle" in text


@linux
def test_memory_that_is_not_known_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rss_bytes", lambda: None)
    with pytest.raises(BackendUnavailableError, match="VmRSS"):
        module.soak(tmp_path / "soak", Settings(files=20, bad=0.1))


def test_slope() -> None:
    assert slope([1, 2, 3], [2, 4, 6]) == 2
    assert slope([1, 2, 3, 4, 5], [0, 0, 100, 0, 0]) == 0
    assert np.isnan(slope([3], [1]))
    assert np.isnan(slope([3, 3], [1, 2]))
