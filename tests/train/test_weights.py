"""Checkpoints of the outside world: those that fit, those that fit in part, and those that are something else."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import make_spec
from small_encoders import shrink_encoders
from timm.layers import resample_abs_pos_embed

from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models import default_weights_path
from cellseg_train import weights
from cellseg_train.checkpoint import load_network, save_network
from cellseg_train.config import ModelConfig
from cellseg_train.model import CellSegNet

SMALL = ModelConfig(encoder="small", tile_size=56, decoder_channels=(16, 16, 8), image_skip=())
TINY = ModelConfig(
    tile_size=56, tiny_width=48, tiny_depth=1, decoder_channels=(16, 16, 8), image_skip=(), variant="plain"
)


@pytest.fixture(scope="module")
def donor() -> dict[str, torch.Tensor]:
    """A DINOv2 ViT-S/14 as timm keeps it: made for 518 px, with 37 x 37 positions."""
    torch.manual_seed(1)
    return timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).state_dict()


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as the official DINOv2 release has them: timm's names, and a mask token besides."""
    return state | {"mask_token": torch.zeros(1, 384)}


def test_a_timm_checkpoint_is_loaded_and_its_positions_resampled(donor, tmp_path):
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(donor, path)
    net = CellSegNet(SMALL)
    info = weights.load_initial_weights(net, str(path))
    assert torch.equal(net.encoder.blocks[3].mlp.fc1.weight, donor["blocks.3.mlp.fc1.weight"])
    assert net.encoder.pos_embed.shape[1] == 17
    assert "vit.safetensors" in info.origin


@pytest.mark.parametrize("wrapper", [None, "model", "teacher"])
def test_an_official_dinov2_checkpoint_is_loaded(donor, tmp_path, wrapper):
    state = official(donor)
    if wrapper == "teacher":
        state = {f"backbone.{key}": value for key, value in state.items()}
    path = tmp_path / "dinov2_vits14.pth"
    torch.save(state if wrapper is None else {wrapper: state}, path)
    net = CellSegNet(SMALL)
    weights.load_initial_weights(net, str(path))
    assert torch.equal(net.encoder.blocks[11].attn.qkv.weight, donor["blocks.11.attn.qkv.weight"])


def test_a_partial_match_is_an_error_that_lists_the_keys(donor, tmp_path):
    state = {key: value for key, value in donor.items() if not key.startswith("blocks.7.")} | {"extra": torch.ones(1)}
    path = tmp_path / "part.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(ModelError, match=r"missing: blocks\.7\..*unexpected: extra"):
        weights.load_initial_weights(CellSegNet(SMALL), str(path))


def test_weights_of_another_width_are_an_error(donor, tmp_path):
    path = tmp_path / "small.safetensors"
    safetensors.torch.save_file(donor, path)
    base = CellSegNet(ModelConfig(encoder="base", tile_size=56, decoder_channels=(16, 16, 8), image_skip=()))
    with pytest.raises(ModelError, match="size mismatch"):
        weights.load_initial_weights(base, str(path))


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_pickled_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "trap.pth"
    torch.save({"model": Trap()}, path)
    with pytest.raises(ModelError, match="cannot be read as weights"):
        weights.load_initial_weights(CellSegNet(SMALL), str(path))
    plain = tmp_path / "trap.pkl"
    plain.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match="cannot be read as weights"):
        weights.load_initial_weights(CellSegNet(SMALL), str(plain))
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "source", "message"),
    [
        (TINY, "hub", "tiny encoder has no published weights"),
        (TINY, "nowhere.pth", "no such file"),
        (SMALL, "/", "no such file"),
        (TINY, "hf-hub:timm/vit", "tiny encoder has no published weights"),
        (SMALL, "hf-hub:uni", "expected hf-hub:OWNER/NAME"),
    ],
)
def test_sources_that_cannot_be_meant(config, source, message):
    with pytest.raises(UsageError, match=message):
        weights.load_initial_weights(CellSegNet(config), source)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files_are_one_clear_error(tmp_path, content, suffix):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        weights.load_initial_weights(CellSegNet(SMALL), str(path))


