"""A benchmark that is stopped leaves what it measured, and says what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmark_fakes import FakeWorker

from cellseg_benchmarks.folder.scaling import Settings, measure_scaling
from cellseg_benchmarks.harness.figures import Bars, panels_png
from cellseg_benchmarks.harness.partial import PARTIAL_END, Progress, turns_left
from cellseg_benchmarks.harness.report import write_report
from cellseg_benchmarks.harness.timer import Plan, Turn, interleave
from cellseg_benchmarks.quality.robustness import CONDITIONS, conditions

PLAN = Plan(rounds=4, min_seconds=0, settle_seconds=0)


@dataclass
class Figures:
    """The least that a report is."""

    seconds: tuple[float, ...] = (1.0,)
    benchmark: str = "stub"
    report_version: int = 1

    def to_markdown(self) -> str:
        return "# Stub\n\nseconds\n"


def stopping_at(call: int, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer``, but a signal comes in the given ``call``, the first being 1."""
    calls = 0

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    return stopped


def kept(folder: Path, name: str = "stub") -> Any:
    return json.loads((folder / f"{name}{PARTIAL_END}").read_bytes())


def test_whole_rounds_stay_where_a_signal_comes_in_one(tmp_path: Path) -> None:
    progress = Progress(tmp_path, "stub")
    # Two calls of warm-up, then one a round: the sixth is in round 4, and a has had its turn of round 3 and 4 or not.
    turns: dict[str, Turn] = {"a": lambda calls: 1.0, "b": stopping_at(5, lambda calls: 2.0)}
    found = interleave(turns, PLAN, progress=progress)
    assert {name: times.seconds for name, times in found.times.items()} == {"a": (1.0, 1.0), "b": (2.0, 2.0)}
    assert progress.missing == ["rounds 3 to 4"]
    on_disk = kept(tmp_path)
    assert on_disk["complete"] is False
    assert on_disk["measured"]["rounds"]["b"]["seconds"] == [2.0, 2.0]


def test_a_signal_before_anything_was_measured_ends_it(tmp_path: Path) -> None:
    progress = Progress(tmp_path, "stub")
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": stopping_at(3, lambda calls: 1.0)}, PLAN, progress=progress)
    assert list(tmp_path.iterdir()) == []
    # A later series in which nothing was measured costs nothing of an earlier one.
    progress.keep("earlier", 1)
    found = interleave({"a": stopping_at(1, lambda calls: 1.0)}, PLAN, progress=progress, name="more rounds")
    assert (found.times, found.failed) == ({}, {"a": "stopped before its first round ended"})
    assert progress.missing == ["more rounds 1 to 4"]


def test_without_a_folder_a_signal_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": stopping_at(5, lambda calls: 1.0)}, PLAN)


def test_the_report_says_what_is_missing_and_then_the_signal_counts(tmp_path: Path) -> None:
    progress = Progress(tmp_path, "stub")
    with progress.stoppable(lambda: "rounds 2 to 3"):
        progress.keep("rounds", [1.0])
        raise KeyboardInterrupt
    assert progress.skips("the limits")
    assert "Not measured: rounds 2 to 3; the limits." in write_report(tmp_path, Figures(), b"png", progress)
    with pytest.raises(KeyboardInterrupt):
        progress.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stub.json", "stub.md", "stub.png"]
    written = json.loads((tmp_path / "stub.json").read_bytes())
    assert (written["complete"], written["missing"], written["seconds"]) == (
        False,
        ["rounds 2 to 3", "the limits"],
        [1],
    )
    assert (tmp_path / "stub.md").read_text().startswith("# Stub\n\n**Stopped before its end.")


def test_a_complete_report_has_no_remark(tmp_path: Path) -> None:
    progress = Progress(tmp_path, "stub")
    progress.keep("rounds", [1.0])
    assert not progress.skips("the limits")
    write_report(tmp_path, Figures(), b"png", progress)
    progress.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stub.json", "stub.md", "stub.png"]
    assert "complete" not in json.loads((tmp_path / "stub.json").read_bytes())
    assert (tmp_path / "stub.md").read_text().startswith("# Stub\n\nseconds\n")


