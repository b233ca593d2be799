"""cellseg-export: the file it writes is the network, and one that is not never gets the name."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch
from export_networks import SUMMARY, TINY, random_network, trained_network
from tampering import FAULTS, Tamper, perturb_one_block, swap_mean_and_std, tampered

from cellseg_deploy.backends import open_backend
from cellseg_deploy.cli import console
from cellseg_deploy.errors import ModelError, OutputError, UsageError
from cellseg_deploy.files.workspace import workspace
from cellseg_deploy.models import onnx_file
from cellseg_deploy.parity.compare import compare_tensors
from cellseg_deploy.segmenter import Segmenter
from cellseg_export.cli import command
from cellseg_export.forms import onnx as export
from cellseg_export.forms.graph import check_graph
from cellseg_export.gate.torch_backend import TorchBackend
from cellseg_export.gate.verify import sample_images
from cellseg_train.checkpoint import load_network, save_network
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
    for name, image in sample_images(onnx_file.read_model_file(exported).spec, 4).load():
        if name != "sample-1":  # three are enough
            assert cv2.imwrite(str(folder / f"{name}.png"), image[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose network finds nothing, and ``model.onnx`` in it, exported unverified."""
    folder = tmp_path_factory.mktemp("silent")
    network = random_network(TINY)
    with torch.no_grad():
        network.net.decoder.head.bias.fill_(-4.0)
    save_network(folder / "model.safetensors", network.net.state_dict(), network.config, network.spec)
    assert call("onnx", folder, "-o", folder / "model.onnx", "-q", "--unverified") == 0
    return folder


def exporter_gives(monkeypatch: pytest.MonkeyPatch, model: Path, tamper: Tamper = lambda _: None) -> None:
    """Let the exporter come up with ``model``, changed by ``tamper``, instead of tracing once more."""
    monkeypatch.setattr(export, "write_graph", lambda _network, path, opset: tampered(model, path, tamper))


def call(*arguments: object) -> int:
    return console.run(command, [str(argument) for argument in arguments])


