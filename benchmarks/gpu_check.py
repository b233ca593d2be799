"""Try everything that needs a GPU once, for the first user who has one: ``scripts/gpu-check``.

Builds every form of a model, compares each with the gate, runs the GPU tests, times the results, and writes one JSON
and one Markdown file to paste into a bug report. Each step and each timing is a process of its own, so that a crash in
a driver is a row in the table and does not end the check. Anything that cannot run here is listed with the reason;
only what was run is reported. Without a GPU the check ends at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.machine import describe_machine
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.timer import Plan, interleave, stopwatch, turn_of
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, OutputError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes, writing

Status = Literal["passed", "failed", "skipped"]
REPORT_VERSION = 2
BATCHES = (1, 8)
PLAN = Plan(rounds=20, settle_seconds=0.0, budget_seconds=6.0)
_EXPORT = ("-c", "from cellseg_export.cli import main; main()")
_TIME = ("-c", "from cellseg_benchmarks.gpu_check import time_main; time_main()")
_TESTS = Path(__file__).resolve().parent.parent / "tests"
_TAIL = 30
_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Outcome:
    """Result of a process: exit code (negative: killed by that signal), output, duration."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step to try. ``command``: arguments after the Python. ``makes``: file it leaves on success.
    ``needs``: files of earlier steps. ``tells``: it is pytest, whose last line reports what ran."""

    name: str
    command: tuple[str, ...]
    makes: str = ""
    needs: tuple[str, ...] = ()
    tells: bool = False


@dataclass(frozen=True)
class Result:
    """Result of a step. ``detail``: why it failed or was skipped, in one line. ``log``: end of its output."""

    name: str
    status: Status
    seconds: float
    detail: str = ""
    command: str = ""
    log: str = ""


@dataclass(frozen=True)
class Form:
    """A form to time: its name, its file, and arguments of ``open_backend``."""

    name: str
    file: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class Latency:
    """A row of the latency table. ``ms_per_tile``: median over ``calls`` turns with ``batch`` tiles per call, host to
    host; None if nothing was timed, and ``note`` gives the reason."""

    form: str
    backend: str
    device: str
    batch: int | None = None
    ms_per_tile: float | None = None
    calls: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The whole check; ``gpu``: facts of the GPU."""

    machine: dict[str, Any]
    gpu: dict[str, Any]
    model: str
    results: tuple[Result, ...]
    latency: tuple[Latency, ...] = ()
    report_version: int = field(default=REPORT_VERSION, kw_only=True)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 5 if a step failed, else 8 if one could not run or a form could not be timed."""
        statuses = {result.status for result in self.results}
        if "failed" in statuses:
            return ModelError.exit_code
        incomplete = "skipped" in statuses or any(row.ms_per_tile is None for row in self.latency)
        return BackendUnavailableError.exit_code if incomplete else console.EXIT_OK

    def to_json(self) -> bytes:
        """Indented JSON, ending in a newline."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    def to_markdown(self) -> str:
        """Return tables of machine, steps and latency, and the logs of failed steps."""
        lines = ["# gpu-check", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in (self.machine | self.gpu).items()]
        lines += [f"| model | {_cell(self.model)} |", "", "| step | result | s | |", "|---|---|---|---|"]
        lines += [f"| {r.name} | {r.status} | {r.seconds:.1f} | {_cell(r.detail)} |" for r in self.results]
        lines += ["", "| form | engine | device | batch | ms per tile | calls | |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {x.form} | {x.backend} | {x.device} | {_or_dash(x.batch)} | {_or_dash(x.ms_per_tile)} | "
            f"{_or_dash(x.calls)} | {_cell(x.note)} |"
            for x in self.latency
        ]
        for result in self.results:
            if result.status == "failed":
                lines += ["", f"## {result.name}", "", f"`{result.command}`", "", "```", result.log, "```"]
        return "\n".join(lines) + "\n"


Run = Callable[[Sequence[str]], Outcome]
Say = Callable[[str], None]


