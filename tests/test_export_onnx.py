"""cellseg-export: the file it writes is the network, and one that is not never gets the name."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from export_networks import TINY, random_network, trained_network
from tampering import FAULTS, Tamper, perturb_one_block, swap_mean_and_std, tampered

from cellseg_deploy import model_file
from cellseg_deploy.backends import open_backend
from cellseg_deploy.cli import _common
from cellseg_deploy.errors import ModelError, OutputError, ParityError, UsageError
from cellseg_deploy.parity import compare_tensors
from cellseg_export import onnx as export
from cellseg_export.cli import command
from cellseg_export.graph import check_graph
from cellseg_export.torch_backend import TorchBackend
from cellseg_export.verify import sample_images
from cellseg_train.checkpoint import LoadedNetwork, save_network
from cellseg_train.config import ModelConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose network finds the cells of sample smears."""
    folder = tmp_path_factory.mktemp("run")
    network = trained_network()
    save_network(folder / "model.safetensors", network.net.state_dict(), network.config, network.spec)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file that the command makes of ``run``."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    assert call("onnx", run, "-o", path, "-q") == 0
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """A folder of three images with more than 200 cells."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, image in sample_images(model_file.read_model_file(exported).spec, 4).load():
        if name != "sample-1":  # a stain this network was not shown
            assert cv2.imwrite(str(folder / f"{name}.png"), image[..., ::-1])
    return folder


def call(*arguments: object) -> int:
    return _common.run(command, [str(argument) for argument in arguments])


def random_tiles(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_file_says_what_it_is(exported: Path) -> None:
    file = model_file.read_model_file(exported)  # checks input, output, embedded and finite weights
    assert (file.opset, file.precision) == (20, "fp32")
    assert file.spec.parity.startswith("verified: counts as pytorch does under policy fp32")
    assert "sample smears" in file.spec.parity
    assert file.spec.training.val_metrics == {"f1": 0.5}


def test_the_graph_is_plain_and_folded(exported: Path) -> None:
    graph = onnx.load(exported).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert graph.node[0].op_type == "Cast"
    assert kinds["Cast"] == kinds["Sigmoid"] == 1
    assert kinds["Softmax"] == TINY.tiny_depth
    assert not {"BatchNormalization", "Attention", "If", "Loop", "Constant"} & set(kinds)
    assert {node.domain for node in graph.node} == {""}


def test_nodes_bear_the_names_of_modules_and_no_paths(exported: Path) -> None:
    names = [node.name for node in onnx.load(exported).graph.node]
    assert len(set(names)) == len(names)
    for wanted in ("encoder.blocks.1.attn.qkv/MatMul", "decoder.head/Conv", "normalise/Sub"):
        assert wanted in names
    data = exported.read_bytes()
    for trace in (str(Path(torch.__file__).parent).encode(), b"site-packages", b".py"):
        assert trace not in data


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_batch_is_free_and_changes_nothing(exported: Path, n: int) -> None:
    tiles = random_tiles(5, TINY.tile_size)
    with open_backend(exported) as backend:
        assert np.array_equal(backend.predict(tiles[:n]), np.concatenate([backend.predict(t[None]) for t in tiles[:n]]))


def test_export_leaves_the_network_as_it_was(exported: Path, run: Path) -> None:
    network = random_network(TINY)
    before = {name: value.clone() for name, value in network.net.state_dict().items()}
    fused = [getattr(m, "fused_attn", None) for m in network.net.modules()]
    export.trace(network, 20)
    assert [getattr(m, "fused_attn", None) for m in network.net.modules()] == fused
    assert True in fused
    assert all(torch.equal(before[name], value) for name, value in network.net.state_dict().items())
    assert not network.net.training


KINDS = {
    "plain, no image skip, class token, patch 16": ModelConfig(
        encoder="vit_tiny_patch16_224", tile_size=256, variant="plain", image_skip=(), decoder_channels=(16, 16, 8)
    ),
    "class and register tokens, LayerScale, patch 14": ModelConfig(
        encoder="vit_small_patch14_reg4_dinov2", tile_size=112, decoder_channels=(16, 16, 8), image_skip=(8, 8, 8)
    ),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_other_networks_export_and_agree(config: ModelConfig, tmp_path: Path) -> None:
    network = random_network(config)
    path = tmp_path / "model.onnx"
    export.write_graph(network, path)
    assert not [node for node in onnx.load(path).graph.node if "pos_embed" in str(node.input) and "Resize" in node.name]
    tiles = random_tiles(3, config.tile_size)
    with open_backend(path) as backend:
        got = backend.predict(tiles)
    expected = TorchBackend(network).predict(tiles)
    assert expected.std() > 0.01  # a constant answer would agree with anything
    assert compare_tensors(expected, got, tolerance=1e-4).max < 1e-4


# ------------------------------------------------------------------------------------------------------------ the gate


def test_the_command_writes_the_report(exported: Path) -> None:
    report = json.loads(export.report_path_of(exported).read_bytes())
    assert report["verdict"] == "passed"
    assert report["tasks"]["counting"]["reference_cells"] >= 200
    assert report["candidate"]["details"]["model_path"] == str(exported)
    assert report["candidate"]["details"]["model_identity"] == model_file.read_model_file(exported).identity
    assert sorted(p.name for p in exported.parent.iterdir()) == ["model.onnx", "model.parity.json"]


def test_verify_passes_the_export(run: Path, exported: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    assert call("verify", run, exported, "--images", pictures, "--report", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_bytes())["n_images"] == 3
    assert "verdict    passed" in capsys.readouterr().out


@pytest.mark.parametrize(("tamper", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_form_that_was_tampered_with_is_refused_with_the_reason(
    tamper: Tamper, reason: str, run: Path, exported: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = tampered(exported, tmp_path / "broken.onnx", tamper)
    assert call("verify", run, broken, "--images", pictures, "--report", tmp_path / "report.json") == 5
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["verdict"] == "failed"
    assert any(re.search(reason, text) for text in report["reasons"]), report["reasons"]
    assert re.search(reason, capsys.readouterr().out)


def test_a_faulty_exporter_leaves_no_model_but_the_report(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def finish(model: Any, **names: str) -> None:
        finished(model, **names)
        perturb_one_block(model)

    finished = export.finish_graph
    monkeypatch.setattr(export, "finish_graph", finish)
    path = tmp_path / "model.onnx"
    assert call("onnx", run, "-o", path, "--images", pictures, "-q") == 5
    error = capsys.readouterr().err
    assert "was not written: parity failed" in error
    assert "encoder.blocks.1" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.parity.jpg", "model.parity.json"]
    assert json.loads(export.report_path_of(path).read_bytes())["verdict"] == "failed"
    # Nor does --unverified help: it is for too few cells, not for wrong ones.
    assert call("onnx", run, "-o", path, "--images", pictures, "-q", "--unverified") == 5
    assert not path.exists()


def test_an_untrained_network_needs_unverified_and_says_so(tmp_path: Path, capsys: Any) -> None:
    network = random_network(TINY)
    with torch.no_grad():
        network.net.decoder.head.bias.fill_(-5.0)  # finds nothing
    run = tmp_path / "run"
    run.mkdir()
    save_network(run / "model.safetensors", network.net.state_dict(), network.config, network.spec)
    path = tmp_path / "model.onnx"
    assert call("onnx", run, "-o", path, "-q") == 5
    error = capsys.readouterr().err
    assert "parity inconclusive" in error
    assert "--unverified" in error
    assert not path.exists()
    assert json.loads(export.report_path_of(path).read_bytes())["verdict"] == "inconclusive"
    assert call("onnx", run, "-o", path, "-q", "--unverified") == 0
    assert model_file.read_model_file(path).spec.parity.startswith("unverified: too few cells to judge by")
    assert call("verify", run, path, "-q") == 5


def test_unverified_still_wants_tensors_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(model: Any, **names: str) -> None:
        finished(model, **names)
        swap_mean_and_std(model)

    finished = export.finish_graph
    monkeypatch.setattr(export, "finish_graph", finish)
    with pytest.raises(ParityError, match=r"--unverified needs tensors that agree to 0\.001; they differ by"):
        export.export_onnx(random_network(TINY), tmp_path / "model.onnx", unverified=True)
    assert not (tmp_path / "model.onnx").exists()


def test_a_refused_model_leaves_the_older_one_alone(
    run: Path, exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes())
    monkeypatch.setattr(export, "write_graph", lambda _net, to, opset: tampered(exported, to, perturb_one_block))
    assert call("onnx", run, "-o", path, "--images", pictures, "-q") == 5
    assert path.read_bytes() == exported.read_bytes()
    assert "older file" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- sizes and mistakes


def test_another_tile_size_is_the_same_network_on_more_context(run: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "large.onnx"
    assert call("onnx", run, "-o", path, "--tile-size", 168, "-q") == 0
    spec = model_file.read_model_file(path).spec
    assert (spec.tile_size, spec.halo) == (168, 24)
    assert spec.training.val_metrics == {}  # measured with other tiles
    assert "cellseg-evaluate" in capsys.readouterr().err


def test_too_large_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "MAX_BYTES", 2**20)
    with pytest.raises(ModelError, match=r"GiB; an ONNX file with embedded weights ends at 2 GiB"):
        export.check_size(random_network(TINY).net)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["onnx", "{run}", "-o", "{tmp}/model.pb"], 2, "must end in .onnx"),
        (["onnx", "{run}", "-o", "{tmp}/none/model.onnx"], 6, "no such folder"),
        (["onnx", "{tmp}", "-o", "{tmp}/model.onnx"], 5, "no trained network"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--opset", "23"], 2, "opset"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--tile-size", "100"], 2, "tile_size"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--images", "{tmp}"], 4, "no image"),
        (["verify", "{run}", "{tmp}/model.pt"], 2, "expected a training run"),
        (["verify", "{run}", "{tmp}/gone.onnx"], 5, "no such file"),
        (["info", "{tmp}/model.pt"], 2, "expected"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else None,
)
def test_mistakes_get_one_sentence(
    arguments: list[str], code: int, words: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call(*(argument.format(run=run, tmp=tmp_path) for argument in arguments)) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_attention_operator_or_a_late_cast_is_noticed() -> None:
    model = export.trace(random_network(TINY), 20)
    check_graph(model, opset=20)
    with pytest.raises(ModelError, match="expected opset 21"):
        check_graph(model, opset=21)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Attention"
    with pytest.raises(ModelError, match="1 Attention: TensorRT refuses it"):
        check_graph(model, opset=20)
    model.graph.node[0].op_type = "Identity"
    with pytest.raises(ModelError, match="expected one Cast"):
        check_graph(model, opset=20)


def test_info_shows_everything(run: Path, exported: Path, capsys: Any) -> None:
    assert call("info", exported) == 0
    text = capsys.readouterr().out
    file = model_file.read_model_file(exported)
    for shown in (file.identity, file.file_sha256, "parity", "counting", "seed_threshold", "opset", "cell_diameter_px"):
        assert shown in text
    assert call("info", run, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["spec"]["name"] == "test"
    assert content["network"]["encoder"] == "tiny"


def test_names_of_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    network: LoadedNetwork = random_network(TINY)
    with pytest.raises(UsageError, match="opset must be 20 to 22, got 23"):
        export.write_graph(network, tmp_path / "model.onnx", opset=23)
    with pytest.raises(OutputError, match="no such folder"):
        export.export_onnx(network, tmp_path / "none" / "model.onnx")
