"""Half precision: what is half and what is not, overflow found where it happens, a gate that refuses what it must."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_networks import TINY, random_network, trained_network
from onnx import TensorProto, helper
from tampering import HALF_FAULTS, Tamper, set_weights, tampered, weights_of

from cellseg_deploy.backends import open_backend
from cellseg_deploy.cli import console
from cellseg_deploy.errors import ModelError
from cellseg_deploy.models import onnx_file
from cellseg_deploy.parity.compare import compare_tensors
from cellseg_deploy.segmenter import Segmenter
from cellseg_export.cli import command
from cellseg_export.forms import onnx as export
from cellseg_export.forms.fp16_graph import check_types, float_parts, parts_of, to_half
from cellseg_export.gate.fp16_emulator import HalfBackend
from cellseg_export.gate.gate_result import refused_path_of
from cellseg_export.gate.mixed_precision import HalfOutcome, Remembered, parts_to_keep
from cellseg_export.gate.torch_backend import TorchBackend
from cellseg_export.gate.verify import sample_images
from cellseg_train.checkpoint import LoadedNetwork, load_network, save_network
from cellseg_train.config import ModelConfig

BEYOND = 3 * 65504.0
"""Where the products of queries and keys in the overflowing network reach."""


def call(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


def save(network: LoadedNetwork, folder: Path) -> Path:
    save_network(folder / "model.safetensors", network.net.state_dict(), network.config, network.spec)
    return folder


def report_of(path: Path) -> Any:
    return json.loads(export.report_path_of(path).read_bytes())


def refusal_of(path: Path) -> Any:
    return json.loads(refused_path_of(export.report_path_of(path)).read_bytes())


def random_tiles(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose network finds the cells of sample smears."""
    return save(trained_network(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def fp32(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its fp32 model file."""
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export.write_graph(load_network(run), path)
    return path


@pytest.fixture(scope="module")
def fp16(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp16 file that the command makes of ``run``."""
    path = tmp_path_factory.mktemp("fp16") / "model.onnx"
    assert call("onnx", run, "-o", path, "--precision", "fp16", "-q") == 0
    return path


@pytest.fixture(scope="module")
def overflowing(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with a bias on the keys of block 1 that half can hold, but not their products with the queries.

    It adds one number to all scores of a query, which softmax does not see: in fp32 nothing changes. Queries are made
    larger and keys smaller first, for else the bias itself would not fit.
    """
    network = load_network(run)
    attention = network.net.encoder.blocks[1].attn
    width = attention.qkv.in_features
    with torch.no_grad():
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            tensor[:width] *= 100
            tensor[width : 2 * width] /= 100
    given: list[torch.Tensor] = []
    handle = attention.qkv.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    TorchBackend(network).predict(sample_tiles(network))
    handle.remove()
    queries = given[0][0, :, : attention.head_dim] * attention.scale  # (tokens, width of a head), of the first head
    direction = queries.mean(dim=0) / queries.mean(dim=0).norm()
    keys = BEYOND / (queries @ direction).abs().max() * direction
    assert keys.abs().max() < 65504
    with torch.no_grad():
        attention.qkv.bias[width : width + attention.head_dim] += keys
    return save(network, tmp_path_factory.mktemp("overflowing"))


@pytest.fixture(scope="module")
def fp32_graph(fp32: Path) -> onnx.ModelProto:
    return onnx.load(fp32)


# --- the graph


def test_what_is_half_and_what_is_not(fp16: Path) -> None:
    file = onnx_file.read_model_file(fp16)
    assert (file.precision, file.opset) == ("fp16", 20)
    model = onnx.load(fp16)
    types = check_types(model)
    assert types.float_nodes == {
        "Transpose": 1,  # of the input, and colours:
        "Sub": 1,
        "Div": 1,
        "LayerNormalization": 2 * TINY.tiny_depth + 1,
        "Softmax": TINY.tiny_depth,
        "Sigmoid": 1,
    }
    # Norms: scale and bias of each; colours: mean and std.
    assert types.float_weights == (2 * TINY.tiny_depth + 1) * 2 * TINY.tiny_width + 6
    assert types.half_weights > 100_000
    assert types.float_parts == ()
    # In and out of each block's two norms and softmax, of the last norm, into the network, into the sigmoid, the first.
    assert types.casts <= 6 * TINY.tiny_depth + 5
    assert model.graph.node[0].op_type == "Cast"
    assert model.graph.node[0].attribute[0].i == TensorProto.FLOAT


def test_names_stay_and_the_file_shrinks(fp16: Path, fp32: Path, fp32_graph: onnx.ModelProto) -> None:
    names = {tensor.name for tensor in onnx.load(fp16).graph.initializer}
    assert names == {tensor.name for tensor in fp32_graph.graph.initializer}
    nodes = [node.name for node in onnx.load(fp16).graph.node]
    assert len(set(nodes)) == len(nodes)
    assert {node.name for node in fp32_graph.graph.node} <= set(nodes)
    assert fp16.stat().st_size < 0.65 * fp32.stat().st_size


def test_weights_are_rounded_to_nearest(fp32_graph: onnx.ModelProto) -> None:
    name = "encoder.blocks.1.mlp.fc1.weight"
    half = weights_of(to_half(fp32_graph), name)
    assert half.dtype == np.float16
    assert np.array_equal(half, weights_of(fp32_graph, name).astype(np.float16))


def test_parts_kept_in_float(fp32_graph: onnx.ModelProto, tmp_path: Path) -> None:
    assert parts_of(fp32_graph) == (
        *(f"branch.to_{name}" for name in ("half", "quarter", "eighth")),
        "encoder.patch_embed",
        *(f"encoder.blocks.{i}" for i in range(TINY.tiny_depth)),
        "decoder.project",
        *(f"decoder.steps.{i}" for i in range(3)),
        "decoder.head",
    )
    keep = ("encoder.blocks.0", "encoder.blocks.1", "decoder.steps.2")
    half = to_half(fp32_graph, keep)
    assert check_types(half, keep).float_parts == float_parts(half) == keep
    # Between two neighbours that are both in FP32 nothing is cast.
    assert not [n.name for n in half.graph.node if n.op_type == "Cast" and n.name.startswith("encoder.blocks.0/")]
    path = tmp_path / "mixed.onnx"
    onnx.save(half, path)
    assert onnx_file.read_model_file(path).precision == "mixed"
    with pytest.raises(ModelError, match=r"encoder\.blocks\.0.* does not compute in half"):
        check_types(half)
    with pytest.raises(ModelError, match="does not compute in float"):
        check_types(to_half(fp32_graph), keep)


def half_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    sigmoid = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    sigmoid.input[0] = next(node for node in model.graph.node if sigmoid.input[0] in node.output).input[0]


def half_softmax(model: onnx.ModelProto) -> None:
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    before = next(node for node in model.graph.node if softmax.input[0] in node.output)
    after = next(node for node in model.graph.node if softmax.output[0] in node.input)
    softmax.input[0] = before.input[0]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == after.output[0]:
                node.input[i] = softmax.output[0]


def cast_before_gelu(model: onnx.ModelProto, *kinds: int) -> None:
    """Casts to ``kinds``, one after the other, in front of the first Gelu."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    at = next(i for i, node in enumerate(nodes) if node.op_type == "Gelu")
    value, casts = nodes[at].input[0], []
    for i, kind in enumerate(kinds):
        casts.append(helper.make_node("Cast", [value], [f"cast-{i}"], name=f"cast-{i}", to=kind))
        value = f"cast-{i}"
    nodes[at].input[0] = value
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *casts, *nodes[at:]])


def round_trip(model: onnx.ModelProto) -> None:
    cast_before_gelu(model, TensorProto.FLOAT, TensorProto.FLOAT16)


def useless_cast(model: onnx.ModelProto) -> None:
    cast_before_gelu(model, TensorProto.FLOAT16)


def infinite_weight(model: onnx.ModelProto) -> None:
    weight = weights_of(model, "decoder.head.weight").copy()
    weight[0, 0, 0, 0] = np.inf
    set_weights(model, "decoder.head.weight", weight)


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (half_output, "output is not float32|Sigmoid does not compute in float"),
        (half_softmax, "Softmax does not compute in float|contradict each other"),
        (round_trip, "cast-1 undoes cast-0"),
        (useless_cast, "cast-0 casts to the type its input has"),
        (infinite_weight, "the weights decoder.head.weight are not finite"),
    ],
)
def test_types_that_were_not_asked_for_are_noticed(fp16: Path, tamper: Tamper, words: str) -> None:
    model = onnx.load(fp16)
    tamper(model)
    with pytest.raises(ModelError, match=words):
        check_types(model)