def steps_for(model: Path, out: Path) -> list[Step]:
    """Steps to try with ``model``, in order; files go to ``out``. Forms on the GPU are compared with the CPU."""
    made = ("fp16.onnx", "mixed.onnx", "model.xml", "bf16.xml", "int8.xml", "fp16.engine", "fp32.engine")
    half, mixed, openvino, bf16, int8, engine, engine32 = (str(out / name) for name in made)
    verify = (*_EXPORT, "verify", "--device", "cuda", "--reference-device", "cpu", str(model))
    return [
        Step("FP16 ONNX", (*_EXPORT, "onnx", str(model), "-o", half, "--precision", "fp16"), half),
        Step("mixed ONNX", (*_EXPORT, "onnx", str(model), "-o", mixed, "--precision", "mixed"), mixed),
        Step("OpenVINO, fp32", (*_EXPORT, "openvino", str(model), "-o", openvino), openvino),
        Step("OpenVINO, bf16", (*_EXPORT, "openvino", str(model), "-o", bf16, "--precision", "bf16"), bf16),
        Step("OpenVINO, int8", (*_EXPORT, "int8", str(model), "-o", int8), int8),
        Step("TensorRT-RTX builds ahead of time", (*_EXPORT, "tensorrt", str(model), "--check-only")),
        Step("ONNX Runtime CUDA, fp32", (*verify, str(model))),
        Step("ONNX Runtime CUDA, fp16", (*verify, half), needs=(half,)),
        Step("ONNX Runtime CUDA, mixed", (*verify, mixed), needs=(mixed,)),
        Step("TensorRT engine, fp16", (*_EXPORT, "tensorrt", str(model), "-o", engine), engine),
        Step(
            "TensorRT engine, fp32",
            (*_EXPORT, "tensorrt", str(model), "-o", engine32, "--precision", "fp32"),
            engine32,
        ),
        Step("GPU tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(_TESTS)), tells=True),
    ]


def forms_to_time(model: Path, out: Path) -> list[Form]:
    """Forms of the latency table, CPU forms first."""

    def form(name: str, file: Path, backend: str, device: str = "cuda", **more: Any) -> Form:
        return Form(name, file, {"backend": backend, "device": device} | more)

    half, engine = out / "fp16.onnx", out / "fp16.engine"
    return [
        form("onnx fp32", model, "onnxruntime", "cpu"),
        form("openvino fp32", out / "model.xml", "openvino", "cpu"),
        form("openvino bf16", out / "bf16.xml", "openvino", "cpu", precision="bf16"),
        form("openvino int8", out / "int8.xml", "openvino", "cpu"),
        form("onnx fp32", model, "onnxruntime"),
        form("onnx fp16", half, "onnxruntime"),
        form("onnx mixed", out / "mixed.onnx", "onnxruntime"),
        form("engine fp32", out / "fp32.engine", "tensorrt"),
        form("engine fp16", engine, "tensorrt"),
        form("engine fp16, CUDA graph", engine, "tensorrt", cuda_graph=True),
    ]


def run_step(step: Step, run: Run) -> Result:
    """Try ``step``; it is skipped if its files are missing or its engine or device is unavailable.

    A file that an earlier check left at ``makes`` is removed first: only this check's results are compared and timed.
    """
    if step.makes:
        with writing(Path(step.makes)):
            Path(step.makes).unlink(missing_ok=True)
    command = " ".join(("python", *step.command))
    missing = [name for name in step.needs if not Path(name).is_file()]
    if missing:
        return Result(step.name, "skipped", 0.0, f"an earlier step did not make {', '.join(missing)}", command)
    outcome = run(step.command)
    text = "\n".join(part for part in (outcome.out.strip(), outcome.err.strip()) if part)

    def result(status: Status, detail: str = "") -> Result:
        return Result(step.name, status, outcome.seconds, detail, command, "\n".join(text.splitlines()[-_TAIL:]))

    if outcome.code == BackendUnavailableError.exit_code:
        return result("skipped", _last_words(outcome.err))
    if outcome.code != 0:
        return result("failed", f"exit code {outcome.code}: {_last_words(outcome.err or outcome.out)}")
    if step.makes and not Path(step.makes).is_file():
        return result("failed", f"ended well, but {step.makes} is missing")
    if not step.tells:
        return result("passed")
    words = _last_words(outcome.out)
    return result("passed" if " passed" in words else "skipped", words)  # pytest also succeeds if all were skipped


def run_python(arguments: Sequence[str], *, timeout: float = _TIMEOUT) -> Outcome:
    """Run this Python with ``arguments``; end it after ``timeout`` seconds."""
    seconds = stopwatch()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(-9, "", f"ended after {timeout:.0f} s without an answer", timeout)
    return Outcome(done.returncode, done.stdout, done.stderr, seconds())


def time_form(form: Form, run: Run) -> list[Latency]:
    """Rows of the latency table for ``form``; if it cannot run, one row with the reason instead of a time."""
    empty = Latency(form.name, form.settings["backend"], form.settings["device"])
    if not form.file.is_file():
        return [replace(empty, note="not run: the form was not made")]
    outcome = run((*_TIME, str(form.file), json.dumps(form.settings)))
    if outcome.code != 0:
        reason = _last_words(outcome.err or outcome.out)
        return [replace(empty, note=f"not run: exit code {outcome.code}: {reason}")]
    return [
        replace(empty, batch=row["batch_size"], ms_per_tile=row["ms_per_tile"], calls=row["calls"])
        for row in json.loads(outcome.out.splitlines()[-1])
    ]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("settings", type=json.loads)
def time_command(file: Path, settings: dict[str, Any]) -> None:
    """Time FILE, opened with SETTINGS, on a sample smear; one line of JSON."""
    from cellseg_benchmarks.harness.forms import sample_tiles
    from cellseg_deploy.backends import EngineOptions, open_backend

    with open_backend(file, EngineOptions(**settings)) as backend:  # returns when it is done: nothing to synchronise
        tiles = {n: sample_tiles(backend.spec, n) for n in BATCHES}
        entries = {str(n): turn_of(partial(backend.predict, batch)) for n, batch in tiles.items()}
        measured = interleave(entries, PLAN)
    if measured.failed:
        raise DataError("; ".join(measured.failed.values()))
    rows = [
        {
            "batch_size": n,
            "ms_per_tile": round(1000 * measured.times[str(n)].median / n, 4),
            "calls": len(measured.times[str(n)].seconds),
        }
        for n in BATCHES
    ]
    click.echo(json.dumps(rows))


def time_main() -> None:
    """Entry point of the process that times one form."""
    sys.exit(console.run(time_command))


def describe_gpu() -> dict[str, Any]:
    """Facts of the first GPU. Raises ``BackendUnavailableError`` without one."""
    from cellseg_deploy.backends.cuda_runtime import Cuda
    from cellseg_deploy.backends.tensorrt import driver_version

    return asdict(Cuda(0).gpu) | {"driver": driver_version()}


def check(
    model: Path,
    out: Path,
    gpu: dict[str, Any],
    *,
    run: Run = run_python,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Report:
    """Run all steps for ``model`` and time the results; steps cut off by a signal are skipped, with that reason."""
    say(f"GPU: {gpu['name']}")
    progress = progress or Progress()
    results: list[Result] = []
    latency: list[Latency] = []
    steps, forms, n_timed = steps_for(model, out), forms_to_time(model, out), 0
    names = [*(step.name for step in steps), *(f"timing of {form.name}" for form in forms)]
    with progress.stoppable(lambda: ", ".join(names[len(results) + n_timed :])):
        for step in steps:
            say(f"{step.name} ...")
            result = run_step(step, run)
            say(f"{step.name}: {result.status}{f', {result.detail}' if result.detail else ''}")
            results.append(result)
            progress.keep("results", results)
        for form in forms:
            say(f"timing {form.name}, {form.settings['backend']} on {form.settings['device']} ...")
            latency += time_form(form, run)
            n_timed += 1
            progress.keep("latency", latency)
    results += [Result(step.name, "skipped", 0.0, "stopped before it") for step in steps[len(results) :]]
    latency += [
        Latency(form.name, form.settings["backend"], form.settings["device"], note="stopped before it")
        for form in forms[n_timed:]
    ]
    return Report(describe_machine(), gpu, model.name, tuple(results), tuple(latency))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model to try (.onnx, fp32).  [default: the one that ships]"
)
@click.option(
    "-o", "--output", default="gpu-check-out", show_default=True, metavar="OUT", type=click.Path(path_type=Path)
)
def command(model: Path | None, output: Path) -> int:
    """Try everything that needs a GPU and write OUT/gpu-check.md and OUT/gpu-check.json.

    Exit codes: 0 all of it ran and passed, 5 something failed, 6 OUT cannot be written, 8 no GPU, or something could
    not run here; the table says what.
    """
    gpu = describe_gpu()
    if model is None:
        from cellseg_deploy.models import default_model_path

        model = default_model_path()
    if not model.is_file():
        raise ModelError(f"{model}: no such file; give an .onnx model with --model")
    if model.resolve().parent == output.resolve():
        raise UsageError(f"{output}: the model is in this folder, whose earlier check is removed; choose another -o")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: not a folder; choose another -o")
    make_folder(output)
    progress = shared.progress(output, "gpu-check")
    report = check(
        model.resolve(),
        output.resolve(),
        gpu,
        say=lambda text: console.say(console.printable(text)),
        progress=progress,
    )
    write_bytes(output / "gpu-check.json", report.to_json())
    write_bytes(output / "gpu-check.md", report.to_markdown().encode())
    click.echo(report.to_markdown())
    progress.finish()
    console.say(f"Paste {output / 'gpu-check.md'} into a bug report, or attach {output / 'gpu-check.json'}.")
    if report.exit_code != console.EXIT_OK:
        undone = [r.name for r in report.results if r.status != "passed"]
        undone += [f"timing of {row.form}" for row in report.latency if row.ms_per_tile is None]
        console.print_error(f"failed or could not run: {', '.join(undone)}; the page says why")
    return report.exit_code


def main() -> None:
    """Entry point of ``python -m cellseg_benchmarks.gpu_check``."""
    sys.exit(console.run(command))


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no message")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _or_dash(value: float | None) -> str:
    return "-" if value is None else str(value)


def _cell(value: Any) -> str:
    return _one_line(str(value)).replace("|", "\\|")


if __name__ == "__main__":
    main()
