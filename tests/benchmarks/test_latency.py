"""``python -m cellseg_benchmarks latency``: sittings, ratios, shares of the peak, and the three files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fakes import FakeWorker, make_conditions
from written_reports import written_report

from cellseg_benchmarks import cli
from cellseg_benchmarks.engine import latency, limits
from cellseg_benchmarks.engine.latency import LatencyReport, Row, flipped_share, measure_latency
from cellseg_benchmarks.harness.flops import Flops
from cellseg_benchmarks.harness.form_files import Network, network_of, read_verdicts
from cellseg_benchmarks.harness.forms import FORMS, Form, forms_for, gpu_bytes_in_use
from cellseg_benchmarks.harness.timer import Plan
from cellseg_benchmarks.harness.worker import Peak, WorkerError
from cellseg_benchmarks.quality.parity_table import TABLE_FILE
from cellseg_deploy.backends import cuda_runtime
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import BackendUnavailableError, ModelError, UsageError

QUICK = Plan(rounds=3, min_seconds=0.0, settle_seconds=0.0)
SECONDS = {"pytorch-fp32": 0.8, "pytorch-bf16": 0.2, "onnxruntime-fp32": 0.8, "openvino-bf16": 0.1}
CPU = [form for form in FORMS if form.device == "cpu"]


class Bench:
    """Starts fake workers; remembers which were open at a time. The answer of form number k is off in k of 4 pixels."""

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = refused
        self.started: list[tuple[str, int]] = []

    def __call__(self, network: Network, form: Form, batch: int, threads: int | None) -> Any:
        self.started.append((form.name, batch))
        if form.name in self.refused:
            raise WorkerError("the process ended with signal 9 (out of memory?)")
        wrong = list(SECONDS).index(form.name) if form.device == "cpu" else 0
        answer = np.full((1, 2, 1, 4), 0.9, np.float32)
        answer[0, 0, 0, :wrong] = 0.4
        return FakeWorker(
            {"predict": SECONDS[form.name] * batch}, {"precision": form.arithmetic}, lambda path: np.save(path, answer)
        )


@pytest.fixture
def network(tmp_path: Path) -> Network:
    """A network with every file, judged by the gate, of 0.4 TFLOP a tile."""
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"x" * 1000)
    for name in ("fp32.onnx", "fp16.onnx", "int8.xml"):
        (tmp_path / name).touch()
    verdicts = {"fp32": "passed", "openvino-bf16": "failed"}
    return Network("net", weights, tmp_path, verdicts, Flops(400_000_000_000, {}))


@pytest.fixture(autouse=True)
def fake_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1 TFLOP/s in fp32 and 8 in bf16."""

    def start(kind: str, arguments: dict[str, Any], threads: int | None) -> Any:
        work = {"gemm fp32": 1e12, "gemm bf16": 4e12}
        facts = {"library": "numpy", "device": arguments["device"], "work": work, "kernels": {}, "missing": {}}
        return FakeWorker({"gemm fp32": 1.0, "gemm bf16": 0.5}, facts)

    monkeypatch.setattr(limits, "LIBRARIES", {"cpu": ("numpy",), "cuda": ("torch",)})
    monkeypatch.setattr(limits, "Worker", start)


def measured(network: Network, bench: Bench, batches: Sequence[int] = (2,), **more: Any) -> dict[str, Row]:
    forms = more.pop("forms", [form for form in CPU if form.name in SECONDS])
    rows, _ = measure_latency([network], forms, batches, QUICK, start=bench, **more)
    return {row.form: row for row in rows if not row.again}


