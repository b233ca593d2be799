"""``python -m cellseg_benchmarks pipeline``: image sets in every format, cold and warm runs, the three files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import FakeWorker
from PIL import Image
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.engine import limits
from cellseg_benchmarks.engine.limits import Limit, Limits
from cellseg_benchmarks.folder import subject, throughput
from cellseg_benchmarks.folder.throughput import (
    PipelineReport,
    Run,
    Settings,
    measure_pipeline,
    shares_of,
    summarise,
)
from cellseg_benchmarks.harness import images as image_set
from cellseg_benchmarks.harness.timer import Times
from cellseg_benchmarks.options import Engine, Scale
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import DataError, NothingToDoError, UsageError
from cellseg_deploy.images.read import read_image

ENGINE = {"model": "stub", "engine": "onnxruntime fp32 on cpu", "threads": {"engine": None, "helpers": 2}}


def picture(shade: int, hw: tuple[int, int] = (30, 40)) -> Any:
    image = np.full((*hw, 3), shade, np.uint8)
    image[5:10, 5:15] = (200, 10, 100)
    return image


# ---------------------------------------------------------------------------------------------------------- image sets


def test_a_set_repeats_its_images_in_every_format(tmp_path: Path) -> None:
    images = [picture(50), picture(90, (20, 20))]
    folders, sizes = image_set.write_set(tmp_path, images, ["png", "jpg", "tif"], 3)
    assert sizes == [(30, 40), (20, 20), (30, 40)]
    for name, folder in folders.items():
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == [f"image-{k:05d}.{name}" for k in range(3)]
        with Image.open(files[0]) as opened:
            assert opened.format == {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[name]
        for file, image in zip(files, (*images, images[0]), strict=True):
            read = read_image(file).pixels_hwc
            if name == "jpg":
                assert np.abs(read.astype(int) - image).mean() < 8
            else:
                assert np.array_equal(read, image)
    with pytest.raises(NothingToDoError):
        image_set.write_set(tmp_path / "empty", [], ["png"], 3)
    with pytest.raises(UsageError, match="unknown image format 'bmp'"):
        image_set.encoded(images[0], "bmp")


def test_sizes_keep_below_what_was_asked_for() -> None:
    for megapixels in (0.1, 1, 4, 16, 64, 256):
        height, width = image_set.size_for(megapixels)
        assert 0.995 * megapixels * 1e6 < height * width <= megapixels * 1e6
        assert width / height == pytest.approx(4 / 3, rel=0.01)
    for size in (0, -1, float("nan"), 1e6):
        with pytest.raises(UsageError, match="cannot be made"):
            image_set.check_size(size)


def test_a_large_image_is_mirrored_and_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_set, "_STRIP_ROWS", 7)
    small = np.random.default_rng(0).integers(0, 255, (5, 4, 3)).astype(np.uint8)
    image_set.write_mirrored(tmp_path / "large.tif", small, (17, 11))
    large = read_image(tmp_path / "large.tif").pixels_hwc
    assert large.shape == (17, 11, 3)
    both = np.concatenate([small, small[::-1]])
    both = np.concatenate([both, both[:, ::-1]], axis=1)
    assert np.array_equal(large, np.tile(both, (2, 2, 1))[:17, :11])
    assert image_set.reflected(7, 3).tolist() == [0, 1, 2, 2, 1, 0, 0]


# ---------------------------------------------------------------------------------------------------------------- runs


def answered(wall: float = 2.0) -> dict[str, Any]:
    return {
        "seconds": wall + 0.5,
        "wall_seconds": wall,
        "engine_seconds": 0.8 * wall,
        "stage_seconds": {"network": 0.8 * wall, "read": 0.5 * wall},
        "images": 4,
        "cells": 100,
    }


def test_cold_and_warm_runs_take_turns_by_format(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("png", "tif")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "x").touch()
    opened: list[Any] = []

    def start(kind: str, arguments: dict[str, Any]) -> Any:
        assert kind == "folder"
        assert arguments["threads"] == 3
        assert arguments["settings"]["path"] == str(model)
        assert (arguments["settings"]["streams"], arguments["settings"]["scale"]) == (2, 0.5)
        assert arguments["save"] == ["labels", "overlays"]
        opened.append(FakeWorker({}, ENGINE, lambda paths: answered()))
        return opened[-1]

    model = tmp_path / "net.onnx"
    model.touch()
    settings = Settings(model, rounds=2, warm=2, threads=3, engine=Engine(streams=2), scale=Scale(0.5))
    runs, engine, evicted = measure_pipeline(folders, settings, tmp_path, start=start)
    assert engine == ENGINE
    assert evicted == hasattr(throughput.os, "posix_fadvise")
    assert [(r.file_format, r.round, r.state) for r in runs] == [
        *[("png", 0, "cold"), ("png", 0, "warm"), ("png", 0, "warm")],
        *[("tif", 0, "cold"), ("tif", 0, "warm"), ("tif", 0, "warm")],
        *[("png", 1, "cold"), ("png", 1, "warm"), ("png", 1, "warm")],
        *[("tif", 1, "cold"), ("tif", 1, "warm"), ("tif", 1, "warm")],
    ]
    assert all(worker.closed for worker in opened)
    assert len(opened) == 4  # a process for each cold run
    assert {run.seconds for run in runs if run.state == "warm"} == {2.5}
    cold = runs[0]
    assert cold.seconds < 2  # of the parent's watch, not what the worker says
    assert 0 <= cold.start_seconds <= cold.seconds


def make_run(state: Any, seconds: float, name: str = "png", **more: Any) -> Run:
    values: dict[str, Any] = {
        "file_format": name,
        "round": 0,
        "state": state,
        "seconds": seconds,
        "start_seconds": 0.0,
        "wall_seconds": seconds,
        "engine_seconds": seconds / 2,
        "stage_seconds": {"read": seconds, "network": seconds / 2},
        "images": 10,
        "cells": 7,
    }
    return Run(**(values | more))


def test_summaries_are_medians() -> None:
    runs = [make_run("warm", s) for s in (1.0, 2.0, 9.0)] + [
        make_run("cold", 20.0, start_seconds=4.0, wall_seconds=16.0)
    ]
    cold, warm = summarise(runs, megapixels=4.0)
    assert (cold.state, warm.state, warm.runs) == ("cold", "warm", 3)
    assert (warm.seconds, warm.images_per_second, warm.seconds_per_image) == (2.0, 5.0, 0.2)
    assert warm.seconds_per_megapixel == 0.5
    assert warm.engine_busy == 0.5
    assert warm.stage_shares == {"read": 1.0, "network": 0.5}
    assert cold.start_seconds == 4.0
    assert cold.stage_shares["read"] == 1.25  # stages overlap


def test_rates_beside_the_limits() -> None:
    """4 images of 56 x 100 px in tiles of 56 with a halo of 8: 3 tiles each at scale 1, of 3 TFLOP."""
    times = Times((0.5,), 1, 0.5)
    limits = Limits([
        Limit("gemm", "fp32", "numpy", "cpu", 2e12, times),
        Limit("gemm", "bf16", "numpy", "cpu", 9e12, times),
        Limit("read", "png", "one thread", "cpu", 1e6, times),
    ])  # fmt: skip
    engine = ENGINE | {"scale": 1.0, "tile_size": 56, "halo": 8, "precision": "fp32", "device": "cpu"}
    runs = [
        make_run("warm", 8.0, stage_seconds={"read": 0.0224}),
        make_run("cold", 99.0),
        make_run("cold", 16.0, name="tif", stage_seconds={"read": 0.0112}),
    ]
    png, tif = shares_of(runs, [(56, 100)] * 4, engine, limits, 3 * 10**12)
    assert (png.read_rate, png.read_limit, png.read_share) == (pytest.approx(1), 2, pytest.approx(0.5))
    assert (png.tflops, png.peak_tflops) == (pytest.approx(9), pytest.approx(4))  # 36 TFLOP in the 4 s that it ran
    assert png.peak_share == pytest.approx(2.25)
    assert (tif.read_rate, tif.read_limit, tif.read_share) == (pytest.approx(2), None, None)
    (unknown,) = shares_of(runs[:1], [(56, 100)] * 4, engine | {"precision": "fp16"}, limits, None)
    assert (unknown.tflops, unknown.peak_tflops, unknown.peak_share) == (None, None, None)


def test_a_failed_image_fails_the_measurement(tmp_path: Path, onnx_file: Callable[..., Path]) -> None:
    """A run without it would be another, smaller job."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(picture(200)).save(folder / "a.png")
    made = subject.subject({"path": str(onnx_file())}, 1, str(tmp_path), timed=str(folder))
    answer = made.questions["run"]([str(folder)])
    assert (answer["images"], answer["wall_seconds"] > 0) == (1, True)
    made.calls["folder"]()
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 2 images failed"):
        made.questions["run"]([str(folder)])
    made.close()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("run-")]