def save_own(path: Path, config: ModelConfig) -> CellSegNet:
    net = CellSegNet(config)
    save_network(path, net.state_dict(), config, make_spec(tile_size=56, name="mother"))
    return net


def test_a_network_of_our_own_is_fine_tuned_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    mother = save_own(path, TINY)
    child = CellSegNet(TINY)
    info = weights.load_initial_weights(child, str(path))
    assert torch.equal(child.decoder.head.weight, mother.decoder.head.weight)
    assert "fine-tuned from mother" in info.origin


def test_a_network_of_our_own_is_fine_tuned_at_another_tile_size(tmp_path):
    path = tmp_path / "model.safetensors"
    mother = save_own(path, TINY)
    child = CellSegNet(ModelConfig(**{**TINY.__dict__, "tile_size": 112}))
    weights.load_initial_weights(child, str(path))
    assert torch.equal(child.decoder.head.weight, mother.decoder.head.weight)
    expected = resample_abs_pos_embed(mother.encoder.pos_embed, [8, 8], num_prefix_tokens=0)
    assert torch.equal(child.encoder.pos_embed, expected)


def test_the_shipped_network_is_a_start_at_the_default_tile_size():
    net = CellSegNet(ModelConfig())
    info = weights.load_initial_weights(net, "shipped")
    shipped = load_network(default_weights_path())
    assert torch.equal(net.decoder.head.weight, shipped.net.decoder.head.weight)
    assert f"fine-tuned from {shipped.spec.name}" in info.origin
    assert weights.taught_diameter_px("shipped") == shipped.spec.cell_diameter_px
    assert weights.taught_diameter_px("none") is None


def test_a_network_of_our_own_with_another_decoder_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_own(path, TINY)
    other = CellSegNet(ModelConfig(**{**TINY.__dict__, "image_skip": (8, 8, 8)}))
    with pytest.raises(ModelError, match=r"branch\.|size mismatch"):
        weights.load_initial_weights(other, str(path))


def of_classes(*names: str) -> ModelConfig:
    return replace(TINY, classes=names)


def test_a_network_without_classes_lends_all_but_the_class_head(tmp_path):
    path = tmp_path / "own.safetensors"
    mother = save_own(path, TINY)
    net = CellSegNet(of_classes("red", "white"))
    begun = net.decoder.class_head.weight.clone()
    weights.load_initial_weights(net, str(path))
    state = net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in mother.state_dict().items())
    assert torch.equal(net.decoder.class_head.weight, begun)
    said = weights.class_remark(net.config, str(path))
    assert said == (
        f"classes: red, white from random weights (--weights {path} has no such class); the rest is taken from there"
    )


def test_classes_that_both_networks_have_keep_their_weights(tmp_path):
    path = tmp_path / "own.safetensors"
    mother = save_own(path, of_classes("red", "white", "platelet"))
    net = CellSegNet(of_classes("infected", "platelet", "red"))
    begun = net.decoder.class_head.weight.clone()
    weights.load_initial_weights(net, str(path))
    given = mother.decoder.class_head
    assert torch.equal(net.decoder.class_head.weight[:4], begun[:4])
    assert torch.equal(net.decoder.class_head.weight[4:8], given.weight[8:12])
    assert torch.equal(net.decoder.class_head.bias[8:], given.bias[:4])
    said = weights.class_remark(net.config, str(path))
    assert "platelet, red as in --weights" in said
    assert "infected from random weights" in said
    same = CellSegNet(of_classes("red", "white", "platelet"))
    weights.load_initial_weights(same, str(path))
    assert torch.equal(same.decoder.class_head.weight, given.weight)
    assert weights.class_remark(same.config, str(path)) == ""


