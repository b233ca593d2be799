"""Everything that needs a GPU, tried once, for whoever has the first one: ``scripts/gpu-check``.

Builds every form of a model, compares each with the gate, runs the GPU tests, times what was made, and writes one JSON
and one Markdown file to paste into a bug report. Each step is a process of its own, so that a crash in a driver is a
row in the table and not the end. A step that cannot run here says so and why; nothing is reported that was not run.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import click

from cellseg_deploy.cli import _common
from cellseg_deploy.errors import BackendUnavailableError, CellsegError, ModelError, OutputError
from cellseg_deploy.outputs.atomic import make_folder, write_bytes

Status = Literal["passed", "failed", "skipped"]
REPORT_VERSION = 1
NO_GPU = "no GPU: skipped"
_PACKAGES = (
    *("cellseg-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
    *("cuda-bindings", "torch"),
)
_TAIL = 30
_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code (negative: killed by that signal), what it printed, how long it took."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One thing to try. ``command``: arguments after the Python. ``makes``: file it leaves if it succeeds.
    ``needs``: files of earlier steps."""

    name: str
    command: tuple[str, ...]
    needs_gpu: bool
    makes: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of a step. ``detail``: why it failed or was skipped, in one line. ``log``: its last words."""

    name: str
    status: Status
    seconds: float
    detail: str = ""
    command: str = ""
    log: str = ""


@dataclass(frozen=True)
class Report:
    """The whole check. ``gpu``: facts of the GPU, empty without one; ``gpu_problem``: why there is none."""

    machine: dict[str, Any]
    gpu: dict[str, Any]
    gpu_problem: str
    model: str
    results: tuple[Result, ...]
    latency: tuple[dict[str, Any], ...] = ()
    report_version: int = field(default=REPORT_VERSION, kw_only=True)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the steps that failed."""
        return tuple(result.name for result in self.results if result.status == "failed")

    def to_json(self) -> bytes:
        """Indented JSON, ending in a newline."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    def to_markdown(self) -> str:
        """Tables of machine, steps and latency, and the logs of what failed."""
        lines = ["# gpu-check", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in self.machine.items()]
        lines += [f"| {key} | {_cell(value)} |" for key, value in self.gpu.items()]
        if self.gpu_problem:
            lines.append(f"| GPU | none: {_cell(self.gpu_problem)} |")
        lines += [f"| model | {_cell(self.model)} |", "", "| step | result | s | |", "|---|---|---|---|"]
        lines += [f"| {r.name} | {r.status} | {r.seconds:.1f} | {_cell(r.detail)} |" for r in self.results]
        lines += ["", "| form | engine | device | batch | ms a tile |", "|---|---|---|---|---|"]
        lines += [f"| {x['form']} | {x['backend']} | {x['device']} | {x['batch']} | {x['ms']} |" for x in self.latency]
        for result in self.results:
            if result.status == "failed":
                lines += ["", f"## {result.name}", "", f"`{result.command}`", "", "```", result.log, "```"]
        return "\n".join(lines) + "\n"


Run = Callable[[Sequence[str]], Outcome]


def steps_for(model: Path, out: Path) -> list[Step]:
    """What to try with ``model``, in order; files go to ``out``."""
    made = ("fp16.onnx", "model.xml", "fp16.engine", "fp32.engine")
    half, openvino, engine, engine32 = (str(out / name) for name in made)
    fp32 = ("--precision", "fp32")
    export = ("-c", "from cellseg_export.cli import main; main()")
    verify = (*export, "verify", str(model))
    return [
        Step("FP16 ONNX", (*export, "onnx", str(model), "-o", half, "--precision", "fp16"), False, half),
        Step("OpenVINO", (*export, "openvino", str(model), "-o", openvino), False, openvino),
        Step("TensorRT-RTX builds ahead of time", (*export, "tensorrt", str(model), "--check-only"), False),
        Step("ONNX Runtime CUDA, fp32", (*verify, str(model), "--device", "cuda"), True),
        Step("ONNX Runtime CUDA, fp16", (*verify, half, "--device", "cuda"), True, needs=(half,)),
        Step("TensorRT engine, fp16", (*export, "tensorrt", str(model), "-o", engine), True, engine),
        Step("TensorRT engine, fp32", (*export, "tensorrt", str(model), "-o", engine32, *fp32), True, engine32),
        Step("GPU tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), True),
    ]


def latency_cases(model: Path, out: Path, *, gpu: bool) -> list[tuple[str, Path, dict[str, Any]]]:
    """Forms to time: name, file, arguments of ``open_backend``."""
    cases: list[tuple[str, Path, dict[str, Any]]] = [
        ("onnx fp32", model, {"backend": "onnxruntime", "device": "cpu"}),
        ("openvino fp32", model, {"backend": "openvino", "device": "cpu"}),
    ]
    on_gpu: list[tuple[str, Path, dict[str, Any]]] = [
        ("onnx fp32", model, {"backend": "onnxruntime", "device": "cuda"}),
        ("onnx fp16", out / "fp16.onnx", {"backend": "onnxruntime", "device": "cuda"}),
        (
            "onnx fp16, TensorRT provider",
            out / "fp16.onnx",
            {"backend": "onnxruntime", "device": "cuda", "ort_provider": "tensorrt"},
        ),
        ("engine fp32", out / "fp32.engine", {"backend": "tensorrt", "device": "cuda"}),
        ("engine fp16", out / "fp16.engine", {"backend": "tensorrt", "device": "cuda"}),
    ]
    return cases + on_gpu if gpu else cases


def run_step(step: Step, run: Run, *, gpu_problem: str) -> Result:
    """Try ``step``; a GPU step without a GPU, or one whose files are missing, is skipped."""
    command = " ".join(("python", *step.command))
    if step.needs_gpu and gpu_problem:
        return Result(step.name, "skipped", 0.0, f"{NO_GPU} ({gpu_problem})", command)
    missing = [name for name in step.needs if not Path(name).is_file()]
    if missing:
        return Result(step.name, "skipped", 0.0, f"an earlier step did not make {', '.join(missing)}", command)
    outcome = run(step.command)
    text = "\n".join(part for part in (outcome.out.strip(), outcome.err.strip()) if part)
    log = "\n".join(text.splitlines()[-_TAIL:])
    if outcome.code == BackendUnavailableError.exit_code:
        return Result(step.name, "skipped", outcome.seconds, _last_error(outcome.err), command, log)
    if outcome.code != 0:
        reason = f"exit code {outcome.code}: {_last_error(outcome.err or outcome.out)}"
        return Result(step.name, "failed", outcome.seconds, reason, command, log)
    if step.makes and not Path(step.makes).is_file():
        return Result(step.name, "failed", outcome.seconds, f"ended well, but {step.makes} is missing", command, log)
    return Result(step.name, "passed", outcome.seconds, "", command, log)


def run_python(arguments: Sequence[str], *, timeout: float = _TIMEOUT) -> Outcome:
    """Run this Python with ``arguments``; ends it after ``timeout`` seconds."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(-9, "", f"ended after {timeout:.0f} s without an answer", timeout)
    return Outcome(done.returncode, done.stdout, done.stderr, time.perf_counter() - started)