def test_the_command_leaves_three_files(
    tmp_path: Path,
    onnx_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnxruntime")
    facts = {"library": "x", "device": "cpu", "work": {"read png": 1e6, "gemm fp32": 1e9}, "kernels": {}, "missing": {}}
    monkeypatch.setattr(limits, "Worker", lambda *_, **__: FakeWorker({"read png": 0.5, "gemm fp32": 0.5}, facts))
    Image.fromarray(picture(200, (90, 120))).save(tmp_path / "given.png")
    out = tmp_path / "out"
    arguments = [
        *("pipeline", str(tmp_path / "given.png"), "--model", str(onnx_file()), "-o", str(out), "--images", "3"),
        *("--formats", "png,tif", "--rounds", "1", "--warm", "1", "--threads", "1", "--save", "labels"),
    ]
    assert run(cli.command, arguments) == 0
    found = written_report(out, "pipeline", PipelineReport)
    assert (found["benchmark"], found["report_version"], found["images_from"]) == ("pipeline", 1, "given images")
    assert found["megapixels"] == pytest.approx(3 * 90 * 120 / 1e6)
    assert [(r["file_format"], r["state"], r["images"]) for r in found["runs"]] == [
        *(("png", "cold", 3), ("png", "warm", 3), ("tif", "cold", 3), ("tif", "warm", 3)),
    ]
    for one in found["runs"]:
        assert one["cells"] == 3  # a dark rectangle in each
        assert {"read", "network", "label", "write"} <= one["stage_seconds"].keys()
        assert 0 < one["engine_seconds"] < one["wall_seconds"] <= one["seconds"]
    assert found["engine"]["engine"] == "onnxruntime fp32 on cpu"
    assert [(x["file_format"], x["read_limit"]) for x in found["shares"]] == [("png", 2.0), ("tif", None)]
    assert all(x["tflops"] > 0 and x["peak_tflops"] == pytest.approx(0.002) for x in found["shares"])
    assert str(tmp_path) not in (out / "pipeline.json").read_text()
    assert "warm" in capsys.readouterr().err
