"""``python -m cellseg_benchmarks``: the table of forms, and the large network that is made without a download."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from cellseg_benchmarks import cli
from cellseg_benchmarks.engine import limit_subjects, network
from cellseg_benchmarks.harness.torch_form import TorchForm
from cellseg_benchmarks.quality import parity_table as parity_table_module
from cellseg_benchmarks.quality.parity_table import FORMS, TABLE_FILE, Form, make_form, parity_table
from cellseg_deploy.cli.console import run
from cellseg_deploy.errors import OutputError
from cellseg_deploy.models import default_weights_path
from cellseg_train.checkpoint import load_network, save_network
from cellseg_train.fp32 import uses_tf32
from cellseg_train.model import CellSegNet


@pytest.mark.parametrize("opened", ["reference", "limits"])
def test_every_reference_and_every_peak_is_fp32(opened: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if opened == "reference":
        with TorchForm(load_network(default_weights_path())) as backend:
            assert backend.describe()["tf32"] is False
    else:
        limit_subjects.subject("torch", "cpu", 16, None, triad=False)
    assert not uses_tf32()


def report_of(verdict: str = "passed", *, reference: str = "pytorch", cells: int = 300) -> dict[str, Any]:
    """What the table reads of a gate's report."""
    metrics = {"f1": 0.95, "dice": 0.97, "count_mae": 2.0}
    return {
        "verdict": verdict,
        "reasons": [] if verdict == "passed" else ["counting: 300 cells became 290"],
        "notes": ["checked in half arithmetic"],
        "policy": {"name": "fp32"},
        "reference": {"backend": reference},
        "images_from": "four smears",
        "tensors": {"foreground": {"max": 1e-6}, "boundary": {"max": 3e-6}},
        "tasks": {"counting": {"reference_cells": 300, "candidate_cells": cells, "f1_at_0.9": 0.9991, "dice": 0.99995}},
        "truth": {"counting": {"reference": metrics, "candidate": metrics | {"f1": 0.94}}},
    }