def measure_latency(name: str, file: Path, settings: dict[str, Any], batches: Sequence[int] = (1, 8)) -> Any:
    """Rows of the latency table for one form; a form that cannot run gives one row with the reason for its time."""
    from cellseg_deploy.backends import open_backend
    from cellseg_deploy.parity import middle_tile
    from cellseg_export.record import time_backend
    from cellseg_export.verify import sample_images

    row = {"form": name, "backend": settings["backend"], "device": settings["device"]}
    if not file.is_file():
        return [row | {"batch": "-", "ms": "not run: the form was not made"}]
    try:
        with open_backend(file, **settings) as backend:
            _, image_hwc = next(sample_images(backend.spec, 1).load())
            tile = middle_tile(backend, image_hwc)
            return [row | {"batch": n, "ms": time_backend(backend, tile, batch_size=n).ms_per_tile} for n in batches]
    except CellsegError as error:
        return [row | {"batch": "-", "ms": f"not run: {_one_line(str(error))}"}]


def describe_machine() -> dict[str, Any]:
    """System, processor, Python, and versions of what takes part."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"system": platform.platform(), "python": platform.python_version(), **versions}


def describe_gpu() -> tuple[dict[str, Any], str]:
    """Facts of the first GPU, or none and the reason."""
    from cellseg_deploy.backends.cuda_runtime import Cuda
    from cellseg_deploy.backends.tensorrt import driver_version

    try:
        gpu = Cuda(0).gpu
    except CellsegError as error:
        return {}, _one_line(str(error))
    return asdict(gpu) | {"driver": driver_version()}, ""


def check(model: Path, out: Path, *, run: Run = run_python, say: Callable[[str], None] = lambda _: None) -> Report:
    """Run all steps for ``model`` and time what can be timed. Raises ``OutputError``."""
    gpu, problem = describe_gpu()
    say(f"GPU: {gpu.get('name') or 'none (' + problem + ')'}")
    results = []
    for step in steps_for(model, out):
        say(f"{step.name} ...")
        result = run_step(step, run, gpu_problem=problem)
        say(f"{step.name}: {result.status}{f', {result.detail}' if result.detail else ''}")
        results.append(result)
    latency: list[dict[str, Any]] = []
    for name, file, settings in latency_cases(model, out, gpu=not problem):
        say(f"timing {name}, {settings['backend']} on {settings['device']} ...")
        latency += measure_latency(name, file, settings)
    return Report(describe_machine(), gpu, problem, model.name, tuple(results), tuple(latency))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model to try (.onnx, fp32).  [default: the one that ships]"
)
@click.option(
    "-o", "--output", default="gpu-check-out", show_default=True, metavar="OUT", type=click.Path(path_type=Path)
)
def command(model: Path | None, output: Path) -> int:
    """Try everything that needs a GPU and write OUT/gpu-check.md and OUT/gpu-check.json."""
    if model is None:
        from cellseg_deploy.models import default_model_path

        model = default_model_path()
    if not model.is_file():
        raise ModelError(f"{model}: no such file; give an .onnx model with --model")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: not a folder; choose another -o")
    make_folder(output)
    report = check(model.resolve(), output.resolve(), say=lambda text: click.echo(_common.printable(text), err=True))
    write_bytes(output / "gpu-check.json", report.to_json())
    write_bytes(output / "gpu-check.md", report.to_markdown().encode())
    click.echo(report.to_markdown())
    click.echo(f"Paste {output / 'gpu-check.md'} into a bug report, or attach {output / 'gpu-check.json'}.", err=True)
    return ModelError.exit_code if report.failed else _common.EXIT_OK


def main() -> None:
    """Entry point of ``python -m cellseg_benchmarks.gpu_check``."""
    sys.exit(_common.run(command))


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no message")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(value: Any) -> str:
    return _one_line(str(value)).replace("|", "\\|")


if __name__ == "__main__":
    main()
