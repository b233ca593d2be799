"""What the machine can do at most: rates from times, and what each library really computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import FakeWorker
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.engine import limit_subjects, limits
from cellseg_benchmarks.engine.limit_subjects import is_in_precision, products_in, subject, triad_elements
from cellseg_benchmarks.engine.limits import Limits, LimitsReport, LimitWorkers
from cellseg_benchmarks.harness.timer import Plan, interleave
from cellseg_deploy.backends.openvino import shared_core
from cellseg_deploy.cli.console import run

QUICK = Plan(rounds=2, min_seconds=0.0, settle_seconds=0.0)


def facts(library: str, work: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"library": library, "device": "cpu", "work": work, "kernels": {}, "missing": {}} | more


def measured_limits() -> Limits:
    """Two libraries and files: torch does 2 GFLOP in a millisecond, OpenVINO in half of it."""
    workers: dict[str, Any] = {
        "torch on cpu": FakeWorker({"gemm bf16": 1e-3, "gemm fp32": 4e-3, "triad": 0.1}, facts("torch 2", {
            "gemm bf16": 2e9, "gemm fp32": 2e9, "triad": 2.4e9})),
        "openvino on cpu": FakeWorker({"gemm bf16": 0.5e-3}, facts("openvino 2026", {"gemm bf16": 2e9},
                                      kernels={"gemm bf16": "brgemm_avx512_amx"},
                                      missing={"openvino 2026 gemm int8": "computed as f32"})),
        "files": FakeWorker({"read png": 0.05}, facts("one thread", {"read png": 2e6})),
    }  # fmt: skip
    found = LimitWorkers(workers, {"torch on cuda": "PyTorch finds no GPU here"})
    return found.limits(interleave(found.entries(), QUICK))


def test_rates() -> None:
    found = measured_limits()
    rates = {(x.kind, x.what, x.made_by): x.rate for x in found.rates}
    assert rates == {
        ("gemm", "bf16", "torch 2"): pytest.approx(2.0),  # TFLOP/s
        ("gemm", "fp32", "torch 2"): pytest.approx(0.5),
        ("triad", "", "torch 2"): pytest.approx(24.0),  # GB/s
        ("gemm", "bf16", "openvino 2026"): pytest.approx(4.0),
        ("read", "png", "one thread"): pytest.approx(40.0),  # MP/s
    }
    assert all(x.best == pytest.approx(x.rate) for x in found.rates)


def test_the_peak_is_that_of_the_fastest_library_on_that_device() -> None:
    found = measured_limits()
    peak = found.peak("bf16")
    assert peak is not None
    assert (peak.made_by, peak.kernel) == ("openvino 2026", "brgemm_avx512_amx")
    assert found.peak("int8") is None
    assert found.peak("bf16", "cuda") is None


# ------------------------------------------------------------------------------------------------------ in the worker


def test_numpy_multiplies_matrices() -> None:
    made = subject("numpy", "cpu", 16, None)
    assert made.facts["work"] == {"gemm fp32": 2 * 16**3}
    assert np.shape(made.calls["gemm fp32"]()) == (16, 16)


def test_files_are_read_and_written() -> None:
    made = subject("files", "cpu", 0, None)
    assert list(made.calls) == [
        *("read png", "read jpg", "read tif"),
        *("write label TIFF in memory", "write label TIFF to disk"),
    ]
    assert set(made.facts["work"].values()) == {1200.0 * 1600.0}
    for call in made.calls.values():
        call()
    made.close()


def test_openvino_multiplies_in_the_precision_asked_for() -> None:
    pytest.importorskip("openvino")
    made = subject("openvino", "cpu", 64, 1)
    assert "gemm fp32" in made.calls
    for name, words in (("gemm bf16", ("bf16",)), ("gemm int8", ("int8", "I8", "i8", "u8", "vnni"))):
        if name in made.calls:
            assert any(word in made.facts["kernels"][name] for word in words), made.facts["kernels"]
        else:
            assert any(name in missing for missing in made.facts["missing"])
    assert made.facts["work"]["gemm fp32"] == limit_subjects.CHAIN * 2 * 64**3


def test_the_account_of_a_compiled_chain() -> None:
    ov = pytest.importorskip("openvino")
    core = shared_core()
    for quantised, precision in ((False, "fp32"), (True, "int8")):
        compiled = core.compile_model(
            limit_subjects._chain(ov, 64, quantised=quantised), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        kernels = products_in(compiled)
        assert len(kernels) == limit_subjects.CHAIN
        assert is_in_precision(kernels, precision), kernels


def test_a_chain_that_fell_back_is_no_limit() -> None:
    assert is_in_precision(["a/bf16", "b/bf16"], "bf16")
    assert not is_in_precision(["a/bf16", "b/f32"], "bf16")
    assert not is_in_precision([], "fp32")
    assert is_in_precision(["brgemm/u8"], "int8")
    assert not is_in_precision(["gemm/f32"], "int8")


def test_torch_has_every_precision_and_the_triad() -> None:
    pytest.importorskip("torch")
    made = subject("torch", "cpu", 32, None)
    assert {"gemm fp32", "gemm bf16", "triad"} <= set(made.calls)
    x = made.calls["triad"]()
    assert float(x[0]) == 4.0  # type: ignore[index]
    elements = x.numel()  # type: ignore[attr-defined]
    assert made.facts["work"]["triad"] == 24 * elements


def test_the_triad_leaves_the_cache_and_spares_the_memory() -> None:
    assert triad_elements(16 * 2**30, on_cpu=False) == 64 * 2**20 // 8
    assert triad_elements(2**20, on_cpu=True) == 2**16 // 8


def test_the_command_leaves_three_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "LIBRARIES", {"cpu": ("numpy",), "cuda": ()})
    started: list[str] = []
    real: Callable[..., Any] = limits.Worker

    def start(kind: str, arguments: dict[str, Any], threads: int | None) -> Any:
        started.append(arguments["part"])
        if arguments["part"] == "files":
            return FakeWorker({"read png": 0.05}, facts("one thread", {"read png": 2e6}))
        return real(kind, arguments, threads=threads)

    monkeypatch.setattr(limits, "Worker", start)
    out = tmp_path / "out"
    arguments = [
        "limits",
        "-o",
        str(out),
        "--rounds",
        "2",
        "--settle",
        "0",
        "--min-seconds",
        "0",
        "--matrix-size",
        "32",
    ]
    assert run(cli.command, arguments) == 0
    found = written_report(out, "limits", LimitsReport)
    assert (found["benchmark"], found["report_version"]) == ("limits", 1)
    assert found["limits"]["rates"][0]["times"]["seconds"]
    assert len(found["limits"]["rates"][0]["times"]["seconds"]) == 2
    assert {"machine", "before", "after"} <= found["conditions"].keys()
    assert "round 2 of 2" in capsys.readouterr().err
    assert run(cli.command, arguments) == 6  # there is something already
    assert started == ["numpy", "files"]
