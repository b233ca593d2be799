"""The network's shapes, its settings, and what it refuses to be."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from small_encoders import shrink_encoders
from torch.utils._python_dispatch import TorchDispatchMode

from cellseg_deploy.errors import UsageError
from cellseg_train.config import ModelConfig
from cellseg_train.fp32 import full_fp32, uses_tf32
from cellseg_train.model import CellSegNet, Normalise, enliven_layer_scale

SMALL = {"tiny_width": 48, "tiny_depth": 2, "decoder_channels": (16, 16, 8), "image_skip": (8, 8, 8)}


def run(config: ModelConfig) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.inference_mode():
        return CellSegNet(config).eval()(torch.randn(2, 3, config.tile_size, config.tile_size))


@pytest.mark.parametrize(("variant", "channels"), [("plain", 1), ("boundary", 2)])
def test_logits_cover_the_tile_and_are_no_probabilities(variant, channels):
    logits = run(ModelConfig(variant=variant, tile_size=112, **SMALL))
    assert logits.shape == (2, channels, 112, 112)
    assert logits.min() < 0


def test_without_image_skip_the_network_never_sees_the_image_at_full_size():
    config = ModelConfig(tile_size=112, **(SMALL | {"image_skip": ()}))
    assert CellSegNet(config).branch is None
    assert run(config).shape == (2, 2, 112, 112)


def test_timm_encoder_with_other_patch_and_extra_tokens():
    pytest.importorskip("timm")
    config = ModelConfig(
        encoder="vit_tiny_patch16_224", tile_size=64, decoder_channels=(16, 16, 8), image_skip=(8, 8, 8)
    )
    assert run(config).shape == (2, 2, 64, 64)


def test_register_tokens_are_not_part_of_the_map():
    config = ModelConfig(encoder="vit_small_patch14_reg4_dinov2", tile_size=56, decoder_channels=(16, 16, 8))
    net = CellSegNet(config)
    assert net.encoder.num_prefix_tokens == 5
    seen = []
    net.decoder.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 3, 56, 56)
    assert net(image).shape == (1, 2, 56, 56)
    tokens = net.encoder.forward_features(image)
    assert torch.equal(seen[0][0, :, 1, 2], tokens[0, 5 + 1 * 4 + 2])  # row 1, column 2 of 4 x 4 patches


def test_aliases_name_dinov2():
    names = {alias: ModelConfig(encoder=alias).encoder_name for alias in ("small", "base", "large", "tiny")}
    assert names == {
        "small": "vit_small_patch14_dinov2",
        "base": "vit_base_patch14_dinov2",
        "large": "vit_large_patch14_dinov2",
        "tiny": "tiny",
    }


def test_the_position_embedding_is_made_for_the_tile():
    config = ModelConfig(encoder="small", tile_size=112, decoder_channels=(16, 16, 8))
    assert CellSegNet(config).encoder.pos_embed.shape[1] == 8 * 8 + 1


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 120}, "not a multiple of the 14 px patch.*112 or 168"),
        ({"tile_size": 126}, "multiple of 8"),
        ({"encoder": "vit_huge_patch99_nowhere"}, "not known to timm"),
        ({"encoder": "resnet18"}, "ResNet, expected a plain vision transformer|cannot be built"),
        ({"decoder_channels": (64, 32)}, "three positive numbers"),
        ({"image_skip": (1, 2)}, "three positive numbers"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_with_a_way_out(settings, message):
    with pytest.raises(UsageError, match=message):
        CellSegNet(ModelConfig(**settings))


def test_layer_scale_is_enlivened_so_that_blocks_matter():
    net = CellSegNet(ModelConfig(encoder="small", tile_size=56, decoder_channels=(16, 16, 8))).eval()
    image = torch.randn(1, 3, 56, 56)

    def effect_of_last_block() -> float:
        with torch.inference_mode():
            before = net(image)
            kept = net.encoder.blocks[11].mlp.fc2.weight.clone()
            net.encoder.blocks[11].mlp.fc2.weight.mul_(-3)
            after = net(image)
            net.encoder.blocks[11].mlp.fc2.weight.copy_(kept)
        return float((after - before).abs().max())

    asleep = effect_of_last_block()
    assert enliven_layer_scale(net, 0.5) == 24
    assert effect_of_last_block() > 100 * asleep


def test_normalise_centres_on_the_mean_colour():
    config = ModelConfig()
    mean_colour = torch.tensor(config.mean).view(1, 3, 1, 1) * 255
    normalise = Normalise(config)
    assert normalise(mean_colour).abs().max() < 1e-6
    assert normalise(torch.full((1, 3, 1, 1), 255.0))[0, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229)


def test_normalise_makes_no_tensor_of_its_own_at_a_call():
    """On a GPU each would be a copy from the host, and a wait."""

    class Operators(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    normalise = Normalise(ModelConfig())
    images = torch.zeros(1, 3, 2, 2)
    with Operators():
        normalise(images)
    assert Operators.names == ["sub.Tensor", "div.Tensor"]
    assert not normalise.state_dict()  # files of networks stay as they are
    assert normalise.to("meta").mean.device.type == "meta"


def test_fp32_is_fp32():
    """PyTorch's default for convolutions on a GPU is TF32, which no engine here is opened with."""
    for switch in (torch.backends.cudnn, torch.backends.cuda.matmul):
        full_fp32()
        assert not uses_tf32()
        switch.allow_tf32 = True
        assert uses_tf32()
    full_fp32()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


@pytest.mark.parametrize(("encoder", "prefix"), [("vit_small_patch16_dinov3", 5), ("uni", 1)])
def test_patches_of_16_give_their_own_grid(monkeypatch, encoder, prefix):
    shrink_encoders(monkeypatch, depth=2, embed_dim=48, num_heads=3)
    config = ModelConfig(encoder=encoder, tile_size=64, decoder_channels=(16, 16, 8), image_skip=(8, 8, 8))
    net = CellSegNet(config)
    assert (net.patch_size, net.grid, net.encoder.num_prefix_tokens) == (16, 4, prefix)
    assert not net.encoder.dynamic_img_size  # positions are constants of an exported graph
    assert run(config).shape == (2, 2, 64, 64)
    assert enliven_layer_scale(net, 0.5) == 4
    with pytest.raises(
        UsageError, match=r"not a multiple of the 16 px patch.*use 112 or 128|cannot be built for tiles"
    ):
        CellSegNet(ModelConfig(encoder=encoder, tile_size=120, decoder_channels=(16, 16, 8)))


def test_uni_is_the_large_vit_16_with_layer_scale():
    with torch.device("meta"):
        encoder = CellSegNet(ModelConfig(encoder="uni", tile_size=224)).encoder
    assert (encoder.embed_dim, len(encoder.blocks), encoder.patch_embed.num_patches) == (1024, 24, 14 * 14)
    names = dict(encoder.named_parameters())
    assert "blocks.23.ls1.gamma" in names
    assert "cls_token" in names
    assert "head.weight" not in names


def test_an_unknown_dinov3_names_its_neighbours_and_the_version():
    with pytest.raises(UsageError, match=r"not known to timm .*vit_small_patch16_dinov3.*timm 1\.0\.20"):
        CellSegNet(ModelConfig(encoder="vit_smal_patch16_dinov3", tile_size=64))
