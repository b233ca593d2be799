"""scripts/gpu-check: says what ran, what failed and what was skipped, and never more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import FakeCuda

from cellseg_benchmarks import gpu_check
from cellseg_benchmarks.gpu_check import (
    Form,
    Latency,
    Outcome,
    Report,
    Result,
    Step,
    forms_to_time,
    run_python,
    run_step,
    steps_for,
    time_form,
)
from cellseg_deploy.backends import EngineOptions, cuda_runtime
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError

OnnxFile = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


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
    result = run_step(Step("x", ("-c", "pass")), answering(*outcome))
    assert (result.status, result.detail, result.seconds) == (status, detail, 1.5)


def test_tests_that_were_all_skipped_passed_nothing() -> None:
    step = Step("GPU tests", (), tells=True)
    result = run_step(step, answering(0, "sss\n3 skipped, 900 deselected in 2 s"))
    assert (result.status, result.detail) == ("skipped", "3 skipped, 900 deselected in 2 s")
    result = run_step(step, answering(0, ".s\n1 passed, 1 skipped in 2 s"))
    assert (result.status, result.detail) == ("passed", "1 passed, 1 skipped in 2 s")


def test_files_between_steps(tmp_path: Path) -> None:
    file = tmp_path / "made"
    needing = Step("x", (), needs=(str(file),))
    making = Step("x", (), makes=str(file))
    assert run_step(needing, answering(0)).status == "skipped"
    assert run_step(making, answering(0)).status == "failed"
    file.write_text("")
    assert run_step(needing, answering(0)).status == "passed"
    assert run_step(making, lambda _: Outcome(file.write_text("") or 0, "", "", 1.5)).status == "passed"


@pytest.mark.parametrize(("code", "status"), [(0, "failed"), (5, "failed"), (8, "skipped")])
def test_what_an_earlier_check_left_is_not_this_one_s(tmp_path: Path, code: int, status: str) -> None:
    file = tmp_path / "fp16.onnx"
    for step in (Step("x", (), makes=str(file)), Step("x", (), makes=str(file), needs=(str(tmp_path / "none"),))):
        file.write_text("old")
        assert run_step(step, answering(code)).status in (status, "skipped")
        assert not file.exists()
    assert run_step(Step("y", (), needs=(str(file),)), answering(0)).status == "skipped"


def test_processes_are_really_run() -> None:
    outcome = run_python(["-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (outcome.code, outcome.out.strip(), outcome.err.strip()) == (3, "out", "err")
    assert run_python(["-c", "import time; time.sleep(60)"], timeout=0.5).code == -9
    assert run_python(["-c", "import os; os.abort()"]).code != 0


def test_every_form_is_tried(tmp_path: Path) -> None:
    steps = steps_for(tmp_path / "model.onnx", tmp_path)
    commands = [" ".join(step.command) for step in steps]
    for words in (
        *("--precision fp16", "--precision mixed", " openvino ", "--precision bf16", " int8 ", "--check-only"),
        *("--device cuda", "fp16.engine", "-m gpu"),
    ):
        assert any(words in command for command in commands), words
    forms = forms_to_time(tmp_path / "model.onnx", tmp_path)
    made = {step.makes for step in steps if step.makes} | {str(tmp_path / "model.onnx")}
    assert {str(form.file) for form in forms} == made
    assert len({(form.name, *form.settings.values()) for form in forms}) == 10
    assert any(form.settings.get("cuda_graph") for form in forms)
    assert all(EngineOptions(**form.settings) for form in forms)  # raises for an unknown setting


def test_a_form_on_the_gpu_is_compared_with_the_cpu(tmp_path: Path) -> None:
    """A GPU agrees with itself, whatever it computes."""
    steps = [step.command for step in steps_for(tmp_path / "model.onnx", tmp_path) if "verify" in step.command]
    assert len(steps) == 3
    for command in steps:
        assert command[command.index("--device") + 1] == "cuda"
        assert command[command.index("--reference-device") + 1] == "cpu"


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
        "gpu": {"name": "RTX A"},
        "model": "model.onnx",
        "results": (
            Result("a", "passed", 1.0),
            Result("b", "failed", 2.0, "exit code 5", "python -c x", "the log"),
            Result("c", "skipped", 0.0, "TensorRT is not installed"),
        ),
        "latency": (
            Latency("onnx fp32", "onnxruntime", "cpu", 8, 66.0, 5),
            Latency("engine fp16", "tensorrt", "cuda", note="not run: the form was not made"),
        ),
    }
    return Report(**(values | changes))


def test_report() -> None:
    report = make_report()
    text = report.to_markdown()
    for words in (
        "| name | RTX A |",
        "Linux \\| x",
        "| a | passed | 1.0 |",
        "| c | skipped | 0.0 | TensorRT is not installed |",
        "| onnx fp32 | onnxruntime | cpu | 8 | 66.0 | 5 |  |",
        "| engine fp16 | tensorrt | cuda | - | - | - | not run: the form was not made |",
        "## b",
        "the log",
    ):
        assert words in text
    assert "## c" not in text
    facts = json.loads(report.to_json())
    assert (facts["report_version"], facts["results"][1]["status"]) == (2, "failed")
    assert facts["latency"][1]["ms_per_tile"] is None


def test_only_a_whole_check_ends_well() -> None:
    passed, _, skipped = make_report().results
    timed, _ = make_report().latency
    assert make_report().exit_code == 5
    assert make_report(results=(passed, skipped)).exit_code == 8
    assert make_report(results=(passed,)).exit_code == 8
    assert make_report(results=(passed,), latency=(timed,)).exit_code == 0


def test_without_a_gpu_it_ends_at_once(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_runtime, "import_bindings", lambda: FakeCuda(gpus=()))
    assert console.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(tmp_path / "out")]) == 8
    message = capsys.readouterr().err
    assert message.startswith("error: no NVIDIA GPU can be used here")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_files(
    onnx_file: OnnxFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_runtime, "import_bindings", FakeCuda)
    quietly = {"say": print, "progress": None}
    monkeypatch.setattr(gpu_check.check, "__kwdefaults__", {"run": answering(8, err="error: no")} | quietly)
    out = tmp_path / "out"
    assert console.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(out)]) == 8
    facts = json.loads((out / "gpu-check.json").read_text())
    assert facts["gpu"]["name"] == "Fake RTX"
    assert {result["status"] for result in facts["results"]} == {"skipped"}
    assert {row["note"] for row in facts["latency"]} == {
        "not run: exit code 8: error: no",
        "not run: the form was not made",
    }
    said = capsys.readouterr()
    assert (out / "gpu-check.md").read_text() in said.out
    assert "error: failed or could not run: " in said.err
    monkeypatch.setattr(gpu_check.check, "__kwdefaults__", {"run": answering(1)} | quietly)
    assert console.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(out)]) == 5
    assert console.run(gpu_check.command, ["--model", str(tmp_path / "none.onnx"), "-o", str(out)]) == 5
    assert console.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(onnx_file())]) == 6
    assert console.run(gpu_check.command, ["--model", str(onnx_file()), "-o", str(onnx_file().parent)]) == 2
    assert onnx_file().is_file()


def test_latency_is_measured_in_a_process_of_its_own(onnx_file: OnnxFile) -> None:
    pytest.importorskip("onnxruntime")
    rows = time_form(Form("onnx fp32", onnx_file(), {"backend": "onnxruntime", "device": "cpu"}), run_python)
    assert [(row.form, row.backend, row.device, row.batch, row.note) for row in rows] == [
        ("onnx fp32", "onnxruntime", "cpu", 1, ""),
        ("onnx fp32", "onnxruntime", "cpu", 8, ""),
    ]
    assert all(row.ms_per_tile and row.calls and row.calls >= 3 for row in rows)


def test_latency_of_a_form_that_cannot_run(tmp_path: Path) -> None:
    (row,) = time_form(Form("engine", tmp_path / "x.engine", {"backend": "tensorrt", "device": "cuda"}), run_python)
    assert (row.ms_per_tile, row.note) == (None, "not run: the form was not made")
    (tmp_path / "x.onnx").write_bytes(b"")
    (row,) = time_form(Form("onnx", tmp_path / "x.onnx", {"backend": "onnxruntime", "device": "cpu"}), run_python)
    assert row.note.startswith("not run: exit code 5: error: ")
    assert "empty" in row.note
    (row,) = time_form(Form("onnx", tmp_path / "x.onnx", {"backend": "x", "device": "y"}), answering(-11))
    assert row.note == "not run: exit code -11: no message"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_script_installs_nothing_without_a_gpu(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\nexit 9\n")
    smi.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CELLSEG_PYTHON"}
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check"],
        env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (BackendUnavailableError.exit_code, "")
    assert done.stderr.startswith("error: no NVIDIA GPU can be used here")
    assert not (ROOT / ".venv-gpu").exists()


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
