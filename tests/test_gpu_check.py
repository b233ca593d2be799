"""scripts/gpu-check: says what ran, what failed and what was skipped, and never more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cellseg_benchmarks import gpu_check
from cellseg_benchmarks.gpu_check import Outcome, Report, Result, Step, latency_cases, run_python, run_step, steps_for
from cellseg_deploy.cli import _common

OnnxFile = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent


def answering(code: int, out: str = "", err: str = "") -> gpu_check.Run:
    return lambda _: Outcome(code, out, err, 1.5)


@pytest.mark.parametrize(
    ("outcome", "status", "detail"),
    [
        ((0, "fine", ""), "passed", ""),
        ((8, "", "error: TensorRT is not installed"), "skipped", "error: TensorRT is not installed"),
        ((5, "", "remark\nerror: parity failed\n  - counts"), "failed", "exit code 5: error: parity failed"),
        ((-11, "", ""), "failed", "exit code -11: no message"),
    ],
)
def test_how_a_step_ends(outcome: tuple[int, str, str], status: str, detail: str) -> None:
    result = run_step(Step("x", ("-c", "pass"), needs_gpu=False), answering(*outcome), gpu_problem="none here")
    assert (result.status, result.detail, result.seconds) == (status, detail, 1.5)


def test_a_gpu_step_without_a_gpu_is_not_run() -> None:
    def never(_: Sequence[str]) -> Outcome:
        raise AssertionError

    result = run_step(Step("x", (), needs_gpu=True), never, gpu_problem="no driver")
    assert (result.status, result.detail) == ("skipped", "no GPU: skipped (no driver)")


def test_files_between_steps(tmp_path: Path) -> None:
    file = tmp_path / "made"
    needing = Step("x", (), needs_gpu=False, needs=(str(file),))
    making = Step("x", (), needs_gpu=False, makes=str(file))
    assert run_step(needing, answering(0), gpu_problem="").status == "skipped"
    assert run_step(making, answering(0), gpu_problem="").status == "failed"
    file.write_text("")
    assert run_step(needing, answering(0), gpu_problem="").status == "passed"
    assert run_step(making, answering(0), gpu_problem="").status == "passed"


def test_processes_are_really_run() -> None:
    outcome = run_python(["-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (outcome.code, outcome.out.strip(), outcome.err.strip()) == (3, "out", "err")
    assert run_python(["-c", "import time; time.sleep(60)"], timeout=0.5).code == -9
    assert run_python(["-c", "import os; os.abort()"]).code != 0


def test_every_form_is_tried(tmp_path: Path) -> None:
    steps = steps_for(tmp_path / "model.onnx", tmp_path)
    commands = [" ".join(step.command) for step in steps]
    for words in ("--precision fp16", "openvino", "--check-only", "--device cuda", "fp16.engine", "-m gpu"):
        assert any(words in command for command in commands)
    assert {step.needs_gpu for step in steps if "engine" in step.name} == {True}
    assert {settings["device"] for _, _, settings in latency_cases(tmp_path, tmp_path, gpu=False)} == {"cpu"}
    assert len(latency_cases(tmp_path, tmp_path, gpu=True)) == 7


def test_the_commands_exist(tmp_path: Path) -> None:
    """Words of the steps are those the commands really have."""
    from cellseg_export.cli import command as export

    for step in steps_for(tmp_path / "model.onnx", tmp_path):
        if step.command[0] != "-c":
            continue
        name, *arguments = step.command[2:]
        found = export.get_command(None, name)  # type: ignore[arg-type]
        assert found is not None, name
        options = {word for parameter in found.params for word in parameter.opts}
        assert {word for word in arguments if word.startswith("-")} <= options, step.name


def make_report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "machine": {"system": "Linux | x"},
        "gpu": {},
        "gpu_problem": "no driver",
        "model": "model.onnx",
        "results": (
            Result("a", "passed", 1.0),
            Result("b", "failed", 2.0, "exit code 5", "python -c x", "the log"),
            Result("c", "skipped", 0.0, "no GPU: skipped (no driver)"),
        ),
        "latency": ({"form": "onnx fp32", "backend": "onnxruntime", "device": "cpu", "batch": 8, "ms": 66.0},),
    }
    return Report(**(values | changes))


def test_report() -> None:
    report = make_report()
    assert report.failed == ("b",)
    text = report.to_markdown()
    for words in (
        "| GPU | none: no driver |",
        "Linux \\| x",
        "| a | passed | 1.0 |",
        "| c | skipped | 0.0 | no GPU: skipped (no driver) |",
        "| onnx fp32 | onnxruntime | cpu | 8 | 66.0 |",
        "## b",
        "the log",
    ):
        assert words in text
    assert "## c" not in text
    facts = json.loads(report.to_json())
    assert (facts["report_version"], facts["results"][1]["status"]) == (1, "failed")


def test_the_command_writes_both_files(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: ({}, "no driver"))
    monkeypatch.setattr(gpu_check.check, "__kwdefaults__", {"run": answering(8, err="error: no"), "say": print})
    monkeypatch.setattr(gpu_check, "measure_latency", lambda *_: [])
    out = tmp_path / "out"
    assert _common.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(out)]) == 0
    facts = json.loads((out / "gpu-check.json").read_text())
    assert {result["status"] for result in facts["results"]} == {"skipped"}
    assert (out / "gpu-check.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(gpu_check.check, "__kwdefaults__", {"run": answering(1), "say": print})
    assert _common.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(out)]) == 5
    assert _common.run(gpu_check.command, ["--model", str(tmp_path / "none.onnx"), "-o", str(out)]) == 5
    assert _common.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(onnx_file())]) == 6


def test_latency_of_a_form_that_is_not_there(tmp_path: Path) -> None:
    (row,) = gpu_check.measure_latency("engine", tmp_path / "x.engine", {"backend": "tensorrt", "device": "cuda"})
    assert row["ms"] == "not run: the form was not made"
    (tmp_path / "x.onnx").write_bytes(b"")
    (row,) = gpu_check.measure_latency("onnx", tmp_path / "x.onnx", {"backend": "onnxruntime", "device": "cpu"})
    assert row["ms"].startswith("not run: ")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_script_uses_the_environment_it_is_given(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check", "--model", "x.onnx"],
        env=os.environ | {"CELLSEG_PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-m cellseg_benchmarks.gpu_check --model x.onnx\n"