def test_a_weight_beyond_half_is_never_cut(fp32: Path, tmp_path: Path, capsys: Any) -> None:
    def grow(model: onnx.ModelProto) -> None:
        weight = weights_of(model, "encoder.blocks.0.mlp.fc2.weight").copy()
        weight[0, 0] = 1e5
        set_weights(model, "encoder.blocks.0.mlp.fc2.weight", weight)

    large = tampered(fp32, tmp_path / "large.onnx", grow)
    assert call("onnx", large, "-o", tmp_path / "half.onnx", "--precision", "fp16", "-q") == 5
    error = capsys.readouterr().err
    wanted = r"beyond 65504.*encoder\.blocks\.0\.mlp\.fc2\.weight in encoder\.blocks\.0; --precision mixed"
    assert re.search(wanted, error)
    half = to_half(onnx.load(large), ("encoder.blocks.0",))
    assert weights_of(half, "encoder.blocks.0.mlp.fc2.weight")[0, 0] == np.float32(1e5)


# --- half arithmetic


KINDS = {
    "tiny": TINY,
    "plain, no image skip, class token, patch 16": ModelConfig(
        encoder="vit_tiny_patch16_224", tile_size=256, variant="plain", image_skip=(), decoder_channels=(16, 16, 8)
    ),
    "class and register tokens, LayerScale, patch 14": ModelConfig(
        encoder="vit_small_patch14_reg4_dinov2", tile_size=112, decoder_channels=(16, 16, 8), image_skip=(8, 8, 8)
    ),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_the_check_computes_what_the_network_computes(config: ModelConfig, tmp_path: Path) -> None:
    network = random_network(config)
    path = tmp_path / "model.onnx"
    export.write_graph(network, path)
    model, tiles = onnx.load(path), random_tiles(2, config.tile_size)
    expected = TorchBackend(network).predict(tiles)
    in_float = HalfBackend(model, network.spec).predict(tiles)
    assert expected.std() > 0.01
    assert compare_tensors(expected, in_float, tolerance=1e-5).max < 1e-5
    half = to_half(model)
    check_types(half)
    in_half = HalfBackend(half, network.spec)
    difference = compare_tensors(expected, in_half.predict(tiles), tolerance=1e-2).max
    assert 1e-6 < difference < 1e-2  # half it is, and no worse than half must be
    assert set(in_half.largest) >= set(parts_of(half))
    assert max(in_half.largest.values()) < 100


def test_overflow_is_hidden_by_onnx_runtime_and_found_by_the_check(overflowing: Path, tmp_path: Path) -> None:
    network = load_network(overflowing)
    path = tmp_path / "model.onnx"
    export.write_graph(network, path)
    half = to_half(onnx.load(path))
    onnx.save(half, path)
    tiles = sample_tiles(network)
    with open_backend(path) as backend:
        hidden = backend.predict(tiles)
    assert np.isfinite(hidden).all()
    check = HalfBackend(half, network.spec)
    with pytest.raises(Exception, match=r"overflow in encoder\.blocks\.1: .* encoder\.blocks\.1\.attn/MatMul gives"):
        check.predict(tiles)
    assert check.overflow is not None
    assert (check.overflow.part, check.overflow.node) == ("encoder.blocks.1", "encoder.blocks.1.attn/MatMul")


def sample_tiles(network: LoadedNetwork) -> np.ndarray:
    _, image = next(iter(sample_images(network.spec).load()))
    size = network.spec.tile_size
    return np.ascontiguousarray(image[None, 100 : 100 + size, 100 : 100 + size])


def test_an_unknown_operator_is_not_guessed(fp32_graph: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(fp32_graph)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Selu"
    with pytest.raises(ModelError, match="operator Selu cannot be checked"):
        HalfBackend(model, random_network(TINY).spec)


# --- the gate


def test_the_report_says_that_half_arithmetic_was_checked(fp16: Path) -> None:
    report = report_of(fp16)
    assert report["verdict"] == "passed"
    assert report["policy"]["name"] == "fp16"
    assert report["candidate"]["precision"] == "fp16"
    assert 1e-5 < report["tensors"]["foreground"]["max"] < 0.05
    assert any(re.search(r"half arithmetic \(PyTorch.*largest value \d.* in ", note) for note in report["notes"])
    assert "half arithmetic" in onnx_file.read_model_file(fp16).spec.parity


def test_both_routes_lead_to_the_same_counts(fp32: Path, fp16: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    assert call("onnx", fp32, "-o", path, "--precision", "fp16", "-q") == 0
    one, other = (onnx_file.read_model_file(file) for file in (fp16, path))
    assert one.identity == other.identity
    assert one.identity != onnx_file.read_model_file(fp32).identity
    assert report_of(path)["reference"]["backend"] == "onnxruntime"
    assert report_of(fp16)["reference"]["backend"] == "pytorch"
    counts = []
    for file in (fp32, fp16, path):
        with open_backend(file) as backend:
            counts.append([Segmenter(backend)(image).count for _, image in sample_images(one.spec, 1).load()])
    assert counts[1] == counts[2]
    assert sum(counts[0]) > 50


def test_overflow_is_refused_with_the_block_named(overflowing: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "half.onnx"
    assert call("onnx", overflowing, "-o", path, "--precision", "fp16", "-q") == 5
    wanted = r"in half arithmetic: overflow in encoder\.blocks\.1: .* encoder\.blocks\.1\.attn/MatMul"
    assert re.search(wanted, capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.refused.jpg", "half.refused.json"]
    report = refusal_of(path)
    assert report["verdict"] == "failed"
    assert re.search(wanted, report["faults"][0])
    # What ONNX Runtime's CPU makes of the very same file looks fine:
    assert report["tasks"]["counting"]["reference_cells"] == report["tasks"]["counting"]["candidate_cells"]


def test_an_overflow_that_not_even_onnx_runtime_hides_is_named_too(
    fp32: Path, fp16: Path, tmp_path: Path, capsys: Any
) -> None:
    def grow(model: onnx.ModelProto) -> None:
        name = "encoder.patch_embed.proj.weight"
        weight = weights_of(model, name)
        set_weights(model, name, np.full_like(weight, 6e4))

    assert call("verify", fp32, tampered(fp16, tmp_path / "large.onnx", grow), "-q") == 5
    error = capsys.readouterr().err
    assert "answered with NaN or infinity" in error
    assert "in half arithmetic: overflow in encoder.patch_embed:" in error


def test_half_forms_are_not_judged_without_half_arithmetic(
    fp32: Path, fp16: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert call("verify", fp32, fp16, "-q") == 8
    assert re.search(r"PyTorch is not installed; run: pip install 'cellseg-deploy\[export\]'", capsys.readouterr().err)


def test_mixed_keeps_just_that_block(overflowing: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "mixed.onnx"
    assert call("onnx", overflowing, "-o", path, "--precision", "mixed") == 0
    assert float_parts(onnx.load(path)) == ("encoder.blocks.1",)
    assert onnx_file.read_model_file(path).precision == "mixed"
    report = report_of(path)
    assert report["verdict"] == "passed"
    note = "kept in FP32: encoder.blocks.1 (1 of 11 parts)"
    assert note in report["notes"]
    assert note in onnx_file.read_model_file(path).spec.parity
    assert note in capsys.readouterr().out
    assert call("verify", overflowing, path, "-q") == 0


@pytest.mark.parametrize(("tamper", "reason"), HALF_FAULTS.values(), ids=HALF_FAULTS)
def test_a_half_form_that_was_tampered_with_is_refused(
    tamper: Tamper, reason: str, run: Path, fp16: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = tampered(fp16, tmp_path / "broken.onnx", tamper)
    files = ["--report", tmp_path / "report.json", "--picture", tmp_path / "worst.png"]
    assert call("verify", run, broken, *files) == 5
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["verdict"] == "failed"
    assert report["policy"]["name"] == "fp16"
    assert any(re.search(reason, text) for text in report["reasons"]), report["reasons"]
    assert re.search(reason, capsys.readouterr().out)
    assert (tmp_path / "worst.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["onnx", "{fp32}", "-o", "{tmp}/m.onnx"], 2, "a model file already"),
        (["onnx", "{fp16}", "-o", "{tmp}/m.onnx", "--precision", "mixed"], 2, "holds fp16 weights"),
        (["onnx", "{fp32}", "-o", "{tmp}/m.onnx", "--precision", "fp16", "--opset", "21"], 2, "file has its own"),
        (["onnx", "{fp32}", "-o", "{tmp}/m.onnx", "--precision", "fp16", "--masks", "{tmp}"], 2, "--masks belong to"),
        (["verify", "{fp32}", "{fp16}", "--picture", "{tmp}/worst.bmp"], 2, "must end in one of .png"),
        (["verify", "{fp32}", "{fp16}", "--policy", "int8", "--images", "{tmp}"], 4, "no image found"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str], code: int, words: str, fp32: Path, fp16: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call(*(argument.format(fp32=fp32, fp16=fp16, tmp=tmp_path) for argument in arguments)) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- the search

PARTS = tuple("abcdefgh")


def needs(
    *wanted: str, overflow: Collection[str] = ()
) -> tuple[Callable[[Collection[str]], HalfOutcome], list[set[str]]]:
    """An attempt that passes if all ``wanted`` and ``overflow`` parts are kept; the latter name themselves."""
    tried: list[set[str]] = []

    def attempt(keep: Collection[str]) -> HalfOutcome:
        tried.append(set(keep))
        for part in overflow:
            if part not in keep:
                return HalfOutcome((f"overflow in {part}",), part)
        return HalfOutcome(() if set(wanted) <= set(keep) else ("counts differ",))

    return attempt, tried


@pytest.mark.parametrize("wanted", [(), ("a",), ("h",), ("d",), ("b", "g"), ("a", "d", "h"), PARTS])
def test_bisection_finds_all_parts_that_are_needed_and_no_other(wanted: tuple[str, ...]) -> None:
    attempt, tried = needs(*wanted)
    assert parts_to_keep(PARTS, (), attempt) == wanted
    assert len(tried) <= 2 + 4 * len(wanted)  # log2(8) tries and one to see whether that was all


def test_overflow_names_its_part_without_bisection() -> None:
    attempt, tried = needs(overflow=("c", "f"))
    assert parts_to_keep(PARTS, (), attempt) == ("c", "f")
    assert tried == [set(), {"c"}, {"c", "f"}]


def test_overflow_and_precision_together() -> None:
    attempt, _ = needs("e", overflow=("g",))
    assert parts_to_keep(PARTS, ("a",), attempt) == ("a", "e", "g")


def test_no_choice_helps() -> None:
    attempt, tried = needs("not a part")
    assert parts_to_keep(PARTS, ("b",), attempt) == ("b",)
    assert tried == [{"b"}, set(PARTS)]


def test_a_remembered_backend_is_asked_once(stub_backend: Any) -> None:
    tiles = random_tiles(2, 56)
    remembered = Remembered(stub_backend)
    first = remembered.predict(tiles)
    first_copy = first.copy()
    first[:] = 0
    assert np.array_equal(remembered.predict(tiles), first_copy)
    assert stub_backend.batches == [2]
    remembered.predict(tiles[:1])
    assert stub_backend.batches == [2, 1]
