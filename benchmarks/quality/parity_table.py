"""Table of every form of one network, each made by one command, with the parity gate's verdict.

    network (RUN, .safetensors) --> fp32.onnx --> fp16, mixed, OpenVINO fp32 and bf16, int8: one cellseg-export each
                                                      |
                                                      +--> its parity report --> a row

A refused form is a row like the others, and so is one whose engine is missing here. Each command runs in a
process of its own: memory is released, and a crash is a row and does not end the table.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from cellseg_benchmarks import options as shared
from cellseg_benchmarks.harness.partial import Progress
from cellseg_benchmarks.harness.report import with_remark
from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.cli import console
from cellseg_deploy.errors import BackendUnavailableError, ModelError, OutputError, ParityError, UsageError
from cellseg_deploy.files.atomic import make_folder, write_bytes
from cellseg_deploy.models import default_weights_path

TASK = "counting"
TABLE_FILE, TABLE_TEXT = "parity.json", "parity.md"
REPORT_VERSION = 1

Verdict = Literal["passed", "failed", "inconclusive", "not run"]
Run = Callable[[Sequence[str]], tuple[int, str]]


@dataclass(frozen=True)
class Form:
    """One form. ``file``: output of its command. ``needs``: the file it is made from; empty for the network itself.
    ``arguments``: of ``cellseg-export``, before the files."""

    name: str
    file: str
    arguments: tuple[str, ...]
    needs: str = ""


FORMS = (
    Form("fp32", "fp32.onnx", ("onnx",)),
    Form("fp16", "fp16.onnx", ("onnx", "--precision", "fp16")),
    Form("mixed", "mixed.onnx", ("onnx", "--precision", "mixed")),
    Form("openvino-fp32", "openvino.xml", ("openvino",), needs="fp32.onnx"),
    Form("openvino-bf16", "bf16.xml", ("openvino", "--precision", "bf16"), needs="fp32.onnx"),
    Form("int8", "int8.xml", ("int8",), needs="fp32.onnx"),
)
DEFAULT_FORMS = ("fp32", "fp16", "openvino-fp32", "openvino-bf16", "int8")


@dataclass(frozen=True)
class Row:
    """Result for a form. ``figures``: summary of the report at the counting point. ``truth``: its metrics against
    the true labels, None without. ``detail``: why it was refused or not run. ``seconds``: the whole command."""

    form: str
    verdict: Verdict
    command: str
    seconds: float
    megabytes: float | None = None
    compared_with: str = ""
    policy: str = ""
    max_difference: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] | None = None
    reference_truth: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """All rows for ``network`` (its file name), on ``images``. ``gate``: arguments passed to every command."""

    network: str
    network_sha256: str
    gate: tuple[str, ...]
    images: str
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    report_version: int = REPORT_VERSION

    def to_json(self) -> bytes:
        """Indented JSON, ending in a newline; figures that were not measured are null."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def to_markdown(self) -> str:
        """Return the table, with PyTorch's own metrics as its first row, followed by the refusals and their reasons."""
        lines = [
            f"`{self.network}`, {self.images}",
            "",
            "| form | verdict | cells | F1 at IoU 0.9 | Dice to reference | largest difference | F1 to truth | "
            "Dice to truth | count error per image | MB |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        first = next((row for row in self.rows if row.compared_with == "pytorch" and row.figures), None)
        if first is not None:
            cells = first.figures["reference_cells"]
            lines.append(f"| PyTorch fp32 | reference | {cells} | | | | {_truth(first.reference_truth)} | |")
        lines += [_line(row) for row in self.rows]
        remarks = [f"- {row.form}: {text}" for row in self.rows for text in (row.detail, *row.notes) if text]
        return "\n".join([*lines, *([""] if remarks else []), *remarks]) + "\n"


def forms_named(names: Sequence[str]) -> list[Form]:
    """The forms to make for ``names``, with those they are made from, in a valid order. Raises ``UsageError``."""
    known = {form.name: form for form in FORMS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no form named {', '.join(unknown)}; there are {', '.join(known)}")
    needed = {known[name].needs for name in names}
    return [form for form in FORMS if form.name in names or form.file in needed]


def parity_table(
    network: Path,
    folder: Path,
    names: Sequence[str],
    *,
    gate: Sequence[str] = (),
    run: Run | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Table:
    """Make the forms ``names`` of ``network`` in ``folder`` (which exists) and collect the gate's verdicts.

    ``gate``: arguments for every command: images, masks, threads, tiles per call. The table is in ``folder`` after each
    form; a stopped table is resumed. Raises ``OutputError`` if the existing table was made from other inputs.
    """
    run = run or run_export
    path = folder / TABLE_FILE
    table = Table(network.name, sha256_of(network), tuple(gate), "no images", describe_machine(), ())
    done = _rows_of(path, table)
    progress = progress or Progress()
    forms = forms_named(names)
    with progress.stoppable(lambda: ", ".join(form.name for form in forms[len(table.rows) :])):
        for form in forms:
            row = done.get(form.name)
            if row is None:
                say(f"{form.name} ...")
                row = make_form(form, network, folder, gate, run)
                say(f"{form.name}: {row.verdict} after {row.seconds:.0f} s{f': {row.detail}' if row.detail else ''}")
            report = _report(form, folder) or {}
            table = replace(table, rows=(*table.rows, row), images=report.get("images_from", table.images))
            write_bytes(path, table.to_json())
            progress.keep("rows", table.rows)
    return table


def _rows_of(path: Path, table: Table) -> dict[str, Row]:
    """Rows of an earlier start of ``table`` that need not be repeated, by form."""
    if not path.is_file():
        return {}
    try:
        earlier = msgspec.json.decode(path.read_bytes(), type=Table)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise OutputError(f"{path} cannot be read ({error}); delete it, or choose another folder") from error
    for what in ("network_sha256", "gate", "machine", "report_version"):
        old, new = getattr(earlier, what), getattr(table, what)
        if old != new:
            raise OutputError(f"{path} is of another {what}: {old}, now {new}; choose another folder")
    files = {form.name: path.parent / form.file for form in FORMS}
    return {
        row.form: row
        for row in earlier.rows
        if row.verdict != "not run" and row.figures and (row.megabytes is None or _is_whole(files[row.form]))
    }


def sha256_of(network: Path) -> str:
    """SHA-256 of the weights of ``network``, a .safetensors file or run folder."""
    from cellseg_train.checkpoint import WEIGHTS_FILE

    with (network / WEIGHTS_FILE if network.is_dir() else network).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_form(form: Form, network: Path, folder: Path, gate: Sequence[str], run: Run) -> Row:
    """Run the command of ``form`` and read its report."""
    source, file = folder / form.needs if form.needs else network, folder / form.file
    shown = shlex.join(("cellseg-export", *form.arguments, source.name, "-o", file.name))
    if form.needs and not source.is_file():
        return Row(form.name, "not run", shown, 0.0, detail=f"{source.name}, which it is made from, was not made")
    for report_path in report_paths(form, folder):
        report_path.unlink(missing_ok=True)  # a report found afterwards is from this attempt
    seconds_since = stopwatch()
    code, text = run((*form.arguments, str(source), "-o", str(file), *gate))
    seconds = seconds_since()
    report = _report(form, folder)
    if code not in (0, ParityError.exit_code) or report is None:
        verdict: Verdict = "not run" if code == BackendUnavailableError.exit_code else "failed"
        return Row(form.name, verdict, shown, seconds, detail=f"exit code {code}: {_tail(text)}")
    truth = (report["truth"] or {}).get(TASK, {})
    return Row(
        form.name,
        report["verdict"],
        shown,
        seconds,
        megabytes=_megabytes(file) if code == 0 else None,
        compared_with=report["reference"]["backend"],
        policy=report["policy"]["name"],
        max_difference=max(channel["max"] for channel in report["tensors"].values()),
        figures=report["tasks"][TASK],
        truth=truth.get("candidate"),
        reference_truth=truth.get("reference"),
        notes=tuple(report["notes"]),
        detail="; ".join(report["reasons"]),
    )


def run_export(arguments: Sequence[str]) -> tuple[int, str]:
    """Run ``cellseg-export`` in a process of its own; return its exit code and output."""
    program = "from cellseg_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    return done.returncode, done.stdout + done.stderr


def describe_machine() -> dict[str, Any]:
    """Processor and versions that affect a table."""
    from cellseg_benchmarks.harness.machine import describe_machine as versions
    from cellseg_deploy.backends.device_class import device_class

    return {"device_class": device_class("cpu"), **versions()}


def _report(form: Form, folder: Path) -> dict[str, Any] | None:
    """The newest report of ``form``: of a refusal, else of the accepted form."""
    for path in report_paths(form, folder):
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_bytes())
            return content
    return None


def report_paths(form: Form, folder: Path) -> tuple[Path, Path]:
    """Paths where ``cellseg-export`` leaves the report of ``form``, a refusal first."""
    from cellseg_export.forms import onnx, openvino
    from cellseg_export.gate.gate_result import refused_path_of

    file = folder / form.file
    if file.suffix == ".onnx":
        passed = onnx.report_path_of(file)
    else:
        passed = openvino.report_path_of(file, "bf16" if "bf16" in form.arguments else "fp32")
    return refused_path_of(passed), passed


def _line(row: Row) -> str:
    if not row.figures:
        return f"| {row.form} | {row.verdict} | | | | | | | | |"
    s = row.figures
    size = "" if row.megabytes is None else f"{row.megabytes:.1f}"
    return (
        f"| {row.form} | {row.verdict} | {s['candidate_cells']} | {s['f1_at_0.9']:.4f} | {s['dice']:.5f} | "
        f"{row.max_difference:.1e} | {_truth(row.truth)} | {size} |"
    )


def _truth(row: dict[str, Any] | None) -> str:
    return " | | " if row is None else f"{row['f1']:.4f} | {row['dice']:.4f} | {row['count_mae']:.2f}"


def _megabytes(file: Path) -> float:
    return sum(part.stat().st_size for part in _parts(file)) / 1e6


def _is_whole(file: Path) -> bool:
    return all(part.is_file() for part in _parts(file))


def _parts(file: Path) -> tuple[Path, ...]:
    return (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,)


def _tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    return " ".join(lines[errors[-1] :] if errors else lines[-1:])


@click.command("parity", context_settings=shared.SETTINGS)
@click.argument("network", metavar="[RUN]", required=False, type=shared.PATH)
@click.option(
    "-o", "--output", required=True, metavar="DIR", type=shared.PATH, help="Folder for the forms and the table."
)
@click.option(
    "--forms",
    metavar="NAME,...",
    help="Some of fp32, fp16, mixed, openvino-fp32, openvino-bf16, int8.  [default: all but mixed]",
)
@click.option("--images", metavar="DIR", type=shared.FOLDER, help="Images to compare on.  [default: sample smears]")
@click.option("--masks", metavar="DIR", type=shared.FOLDER, help="True masks of these images.")
@console.mask_options
@click.option("--tile-batch", type=click.IntRange(1), default=8, show_default=True, help="Tiles per call.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per core]")
@click.option("--quiet", "-q", is_flag=True, help="Hide progress.")
def parity_command(
    network: Path | None,
    output: Path,
    forms: str | None,
    images: Path | None,
    masks: Path | None,
    mask_foreground: str,
    tile_batch: int,
    threads: int | None,
    quiet: bool,
) -> None:
    """Make every form of a network with cellseg-export and show the gate's verdicts side by side.

    RUN is a run folder of cellseg-train or its model.safetensors, by default the model that ships. The forms and
    their reports stay in DIR, beside parity.json and parity.md; the same command resumes a table that was
    stopped. Exit code 5 if a form was refused.
    """
    console.require_packages("export", "torch", "timm", "safetensors", "onnxscript")
    shared.check_pair(images, masks)
    network = network or default_weights_path()
    if not network.exists():
        raise ModelError(f"{network}: no such file or folder; give a run folder or its model.safetensors")
    if not network.is_dir() and network.suffix.lower() != ".safetensors":
        raise UsageError(f"{network}: expected a run folder or its model.safetensors, from which every form is made")
    names = shared.words(forms) or DEFAULT_FORMS
    forms_named(names)  # raises before anything is made
    if output.exists() and not (output / TABLE_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists and is not the folder of such a table; choose another -o")
    make_folder(output)
    progress = shared.progress(output, "parity")
    gate = ["--tile-batch", str(tile_batch)]
    if threads is not None:
        gate += ["--threads", str(threads)]
    if images is not None and masks is not None:
        gate += ["--images", str(images), "--masks", str(masks), "--mask-foreground", mask_foreground]
    table = parity_table(network, output, names, gate=gate, say=shared.teller(quiet), progress=progress)
    text = with_remark(table.to_markdown(), progress)
    write_bytes(output / TABLE_TEXT, text.encode())
    click.echo(text)
    progress.finish()
    refused = [row.form for row in table.rows if row.verdict not in ("passed", "not run")]
    if refused:
        raise ParityError(f"refused by the parity gate: {', '.join(refused)}; the table says why")