def test_rows_hold_ratios_and_shares(network: Network) -> None:
    rows = measured(network, Bench())
    assert list(rows) == list(SECONDS)
    eager, best, ours = rows["pytorch-fp32"], rows["pytorch-bf16"], rows["openvino-bf16"]
    assert (ours.ms_per_tile, ours.tiles_per_second) == (pytest.approx(100), pytest.approx(10))
    assert ours.times is not None
    assert ours.times.seconds == (0.2, 0.2, 0.2)  # of a call of two tiles
    assert [row.reference.median for row in rows.values() if row.reference] == pytest.approx([1, 4, 1, 8])
    assert [row.best.median for row in rows.values() if row.best] == pytest.approx([0.25, 1, 0.25, 2])
    assert {row.best_pytorch for row in rows.values()} == {"pytorch-bf16"}
    assert ours.tflops == pytest.approx(4)  # 0.4 TFLOP in 0.1 s
    assert ours.peak_tflops == pytest.approx(8)
    assert ours.share_of_peak is not None
    assert ours.share_of_peak.median == pytest.approx(0.5)
    assert eager.share_of_peak is not None
    assert eager.share_of_peak.median == pytest.approx(0.5)  # of the fp32 peak: 0.5 of 1 TFLOP/s
    assert (eager.flipped, best.flipped, ours.flipped) == (0, 0.25, 0.75)
    assert ours.largest_difference == pytest.approx(0.5)
    assert (eager.parity, best.parity, ours.parity) == ("reference", "not judged", "failed")
    assert rows["onnxruntime-fp32"].parity == "passed"
    assert ours.peak is not None


def test_memory_of_the_gpu_is_in_the_table(network: Network) -> None:
    rows = measured(network, Bench())
    row = replace(rows["openvino-bf16"], device="cuda", peak=Peak(2_000_000_000, 345_600_000))
    report = LatencyReport(make_conditions(), None, QUICK, {"net": 400.0}, (row, rows["pytorch-fp32"]), ())
    lines = report.to_markdown().splitlines()
    (head,) = [line for line in lines if line.startswith("| form |")]
    assert head.endswith("| memory, MB | GPU memory, MB |")
    assert any(line.startswith("| openvino-bf16 | cuda") and line.endswith("| 2000 | 346 |") for line in lines)
    assert any(line.startswith("| pytorch-fp32 | cpu") and line.endswith("| 100 |  |") for line in lines)
    assert "without TF32" in report.to_markdown()


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_memory_of_the_gpu_without_the_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise BackendUnavailableError("no bindings")

    monkeypatch.setattr(cuda_runtime, "import_bindings", missing)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    for said, expected in (('[ "$1" = --id=1 ] && echo 345', 345 * 2**20), ("echo [N/A]", None), ("exit 9", None)):
        program.write_text(f"#!/bin/sh\n{said}\n")
        program.chmod(0o755)
        assert gpu_bytes_in_use("cuda:1") == expected
    assert gpu_bytes_in_use("cpu") is None


def test_without_the_reference_there_is_no_ratio_to_it(network: Network) -> None:
    rows = measured(network, Bench(refused=["pytorch-fp32"]))
    assert rows["openvino-bf16"].reference is None
    assert rows["openvino-bf16"].flipped is None
    assert rows["openvino-bf16"].best is not None


def test_forms_that_do_not_fit_into_memory_sit_in_turns(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "forms_at_once", lambda *_: 3)
    bench = Bench()
    forms = [form for form in CPU if form.name in SECONDS]
    rows, found_limits = measure_latency([network], forms, [1], QUICK, start=bench)
    # Three forms, then the last one beside PyTorch's fp32 and the fastest of PyTorch.
    assert [name for name, _ in bench.started] == [
        *("pytorch-fp32", "pytorch-bf16", "onnxruntime-fp32"),
        *("pytorch-fp32", "pytorch-bf16", "openvino-bf16"),
    ]
    assert [(row.form, row.sitting, row.again) for row in rows] == [
        ("pytorch-fp32", 0, False),
        ("pytorch-bf16", 0, False),
        ("onnxruntime-fp32", 0, False),
        ("openvino-bf16", 1, False),
        ("pytorch-fp32", 1, True),
        ("pytorch-bf16", 1, True),
    ]
    assert len(found_limits) == 2
    last = rows[3]
    assert last.reference is not None
    assert last.best is not None
    assert (last.reference.median, last.best.median) == (pytest.approx(8), pytest.approx(2))