def test_sizes_that_were_measured_stay(tmp_path: Path) -> None:
    answer = {"seconds": 2.0, "engine_seconds": 1.0, "peak_rss_bytes": 3, "rss_before_bytes": 1, "cells": 4}
    asked = stopping_at(7, lambda **_: answer | {"peak_is_of_this_run": True})  # warm and measured are two a size

    def start(kind: str, arguments: dict[str, Any]) -> Any:
        return FakeWorker({}, {"model": "stub"}, asked)

    progress = Progress(tmp_path, "scaling")
    settings = Settings(megapixels="0.02", images="2", small=0.0048, rounds=2)
    points, _, failed = measure_scaling(settings, tmp_path, start=start, progress=progress)
    assert [(point.series, point.round) for point in points] == [("megapixels", 0), ("images", 0), ("megapixels", 1)]
    assert failed == {}
    assert progress.missing == ["2 images in round 2"]
    assert len(kept(tmp_path, "scaling")["measured"]["points"]) == 3


def test_what_is_left_is_said_in_a_line() -> None:
    turns = [(number, name) for number in range(3) for name in ("png", "jpg")]
    assert turns_left(turns[1:]) == "jpg in round 1, rounds 2 to 3"
    assert turns_left(turns[4:]) == "png, jpg in round 3"
    assert turns_left(turns[6:]) == ""


def test_conditions_that_were_judged_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellseg_benchmarks.quality import robustness

    def judged(_: Any, scales: Any, __: Any, about: tuple[str, str, float], ___: int) -> list[Any]:
        return [robustness.Row(*about, "fixed", dict.fromkeys(robustness.REPORTED, 0.5))]

    monkeypatch.setattr(robustness, "_judged", stopping_at(3, judged))
    progress = Progress(tmp_path, "robustness")
    rows = conditions({}, lambda: iter([]), min_area_px=200, progress=progress)
    turns = [(name, value) for name, values in CONDITIONS.items() for value in values]
    assert [(row.condition, row.value) for row in rows] == turns[:2]
    assert progress.missing[0].startswith(f"{turns[2][0]} {turns[2][1]:g}, ")
    assert robustness.crowding({}, progress=progress) == []
    assert progress.missing[1:] == ["crowding"]


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    png = panels_png([Bars("a", "ms", ())], title="t")
    assert png == b""
    write_report(tmp_path, Figures(), png)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stub.json", "stub.md"]
    assert "No figure: matplotlib is not installed." in (tmp_path / "stub.md").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_leaves_the_rounds_that_were_measured(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cellseg_benchmarks", "limits", "-o", str(out), "--device", "cpu"),
            *("--matrix-size", "32", "--rounds", "100000", "--min-seconds", "0", "--settle", "0", "--threads", "1"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 2 of"):
            break
    # As a terminal does with Ctrl-C: to all processes of the group.
    (os.killpg if number is signal.SIGINT else os.kill)(process.pid, number)
    text, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    names = sorted(path.name for path in out.iterdir())
    if number is signal.SIGKILL:
        assert names == [f"limits{PARTIAL_END}"]
        assert all(len(times["seconds"]) >= 2 for times in kept(out, "limits")["measured"]["rounds"].values())
        return
    assert names == ["limits.json", "limits.md", "limits.png"]
    written = json.loads((out / "limits.json").read_bytes())
    assert written["complete"] is False
    assert written["missing"][0].endswith("to 100000")
    rounds = {len(rate["times"]["seconds"]) for rate in written["limits"]["rates"]}
    assert len(rounds) == 1
    assert min(rounds) >= 2
    assert "Stopped before its end" in text
    assert error.strip().endswith("terminated" if number is signal.SIGTERM else "interrupted")
