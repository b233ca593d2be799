"""Where a network's time goes: nodes of the runtime brought back to parts of the network."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from written_reports import written_report

from cellseg_benchmarks.engine import layers
from cellseg_benchmarks.harness.flops import count_flops
from cellseg_deploy.models import default_model_path


def test_nodes_are_known_by_their_names_and_by_what_they_make() -> None:
    nodes = [
        helper.make_node("Relu", ["a"], ["relu"], name="encoder.blocks.0.mlp/Relu"),
        helper.make_node("Conv", ["relu", "w"], ["getitem"], name="decoder.steps.1.0.1/Conv"),
        helper.make_node("Concat", ["getitem"], ["cat"], name="decoder/Concat_2", axis=0),
        helper.make_node("Sigmoid", ["cat"], ["probabilities"], name="Sigmoid"),
    ]
    value = helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])
    parts = layers.parts_by_name(helper.make_model(helper.make_graph(nodes, "g", [value], [value])))
    assert parts["relu"] == parts["encoder.blocks.0.mlp/Relu"] == "encoder"
    assert parts["getitem"] == "decoder steps 1"
    assert parts["decoder/Concat_2"] == "decoder, between its convolutions"
    assert parts["probabilities"] == layers.OTHER


def test_the_first_call_is_left_out_and_the_runtimes_endings_too() -> None:
    def event(name: str, microseconds: int, cat: str = "Node") -> dict[str, object]:
        return {"cat": cat, "name": name, "dur": microseconds}

    events = [event("relu_1_nchwc_kernel_time", n) for n in (900, 1, 5, 3)]
    events += [event("relu_1_nchwc_fence_before", 50), event("model_run", 999, "Session")]
    assert layers.medians_by_node(events) == {"relu_1": pytest.approx(3e-6)}


def test_the_shipped_network_is_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = CliRunner().invoke(
        layers.layers_command, ["-o", str(out), "--calls", "3", "--batch-size", "1", "--threads", "1"]
    )
    assert told.exit_code == 0, told.output
    report = written_report(out, "layers", layers.LayersReport)
    parts = {part["name"]: part for part in report["parts"]}
    assert {"encoder", "image branch", "decoder steps 0", "decoder steps 2", layers.ADDED} <= set(parts)
    assert sum(part["gflop"] for part in parts.values()) == pytest.approx(count_flops(default_model_path()).total / 1e9)
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(report["seconds"])
    assert parts["encoder"]["seconds"] > 0.2 * report["seconds"]
    assert parts[layers.ADDED]["seconds"] < 0.25 * report["seconds"]