def random_tiles(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


# --- the file


def test_the_file_says_what_it_is(exported: Path) -> None:
    file = onnx_file.read_model_file(exported)  # checks input, output, embedded and finite weights
    assert (file.opset, file.precision) == (20, "fp32")
    assert file.spec.parity.startswith("verified: counts as pytorch does under policy fp32")
    assert "sample smears" in file.spec.parity
    assert file.spec.training.val_metrics == {"f1": 0.5}
    assert file.spec.training.data_summary == SUMMARY


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


KINDS = {
    "plain, no image skip, class token, any image size, patch 16": ModelConfig(
        encoder="test_vit", tile_size=256, variant="plain", image_skip=(), decoder_channels=(16, 16, 8)
    ),
    "register token, LayerScale, patch 16": ModelConfig(
        encoder="test_vit2", tile_size=128, decoder_channels=(16, 16, 8), image_skip=(8, 8, 8)
    ),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_other_networks_export_and_agree(config: ModelConfig, tmp_path: Path) -> None:
    network = random_network(config)
    before = {name: value.clone() for name, value in network.net.state_dict().items()}
    fused = [getattr(module, "fused_attn", None) for module in network.net.modules()]
    path = tmp_path / "model.onnx"
    export.write_graph(network, path)

    tiles = random_tiles(3, config.tile_size)
    with open_backend(path) as backend:
        got = backend.predict(tiles)
    expected = TorchBackend(network).predict(tiles)
    assert expected.std() > 0.01  # a constant answer would agree with anything
    assert compare_tensors(expected, got, tolerance=1e-4).max < 1e-4

    # The export leaves the network as it was: weights, mode, and the fused attention that the reference runs with.
    assert all(torch.equal(before[name], value) for name, value in network.net.state_dict().items())
    assert [getattr(module, "fused_attn", None) for module in network.net.modules()] == fused
    assert any(fused)  # or there was nothing to leave as it was
    assert not network.net.training


# --- the gate


def test_the_command_writes_the_report(exported: Path) -> None:
    report = json.loads(export.report_path_of(exported).read_bytes())
    assert report["verdict"] == "passed"
    assert report["tasks"]["counting"]["reference_cells"] >= 200
    assert report["candidate"]["details"]["model_path"] == str(exported)
    assert report["candidate"]["details"]["model_identity"] == onnx_file.read_model_file(exported).identity
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


def test_a_faulty_export_leaves_the_report_and_no_model(
    run: Path, exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    exporter_gives(monkeypatch, exported, perturb_one_block)
    path = tmp_path / "model.onnx"
    # --unverified does not help: it is for too few cells, not for wrong ones.
    assert call("onnx", run, "-o", path, "--images", pictures, "-q", "--unverified") == 5
    error = capsys.readouterr().err
    assert "was not written: parity failed" in error
    assert "diverge at encoder.blocks.1:" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.refused.jpg", "model.refused.json"]
    assert json.loads((tmp_path / "model.refused.json").read_bytes())["verdict"] == "failed"


def test_a_refused_model_leaves_the_older_one_alone(
    run: Path, exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    exporter_gives(monkeypatch, exported, perturb_one_block)
    path, report = tmp_path / "model.onnx", tmp_path / "model.parity.json"
    for new, old in ((path, exported), (report, export.report_path_of(exported))):
        new.write_bytes(old.read_bytes())
    kept = report.read_bytes()
    assert call("onnx", run, "-o", path, "--images", pictures, "-q") == 5
    assert (path.read_bytes(), report.read_bytes()) == (exported.read_bytes(), kept)
    error = capsys.readouterr().err
    assert "the older file of that name and its report were left as they are" in error
    assert str(tmp_path / "model.refused.json") in error
    exporter_gives(monkeypatch, exported)
    assert call("onnx", run, "-o", path, "--images", pictures, "-q") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.parity.json"]


def test_what_a_killed_export_left_is_swept_and_what_a_running_one_uses_is_not(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from cellseg_deploy.files.workspace import workspace\n"
        "with workspace(pathlib.Path(sys.argv[1])) as place:\n"
        "    (place / 'model.onnx').touch(); print(place, flush=True); time.sleep(60)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, running = (Path(process.stdout.readline().strip()) for process in both if process.stdout)
        both[0].kill()
        both[0].wait()
        assert (killed / "model.onnx").exists()
        with workspace(tmp_path) as place:
            assert set(tmp_path.iterdir()) == {running, place}
            assert (running / "model.onnx").exists()
    finally:
        for process in both:
            process.kill()
            process.communicate()
    with workspace(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_just_being_made_is_not_swept(tmp_path: Path) -> None:
    made = tmp_path / ".cellseg-0123456789abcdef"
    made.mkdir()
    lock = made / ".cellseg-lock"
    lock.touch()  # made, but not held yet
    with workspace(tmp_path):
        assert lock.exists()
    os.utime(lock, (0, 0))  # nobody takes that long
    with workspace(tmp_path):
        assert not made.exists()
    made.mkdir()  # not even the lock was made yet
    with workspace(tmp_path):
        assert made.exists()
    os.utime(made, (0, 0))
    with workspace(tmp_path):
        assert not made.exists()


def test_of_others_in_the_same_folder_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /tmp, where anybody may make a folder or a link of that name."""
    theirs, elsewhere = tmp_path / ".cellseg-0123456789abcdef", tmp_path / "elsewhere"
    for folder in (theirs, elsewhere):
        folder.mkdir()
        (folder / "data").touch()
    (tmp_path / ".cellseg-fedcba9876543210").symlink_to(elsewhere)
    owner = theirs.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with workspace(tmp_path):
        pass
    assert sorted(path.name for path in theirs.iterdir()) == ["data"]
    monkeypatch.undo()
    with workspace(tmp_path):
        pass
    assert not theirs.exists()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["data"]


def test_a_network_that_finds_nothing_needs_unverified(
    silent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    exporter_gives(monkeypatch, silent / "model.onnx")
    path = tmp_path / "model.onnx"
    assert call("onnx", silent, "-o", path, "-q") == 5
    error = capsys.readouterr().err
    assert "parity inconclusive" in error
    assert "the reference found 0 cells in 4 images" in error
    assert "--unverified writes it anyway" in error
    assert not path.exists()
    assert json.loads((tmp_path / "model.refused.json").read_bytes())["verdict"] == "inconclusive"


def test_an_unverified_model_says_so(silent: Path, capsys: Any) -> None:
    spec = onnx_file.read_model_file(silent / "model.onnx").spec
    assert spec.parity.startswith("unverified: too few cells to judge by, only tensors were compared; 0 cells")
    assert call("verify", silent, silent / "model.onnx", "-q") == 5
    said = capsys.readouterr()
    assert said.out == ""
    assert "model.onnx: parity inconclusive under policy fp32\n  - " in said.err  # quiet is never mute
    assert "0 cells in 4 images" in said.err


def test_unverified_still_wants_tensors_that_agree(
    silent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    exporter_gives(monkeypatch, silent / "model.onnx", swap_mean_and_std)
    assert call("onnx", silent, "-o", tmp_path / "model.onnx", "-q", "--unverified") == 5
    error = capsys.readouterr().err
    # A network that finds nothing hides its faults near 0: the probabilities alone would pass.
    report = json.loads((tmp_path / "model.refused.json").read_bytes())
    assert max(row["max"] for row in report["tensors"].values()) < 1e-3
    assert "diverge at normalise:" in error
    assert not (tmp_path / "model.onnx").exists()


# --- sizes and mistakes


def test_another_tile_size_is_the_same_network_on_more_context(run: Path) -> None:
    network = load_network(run)
    larger = export.with_tiles(network, tile_size=168)
    assert (larger.spec.tile_size, larger.spec.halo) == (168, 24)
    assert larger.spec.training.val_metrics == {}  # measured with other tiles
    assert export.with_tiles(network, tile_size=112, halo=16) is network
    assert export.with_tiles(network, tile_size=168, halo=9).spec.halo == 9
    narrow = export.with_tiles(network, halo=5)
    assert (narrow.spec.tile_size, narrow.spec.halo, narrow.spec.training.val_metrics) == (112, 5, {})
    assert narrow.net is network.net
    _, image = next(sample_images(network.spec).load())
    counts = [Segmenter(TorchBackend(each))(image).count for each in (network, larger)]
    assert counts[0] > 60
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


def test_too_large_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 2**20)
    with pytest.raises(ModelError, match=r"GiB; an ONNX file with embedded weights is limited to 2 GiB"):
        export.check_size(random_network(TINY).net)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["onnx", "{run}", "-o", "{tmp}/model.pb"], 2, "must end in .onnx"),
        (["onnx", "{run}", "-o", "{tmp}/none/model.onnx"], 6, "no such folder"),
        (["onnx", "{tmp}", "-o", "{tmp}/model.onnx"], 5, "no trained network"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--opset", "23"], 2, "opset"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--tile-size", "100"], 2, "tile_size"),
        (["onnx", "{run}", "-o", "{tmp}/model.onnx", "--halo", "56"], 2, "halo of 56 px does not fit a tile of 112 px"),
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


def test_an_attention_operator_or_a_late_cast_is_noticed(exported: Path) -> None:
    model = onnx.load(exported)
    check_graph(model, opset=20)
    with pytest.raises(ModelError, match="expected opset 21"):
        check_graph(model, opset=21)
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    next(attribute for attribute in resize.attribute if attribute.name == "mode").s = b"cubic"
    with pytest.raises(ModelError, match="position embedding"):
        check_graph(model, opset=20)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Attention"
    with pytest.raises(ModelError, match="1 Attention: TensorRT refuses it"):
        check_graph(model, opset=20)
    model.graph.node[0].op_type = "Identity"
    with pytest.raises(ModelError, match="expected one Cast"):
        check_graph(model, opset=20)


def test_info_shows_everything(run: Path, exported: Path, capsys: Any) -> None:
    assert call("info", exported) == 0
    text = capsys.readouterr().out
    file = onnx_file.read_model_file(exported)
    for shown in (file.identity, file.file_sha256, "parity", "counting", "seed_threshold", "opset", "cell_diameter_px"):
        assert shown in text
    assert call("info", run, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["spec"]["name"] == "test"
    assert content["network"]["encoder"] == "tiny"


def test_settings_that_cannot_be_meant(tmp_path: Path) -> None:
    network = random_network(TINY)
    with pytest.raises(UsageError, match="opset must be 20 to 22, got 23"):
        export.write_graph(network, tmp_path / "model.onnx", opset=23)
    with pytest.raises(OutputError, match="no such folder"):
        export.export_onnx(network, tmp_path / "none" / "model.onnx")


def test_sample_images_are_always_the_same_and_of_the_models_scale() -> None:
    spec = random_network(TINY).spec
    first, again = (list(sample_images(spec, 2).load()) for _ in range(2))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert first[0][1].shape == (320, 427, 3)  # 1200 x 1600 with cells of 90 px, brought to cells of 24
    halved = msgspec.structs.replace(spec, image_scale=0.5)
    assert next(sample_images(halved).load())[1].shape == (640, 853, 3)


@pytest.mark.parametrize(("package", "extra"), [("onnxruntime", r"\[cpu\]"), ("onnxscript", r"\[export\]")])
def test_a_missing_package_is_named_before_work_begins(
    package: str, extra: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert call("onnx", run, "-o", tmp_path / "model.onnx") == 8
    assert re.search(rf"(missing packages|not installed).*pip install 'cellseg-deploy{extra}'", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