def test_flipped_pixels_are_those_of_the_foreground() -> None:
    reference = np.array([[[[0.6, 0.4, 0.5, 0.9]], [[0.9, 0.9, 0.9, 0.9]]]])
    answer = np.array([[[[0.4, 0.4, 0.6, 0.9]], [[0.1, 0.1, 0.1, 0.1]]]])
    assert flipped_share(reference, answer) == 0.25


# ---------------------------------------------------------------------------------------------------------- the files


def write_table(folder: Path, weights: Path, rows: dict[str, str]) -> None:
    table = {
        "network_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "rows": [{"form": form, "verdict": verdict} for form, verdict in rows.items()],
    }
    (folder / TABLE_FILE).write_text(json.dumps(table))


def test_verdicts_are_those_of_this_network(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"weights")
    assert read_verdicts(tmp_path, weights) == {}
    write_table(tmp_path, weights, {"fp32": "passed", "int8": "failed"})
    assert read_verdicts(tmp_path, weights) == {"fp32": "passed", "int8": "failed"}
    weights.write_bytes(b"other weights")
    with pytest.raises(UsageError, match=r"is of another network than net\.safetensors"):
        read_verdicts(tmp_path, weights)
    (tmp_path / TABLE_FILE).write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        read_verdicts(tmp_path, weights)


@pytest.fixture
def made_folder(tmp_path: Path, onnx_file: Callable[..., Path]) -> tuple[Path, Path]:
    """Weights that only PyTorch could not read, and a folder with an fp32 .onnx that passed the gate."""
    folder = tmp_path / "made"
    folder.mkdir()
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"weights")
    onnx_file().rename(folder / "fp32.onnx")
    write_table(folder, weights, {"fp32": "passed"})
    return weights, folder


def test_the_network_of_a_folder(made_folder: tuple[Path, Path]) -> None:
    network = network_of(*made_folder)
    assert network.name == "net"
    assert network.flops is not None
    assert network.flops.total == 2 * 56 * 56 * 3  # one channel from three, at each pixel
    (form,) = forms_for(["cpu"], ["onnxruntime-fp32"])
    assert (network.verdict(form), network.missing(form)) == ("passed", "")
    (int8,) = forms_for(["cpu"], ["openvino-int8"])
    assert network.missing(int8) == "int8.xml was not made"


def test_the_command_times_a_form_in_a_worker(
    made_folder: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    weights, folder = made_folder
    out = tmp_path / "out"
    arguments = [
        *("latency", str(weights), "--made", str(folder), "-o", str(out), "--forms", "onnxruntime-fp32,tensorrt-fp16"),
        *("--batch-sizes", "3", "--rounds", "2", "--settle", "0", "--min-seconds", "0", "--threads", "1"),
    ]
    assert run(cli.command, arguments) == 0
    found = written_report(out, "latency", LatencyReport)
    assert {"benchmark", "report_version", "conditions", "threads", "plan", "gflop_per_tile", "rows", "limits"} == set(
        found
    )
    cpu = found["rows"][0]
    assert (cpu["form"], cpu["device"], cpu["batch"], cpu["status"]) == ("onnxruntime-fp32", "cpu", 3, "measured")
    assert len(cpu["times"]["seconds"]) == 2
    assert cpu["details"]["details"]["threads"] == 1
    assert cpu["parity"] == "passed"
    assert cpu["peak"]["rss_bytes"] > 10e6
    assert cpu["tflops"] == pytest.approx(
        3 * found["gflop_per_tile"]["net"] / 1000 / np.median(cpu["times"]["seconds"])
    )
    if found["conditions"]["machine"]["gpu"] is None:
        assert [row["status"] for row in found["rows"][1:]] == ["not run"] * 2
        assert all(row["reason"].startswith("not yet run: ") for row in found["rows"][1:])
    assert str(tmp_path) not in (out / "latency.json").read_text()
    assert "round 2 of 2" in capsys.readouterr().err