class FakeExport:
    """Stands in for cellseg-export: writes files and reports, ends with the codes given by form file."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.codes = codes
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(tuple(arguments))
        file = Path(arguments[arguments.index("-o") + 1])
        code = self.codes.get(file.name, 0)
        stem = file.stem if file.suffix == ".onnx" else file.name + (".bf16" if "bf16" in arguments else "")
        refused, passed = (file.with_name(stem + end) for end in (".refused.json", ".parity.json"))
        if code == 0:
            file.write_bytes(b"x" * 2_000_000)
            if file.suffix == ".xml":
                file.with_suffix(".bin").write_bytes(b"x" * 1_000_000)
            passed.write_text(json.dumps(report_of(reference="onnxruntime" if file.suffix == ".xml" else "pytorch")))
        elif code == 5:
            refused.write_text(json.dumps(report_of("failed", cells=290)))
        return code, f"noise\nerror: exit {code} of {file.name}\nmore of it"


def table_of(tmp_path: Path, codes: dict[str, int], names: Sequence[str]) -> Any:
    export = FakeExport(codes)
    (tmp_path / "net.safetensors").write_bytes(b"weights")
    return parity_table(tmp_path / "net.safetensors", tmp_path, names, run=export, gate=("--threads", "1")), export


def test_every_form_is_made_by_one_command_from_what_it_needs(tmp_path: Path) -> None:
    table, export = table_of(tmp_path, {}, [form.name for form in FORMS])
    assert [row.verdict for row in table.rows] == ["passed"] * len(FORMS)
    for form, call in zip(FORMS, export.calls, strict=True):
        assert call[: len(form.arguments)] == form.arguments
        assert Path(call[len(form.arguments)]).name == (form.needs or "net.safetensors")
        assert call[-2:] == ("--threads", "1")
    sizes = {row.form: row.megabytes for row in table.rows}
    assert sizes["fp32"] == 2.0
    assert sizes["int8"] == 3.0  # .xml and .bin
    text = table.to_markdown()
    assert "| PyTorch fp32 | reference | 300 | | | | 0.9500 | 0.9700 | 2.00 | |" in text
    assert "| int8 | passed | 300 | 0.9991 | 0.99995 | 3.0e-06 | 0.9400 | 0.9700 | 2.00 | 3.0 |" in text
    assert "- int8: checked in half arithmetic" in text
    assert json.loads(table.to_json())["images"] == "four smears"


def test_a_refused_form_is_a_row_and_an_absent_engine_too(tmp_path: Path) -> None:
    table, _ = table_of(tmp_path, {"fp16.onnx": 5, "bf16.xml": 8, "int8.xml": 1}, ["fp16", "openvino-bf16", "int8"])
    by_form = {row.form: row for row in table.rows}
    assert [by_form[name].verdict for name in ("fp32", "fp16", "openvino-bf16", "int8")] == [
        "passed",
        "failed",
        "not run",
        "failed",
    ]
    assert by_form["fp16"].figures["candidate_cells"] == 290
    assert by_form["fp16"].detail == "counting: 300 cells became 290"
    assert by_form["openvino-bf16"].detail == "exit code 8: error: exit 8 of bf16.xml more of it"
    assert "| fp16 | failed | 290 |" in table.to_markdown()
    assert json.loads(table.to_json())["rows"][1]["megabytes"] is None  # nothing was kept


def test_an_older_report_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    form = Form("fp32", "fp32.onnx", ("onnx",))
    (tmp_path / "fp32.parity.json").write_text(json.dumps(report_of()))
    row = make_form(form, tmp_path / "net.safetensors", tmp_path, (), lambda _: (1, "Traceback\nValueError: no"))
    assert row.verdict == "failed"
    assert row.detail == "exit code 1: ValueError: no"


def test_a_table_that_was_stopped_goes_on(tmp_path: Path) -> None:
    table_of(tmp_path, {"fp16.onnx": 5, "bf16.xml": 8}, ["fp32", "fp16", "openvino-bf16"])
    table, export = table_of(tmp_path, {}, ["fp32", "fp16", "openvino-bf16", "int8"])
    # What was refused stays refused; what could not be run is tried again.
    assert [Path(call[call.index("-o") + 1]).name for call in export.calls] == ["bf16.xml", "int8.xml"]
    assert [row.verdict for row in table.rows] == ["passed", "failed", "passed", "passed"]
    assert json.loads((tmp_path / TABLE_FILE).read_bytes())["rows"][3]["form"] == "int8"


@pytest.mark.parametrize("lost", ["fp32.onnx", "openvino.xml", "openvino.bin"])
def test_a_form_whose_file_is_gone_is_made_again(tmp_path: Path, lost: str) -> None:
    names = ["fp32", "fp16", "openvino-fp32"]
    table_of(tmp_path, {"fp16.onnx": 5}, names)  # a refused form has no file
    (tmp_path / lost).unlink()
    table, export = table_of(tmp_path, {}, names)
    (call,) = export.calls
    assert Path(call[call.index("-o") + 1]).stem == Path(lost).stem
    assert (tmp_path / lost).is_file()
    assert [row.verdict for row in table.rows] == ["passed", "failed", "passed"]


def test_a_table_of_another_network_is_left_alone(tmp_path: Path) -> None:
    table_of(tmp_path, {}, ["fp32"])
    before = (tmp_path / TABLE_FILE).read_bytes()
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    with pytest.raises(OutputError, match="is of another network_sha256"):
        parity_table(tmp_path / "other.safetensors", tmp_path, ["fp32"], run=FakeExport({}), gate=("--threads", "1"))
    with pytest.raises(OutputError, match=r"is of another gate: .*threads.*choose another folder"):
        parity_table(tmp_path / "net.safetensors", tmp_path, ["fp32"], run=FakeExport({}))
    assert (tmp_path / TABLE_FILE).read_bytes() == before
    (tmp_path / TABLE_FILE).write_bytes(b"{")
    with pytest.raises(OutputError, match="cannot be read"):
        table_of(tmp_path, {}, ["fp32"])


def test_every_command_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    names = cli.command.list_commands(click.Context(cli.command))
    assert {"latency", "pipeline", "scaling", "peers", "parity", "network"} <= set(names)
    assert [name for name in names if f"`{name}`" not in text] == []


def test_a_command_is_imported_when_it_is_asked_for() -> None:
    """And none needs PyTorch to explain itself."""
    code = (
        "import click, sys; sys.modules['torch'] = None\n"  # an import of it fails
        "from cellseg_benchmarks.cli import command\n"
        "ours = lambda: {m for m in sys.modules if m.startswith('cellseg_benchmarks.')}\n"
        "assert ours() == {'cellseg_benchmarks.cli', 'cellseg_benchmarks.options'}, ours()\n"
        "context = click.Context(command)\n"
        "for name in command.list_commands(context):\n"
        "    found = command.get_command(context, name)\n"
        "    assert found.name == name and found.get_help(click.Context(found)), name\n"
        "    print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study" in done.stdout.split()


def test_parity_leaves_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = FakeExport({"fp16.onnx": 5})
    monkeypatch.setattr(parity_table_module, "run_export", export)
    (tmp_path / "net.safetensors").write_bytes(b"weights")
    out = tmp_path / "out"
    words = ["parity", str(tmp_path / "net.safetensors"), "-o", str(out), "--forms", "fp16,int8", "--threads", "3"]
    assert run(cli.command, words) == 5  # a form was refused
    assert all(call[-4:] == ("--tile-batch", "8", "--threads", "3") for call in export.calls)
    assert [row["verdict"] for row in json.loads((out / TABLE_FILE).read_bytes())["rows"]] == [
        "passed",
        "failed",
        "passed",
    ]
    said = capsys.readouterr()
    assert said.out.strip() == (out / "parity.md").read_text().strip()
    assert "fp16" in said.err
    assert "| int8 | passed | 300 | 0.9991 |" in said.out


def test_network_leaves_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def shipped(encoder: str, *, n_tiles: int, **_: Any) -> Any:
        asked.append((encoder, n_tiles))
        return load_network(default_weights_path())

    monkeypatch.setattr(network, "random_encoder_network", shipped)
    path = tmp_path / "net.safetensors"
    assert run(cli.command, ["network", "-o", str(path), "--encoder", "small", "--tiles", "48"]) == 0
    assert asked == [("small", 48)]
    assert load_network(path).spec == load_network(default_weights_path()).spec


@pytest.mark.night
@pytest.mark.slow
def test_the_network_made_here_finds_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small ViT instead of the large one; random weights, frozen, no image branch: what it finds went through it."""
    monkeypatch.setattr(network, "SMEARS", 8)
    lines: list[str] = []
    made = network.random_encoder_network("small", n_tiles=48, epochs=12, say=lines.append)
    assert made.spec.training.val_metrics["f1"] > 0.4, lines
    assert "24 LayerScales set to" in lines[0]
    assert made.config.image_skip == ()
    torch.manual_seed(0)
    fresh = CellSegNet(made.config)
    assert torch.equal(made.net.encoder.blocks[3].attn.qkv.weight, fresh.encoder.blocks[3].attn.qkv.weight)
    path = tmp_path / "net.safetensors"
    save_network(path, made.net.state_dict(), made.config, made.spec)
    assert load_network(path).spec == made.spec
