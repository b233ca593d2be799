"""A network that tells classes of cells apart, as files: a softmax over the classes beside the other channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_networks import TINY, spec_of, trained_network
from onnx import numpy_helper

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.cli import console
from cellseg_deploy.models import onnx_file
from cellseg_deploy.parity.compare import compare, compare_tensors
from cellseg_deploy.parity.policy import policy_for
from cellseg_export.cli import command
from cellseg_export.forms.fp16_graph import check_types, parts_of, to_half
from cellseg_export.gate.divergence import locate_fault
from cellseg_export.gate.fp16_emulator import HalfBackend
from cellseg_export.gate.torch_backend import TorchBackend
from cellseg_export.gate.verify import sample_images
from cellseg_train.checkpoint import LoadedNetwork, save_network
from cellseg_train.model import CellSegNet

CLASSES = ("red", "white", "platelet")
CONFIG = replace(TINY, classes=CLASSES)


@pytest.fixture(scope="module")
def network() -> LoadedNetwork:
    """Finds the cells of sample smears; the classes are of random weights that disagree from pixel to pixel."""
    torch.manual_seed(0)
    net = CellSegNet(CONFIG)
    state = net.state_dict() | trained_network().net.state_dict()
    state["decoder.class_head.weight"] *= 10
    net.load_state_dict(state)
    return LoadedNetwork(net.eval(), CONFIG, spec_of(CONFIG, classes=CLASSES))


@pytest.fixture(scope="module")
def exported(network: LoadedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_network(folder / "model.safetensors", network.net.state_dict(), network.config, network.spec)
    assert console.run(command, ["onnx", str(folder), "-o", str(folder / "model.onnx"), "-q"]) == 0
    return folder / "model.onnx"


def tiles(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, TINY.tile_size, TINY.tile_size, 3), np.uint8)


def test_the_file_names_its_classes_and_was_compared_in_every_channel(exported: Path) -> None:
    spec = onnx_file.read_model_file(exported).spec
    assert spec.channels == ("foreground", "boundary", *CLASSES)
    assert spec.classes == CLASSES
    assert spec.parity.startswith("verified")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_computes_what_pytorch_does_and_classes_sum_to_one(
    exported: Path, network: LoadedNetwork, backend: str
) -> None:
    pytest.importorskip(backend)
    expected = TorchBackend(network).predict(tiles())
    with open_backend(exported, EngineOptions(backend=backend, threads=1)) as engine:
        got = engine.predict(tiles())
    assert got.shape == (2, 5, TINY.tile_size, TINY.tile_size)
    assert compare_tensors(expected, got, tolerance=1e-3).share_over == 0
    assert np.allclose(got[:, 2:].sum(axis=1), 1, atol=1e-5)
    assert got[:, 2:].argmax(axis=1).std() > 0.1
    assert not np.allclose(got[:, :2].sum(axis=1), 1, atol=0.1)


def test_in_half_precision_the_output_stays_float(exported: Path, network: LoadedNetwork) -> None:
    half = to_half(onnx.load(exported))
    assert "decoder.class_head" in parts_of(half)
    float_nodes = check_types(half).float_nodes
    assert (float_nodes["Sigmoid"], float_nodes["Softmax"], float_nodes["Concat"]) == (1, TINY.tiny_depth + 1, 1)
    got = HalfBackend(half, network.spec).predict(tiles())
    assert compare_tensors(TorchBackend(network).predict(tiles()), got, tolerance=0.1).share_over < 1e-3


def test_swapped_classes_are_refused_though_every_count_is_right(exported: Path, network: LoadedNetwork) -> None:
    class Swapped(TorchBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            return super()._predict(tiles_nhwc)[:, [0, 1, 3, 2, 4]]

    spec = onnx_file.read_model_file(exported).spec
    images = list(sample_images(spec, 2).load())
    policy = replace(policy_for("fp32"), min_cells=20)
    assert compare(TorchBackend(network), TorchBackend(network), images, policy).verdict == "passed"
    report = compare(TorchBackend(network), Swapped(network), images, policy)
    assert report.verdict == "failed"
    assert any("cells that both find have another class, allowed 0.1%; most in sample-" in r for r in report.reasons)
    assert any("channel red is the reference's white" in reason for reason in report.reasons)
    assert report.summary("counting")["max_count_difference"] == 0


def test_a_fault_in_the_class_head_is_located(exported: Path, network: LoadedNetwork, tmp_path: Path) -> None:
    model = onnx.load(exported)
    weight = next(w for w in model.graph.initializer if w.name == "decoder.class_head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    assert "the two diverge at decoder.class_head" in locate_fault(network, tmp_path / "wrong.onnx", tiles(1))