def test_classes_are_left_out_where_none_are_asked_for(tmp_path):
    path = tmp_path / "own.safetensors"
    mother = save_own(path, of_classes("red", "white"))
    net = CellSegNet(TINY)
    weights.load_initial_weights(net, str(path))
    assert torch.equal(net.decoder.head.weight, mother.decoder.head.weight)
    assert "(red, white) are left out; give --classes" in weights.class_remark(TINY, str(path))


def test_the_hub_out_of_reach_says_what_to_do_instead(monkeypatch):
    def unreachable(*_: object, **options: object) -> None:
        assert options["pretrained"]
        raise OSError("no network")

    net = CellSegNet(SMALL)
    monkeypatch.setattr(weights.timm, "create_model", unreachable)
    with pytest.raises(UsageError, match="--weights FILE"):
        weights.load_initial_weights(net, "hub")


DINOV3 = ModelConfig(encoder="vit_small_patch16_dinov3", tile_size=64, decoder_channels=(16, 16, 8), image_skip=())
UNI = ModelConfig(encoder="uni", tile_size=64, decoder_channels=(16, 16, 8), image_skip=())


def test_a_uni_checkpoint_is_loaded_and_its_positions_resampled(tmp_path, monkeypatch):
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    state = timm.create_model("vit_large_patch16_224", init_values=1e-5, num_classes=0).state_dict()
    assert state["pos_embed"].shape[1] == 14 * 14 + 1
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    net = CellSegNet(UNI)
    weights.load_initial_weights(net, str(path))
    assert torch.equal(net.encoder.blocks[1].ls2.gamma, state["blocks.1.ls2.gamma"])
    assert torch.equal(net.encoder.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    assert net.encoder.pos_embed.shape[1] == 4 * 4 + 1


def test_a_plain_vit_without_layer_scale_is_not_uni(tmp_path, monkeypatch):
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    path = tmp_path / "vit.bin"
    torch.save(timm.create_model("vit_large_patch16_224", num_classes=0).state_dict(), path)
    with pytest.raises(ModelError, match=r"missing: blocks\.0\.ls1\.gamma"):
        weights.load_initial_weights(CellSegNet(UNI), str(path))


def as_official_dinov3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of Meta's release, with what belongs to its training only."""
    renamed = {
        key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens"): v
        for key, v in state.items()
    }
    return renamed | {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}


@pytest.mark.parametrize("names", [lambda state: state, as_official_dinov3], ids=["timm", "meta"])
def test_a_dinov3_checkpoint_is_loaded(tmp_path, monkeypatch, names):
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    torch.manual_seed(5)
    state = timm.create_model("vit_small_patch16_dinov3", num_classes=0).state_dict()
    path = tmp_path / "dinov3.pth"
    torch.save(names(state), path)
    net = CellSegNet(DINOV3)
    assert not torch.equal(net.encoder.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    weights.load_initial_weights(net, str(path))
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.gamma_1", "reg_token", "cls_token", "norm.weight"):
        assert torch.equal(net.encoder.get_parameter(name), state[name])


def test_hub_repositories_are_asked_for_by_their_name(monkeypatch):
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    donor = timm.create_model("vit_large_patch16_224", init_values=1e-5, num_classes=0).state_dict()
    asked = []

    def fetch(name: str) -> dict[str, torch.Tensor]:
        asked.append(name)
        return donor

    monkeypatch.setattr(weights, "load_state_dict_from_hf", fetch)
    for source in ("hub", "hf-hub:lab/other-uni"):
        net = CellSegNet(UNI)
        info = weights.load_initial_weights(net, source)
        assert torch.equal(net.encoder.blocks[0].mlp.fc1.weight, donor["blocks.0.mlp.fc1.weight"])
        assert asked[-1] in info.origin
    assert asked == ["MahmoodLab/UNI", "lab/other-uni"]
    monkeypatch.setattr(weights, "load_state_dict_from_hf", lambda _: 1 / 0)
    with pytest.raises(UsageError, match=r"MahmoodLab/UNI.*--weights FILE"):
        weights.load_initial_weights(CellSegNet(UNI), "hub")
