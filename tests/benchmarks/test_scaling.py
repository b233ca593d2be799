"""``python -m cellseg_benchmarks scaling``: exponents, bytes a pixel, and the three files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_fakes import FakeWorker
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.folder.scaling import (
    Point,
    ScalingReport,
    Settings,
    exponent,
    growth_of,
    held_bytes_per_pixel,
    measure_scaling,
)
from cellseg_benchmarks.harness.worker import WorkerError
from cellseg_deploy.cli.console import run

FACTS = {"model": "stub", "engine": "onnxruntime fp32 on cpu", "channels": 2, "scale": 0.5}


def point(n: float, seconds: float, own: int | None = 0, *, series: Any = "megapixels", round_: int = 0) -> Point:
    before = None if own is None else 100_000_000
    peak = 100_000_000 + (own or 0)
    pixels = int(n * 1e6) if series == "megapixels" else 480_000
    return Point(series, n, round_, pixels, seconds, seconds / 2, peak, before, 5)


def test_exponents() -> None:
    assert exponent([1, 4, 16], [3, 12, 48]) == pytest.approx(1)
    assert exponent([1, 10, 100], [2, 200, 20000]) == pytest.approx(2)
    assert exponent([1, 4, 16], [5, 5, 5]) == pytest.approx(0)
    assert exponent([4], [1]) is None
    assert exponent([], []) is None


def test_growth_of_a_linear_series() -> None:
    points = [point(n, 0.25 * n, int(10e6 * n)) for n in (1, 4, 16, 64)]
    growth = growth_of(points, "megapixels")
    assert growth.time_exponent == pytest.approx(1)
    assert growth.memory_exponent == pytest.approx(1)
    assert growth.linear_within == pytest.approx(0)
    assert growth.bytes_per_pixel == pytest.approx(10)


def test_growth_tells_what_is_not_linear() -> None:
    """The small size does not count, the median of the rounds does."""
    points = [point(1, 9.0), point(4, 4.0), point(16, 20.0), point(16, 20.0), point(16, 99.0), point(64, 72.0)]
    growth = growth_of(points, "megapixels")
    assert growth.linear_within == pytest.approx(0.25)  # 1.25 s per megapixel against 1
    assert growth.time_exponent is not None
    assert growth.time_exponent < 1


def test_growth_of_folders_is_without_bytes_a_pixel() -> None:
    points = [point(n, n / 10, 50_000_000, series="images") for n in (1, 10, 100)]
    growth = growth_of(points, "images")
    assert (growth.memory_exponent, growth.bytes_per_pixel, growth.linear_within) == (pytest.approx(0), None, None)
    assert growth_of([], "images").time_exponent is None


def test_memory_that_nobody_could_tell_is_none() -> None:
    points = [point(n, n, None) for n in (4, 16)]
    assert points[0].own_bytes is None
    growth = growth_of(points, "megapixels")
    assert (growth.memory_exponent, growth.bytes_per_pixel) == (None, None)
    assert growth.time_exponent == pytest.approx(1)


def test_what_an_image_takes_at_least() -> None:
    held = held_bytes_per_pixel(FACTS)
    # RGB, int32 labels, and two channels of a quarter of the pixels
    assert held == {"uint8": 7.5, "float16": 8.0, "float32": 9.0}


def test_every_measurement_is_a_process_of_its_own(tmp_path: Path) -> None:
    opened: list[FakeWorker] = []

    def answer(paths: list[str], max_pixels: int = 0) -> dict[str, Any]:
        (path,) = map(Path, paths)
        n = len(list(path.iterdir())) if path.is_dir() else 1
        return {
            "seconds": 2.0 * n,
            "engine_seconds": 1.0,
            "peak_rss_bytes": 300,
            "rss_before_bytes": 100,
            "peak_is_of_this_run": True,
            "cells": n,
        }

    def start(kind: str, arguments: dict[str, Any]) -> Any:
        opened.append(FakeWorker({}, FACTS, answer))
        return opened[-1]

    points, facts, failed = measure_scaling(
        Settings(megapixels="0.02,0.05", images="3", small=0.0048, rounds=2), tmp_path, start=start
    )
    assert facts == FACTS
    assert failed == {}
    assert [(p.series, p.n, p.round) for p in points] == [
        *(("megapixels", 0.02, 0), ("megapixels", 0.05, 0), ("images", 3, 0)),
        *(("megapixels", 0.02, 1), ("images", 3, 1), ("megapixels", 0.05, 1)),
    ]
    assert len(opened) == 6
    for worker in opened:
        warm, measured = worker.asked
        assert Path(warm[1]["paths"][0]).name == "warm.tif"  # what is made once is made before
        assert measured[0] == "run"
    assert opened[1].asked[1][1]["max_pixels"] <= 50_000
    assert {p.seconds for p in points if p.series == "images"} == {6.0}
    assert points[0].own_bytes == 200


def test_a_size_that_fails_is_left_out_with_the_reason(tmp_path: Path) -> None:
    def start(kind: str, arguments: dict[str, Any]) -> Any:
        def answer(paths: list[str], max_pixels: int = 0) -> Any:
            if "large" in paths[0]:
                raise WorkerError("the process ended with signal 9 (out of memory?)")
            return {"seconds": 1.0, "engine_seconds": 0.5, "peak_rss_bytes": 1, "rss_before_bytes": 1, "cells": 0,
                    "peak_is_of_this_run": False}  # fmt: skip

        return FakeWorker({}, FACTS, answer)

    points, _, failed = measure_scaling(
        Settings(megapixels="0.02", images="1", small=0.0048, rounds=2), tmp_path, start=start
    )
    assert failed == {"0.02 megapixels": "the process ended with signal 9 (out of memory?)"}
    assert [p.series for p in points] == ["images", "images"]
    assert points[0].before_bytes is None  # the peak is of the whole life


def test_the_command_leaves_three_files(
    tmp_path: Path, onnx_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    arguments = [
        *("scaling", "--model", str(onnx_file()), "-o", str(out), "--megapixels", "0.02,0.08,4", "--images", "2,50"),
        *("--max-megapixels", "0.1", "--max-images", "10", "--small", "0.01", "--rounds", "1", "--threads", "1"),
    ]
    assert run(cli.command, arguments) == 0
    found = written_report(out, "scaling", ScalingReport)
    assert (found["benchmark"], found["report_version"]) == ("scaling", 1)
    assert [(p["series"], p["n"]) for p in found["points"]] == [
        *(("megapixels", 0.02), ("megapixels", 0.08), ("images", 2)),
    ]
    assert all(p["peak_bytes"] > 10e6 and p["seconds"] > 0 for p in found["points"])
    assert found["points"][1]["pixels"] > 3.9 * found["points"][0]["pixels"]
    assert found["left_out"]["4 megapixels"] == "left out by --max-megapixels 0.1"
    assert found["left_out"]["50 images"] == "left out by --max-images 10"
    assert found["held_bytes_per_pixel"]["float32"] == 3 + 4 + 4
    assert "round 1 of 1, 2 images" in capsys.readouterr().err
