"""The network: a ViT encoder, a stepwise up-sampling decoder, one logit map per channel.

    image (N, 3, S, S) --> ViT --> tokens (S/p x S/p) --> S/8 --> S/4 --> S/2 --> logits (N, K, S, S)
            |                                              ^       ^       ^
            +--> image branch (optional) ------------------+-------+-------+

Each step doubles the map (the first goes from the patch grid to S/8), joins it with the image branch and convolves.
The last doubling is a sub-pixel convolution (Shi et al. 2016): full-resolution 3x3 convolutions on few channels
cost more time than the whole small encoder and gain nothing. Token maps know *what* is a cell, the image branch
knows *where* its edge is; gaps of one or two pixels between cells are lost without it.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cellseg_deploy.errors import UsageError
from cellseg_train.config import ENCODER_ALIASES, ENCODER_ARGUMENTS, TINY, ModelConfig


def build_encoder(config: ModelConfig) -> VisionTransformer:
    """Build the ViT of ``config`` with random weights, for a fixed ``tile_size``.

    The position embedding is made for this size, so an exported graph does not resize it. Raises ``UsageError`` for a
    name unknown to timm, a model that is not a plain ViT, or a tile size that is not a multiple of its patch.
    """
    if config.encoder_name == TINY:
        encoder = VisionTransformer(
            img_size=_checked_tile(config.tile_size, 14, TINY),
            patch_size=14,
            embed_dim=config.tiny_width,
            depth=config.tiny_depth,
            num_heads=config.tiny_heads,
            drop_path_rate=config.drop_path,
            num_classes=0,
            global_pool="",
            class_token=False,
        )
        return cast(VisionTransformer, encoder)
    if not timm.is_model(config.encoder_name):
        near = difflib.get_close_matches(config.encoder_name, timm.list_models("vit_*"), n=5)
        raise UsageError(
            f"encoder {config.encoder!r} is not known to timm {timm.__version__}; near: {', '.join(near) or 'none'}; "
            f"or one of {TINY}, {', '.join(ENCODER_ALIASES)}. DINOv3 needs timm 1.0.20 or newer"
        )
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_path_rate": config.drop_path}
    arguments |= ENCODER_ARGUMENTS.get(config.encoder, {})
    # DINOv3 in timm accepts any size by default; only for a fixed one are its rotary positions constants of the graph.
    arguments["dynamic_img_size"] = False
    try:
        encoder = timm.create_model(config.encoder_name, pretrained=False, img_size=config.tile_size, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"encoder {config.encoder!r} cannot be built for tiles of {config.tile_size} px: {error}"
        ) from error
    if not isinstance(encoder, (VisionTransformer, Eva)):
        raise UsageError(
            f"encoder {config.encoder!r} is a {type(encoder).__name__}, expected a plain vision transformer"
        )
    _checked_tile(config.tile_size, encoder.patch_embed.patch_size[0], config.encoder)
    return cast(VisionTransformer, encoder)


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm and ReLU: engines fold all three into one kernel."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ImageBranch(nn.Module):
    """Shallow features of the image itself at 1/2, 1/4 and 1/8, for edges that tokens of 14 px cannot place."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        eighth, quarter, half = channels
        # A 4x4 kernel with stride 2 sees each full-resolution pixel; with 3x3 every other one weighs less.
        self.to_half = nn.Sequential(ConvNormAct(3, half, kernel=4, stride=2), ConvNormAct(half, half))
        self.to_quarter = nn.Sequential(ConvNormAct(half, quarter, stride=2), ConvNormAct(quarter, quarter))
        self.to_eighth = nn.Sequential(ConvNormAct(quarter, eighth, stride=2), ConvNormAct(eighth, eighth))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps from coarse to fine: 1/8, 1/4, 1/2."""
        half = self.to_half(images)
        quarter = self.to_quarter(half)
        return [self.to_eighth(quarter), quarter, half]


class Decoder(nn.Module):
    """Tokens (and the image branch) to logits, one doubling per step."""

    def __init__(self, embed_dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.sizes = tuple(config.tile_size // factor for factor in (8, 4, 2))
        widths = config.decoder_channels
        skips = config.image_skip or (0,) * len(widths)
        self.project = ConvNormAct(embed_dim, widths[0], kernel=1)
        inputs = (widths[0], *widths[:-1])
        self.steps = nn.ModuleList(
            nn.Sequential(ConvNormAct(before + skip, width), ConvNormAct(width, width))
            for before, skip, width in zip(inputs, skips, widths, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], 4 * len(config.map_channels), 3, padding=1)
        # A separate head: a network without classes, or with other classes, can reuse all other weights.
        self.class_head = nn.Conv2d(widths[-1], 4 * len(config.classes), 3, padding=1) if config.classes else None

    def forward(self, tokens_nchw: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.project(tokens_nchw)
        for i, step in enumerate(self.steps):
            x = F.interpolate(x, size=(self.sizes[i], self.sizes[i]), mode="bilinear", align_corners=False)
            x = step(torch.cat([x, skips[i]], dim=1) if skips else x)
        maps = self.head(x) if self.class_head is None else torch.cat([self.head(x), self.class_head(x)], dim=1)
        return F.pixel_shuffle(maps, 2)


class CellSegNet(nn.Module):
    """Normalised RGB (N, 3, S, S) float to logits (N, K, S, S), K the channels of ``config``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.patch_size = int(self.encoder.patch_embed.patch_size[0])
        self.grid = config.tile_size // self.patch_size
        self.branch = ImageBranch(config.image_skip) if config.image_skip else None
        self.decoder = Decoder(int(self.encoder.embed_dim), config)
        self.normalise = Normalise(config)

    def tokens(self, images: Tensor) -> Tensor:
        """Token map (N, C, S/p, S/p) of the encoder."""
        # forward_features ends in the encoder's final norm; class and register tokens come first.
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)))

    def forward(self, images: Tensor) -> Tensor:
        skips = self.branch(images) if self.branch is not None else []
        return cast(Tensor, self.decoder(self.tokens(images), skips))


class Normalise(nn.Module):
    """Colour normalisation: RGB in 0..255 (N, 3, H, W), float32, to the network's input.

    The exported graph does the same in its first nodes, which are named after this module. Mean and standard deviation
    are buffers that move to the device once, with the module, and are not saved: ``config`` holds them. They must
    stay float32, so a network in half precision needs an instance of its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values).mul(255).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_nchw: Tensor) -> Tensor:
        return (images_nchw - self.mean) / self.std


def probabilities(logits: Tensor, config: ModelConfig) -> Tensor:
    """Convert logits (N, K, H, W) to probabilities: sigmoid per map channel, softmax over the class channels.

    The exported graph ends in the same operations.
    """
    if not config.classes:
        return logits.sigmoid()
    n_maps = len(config.map_channels)
    return torch.cat([logits[:, :n_maps].sigmoid(), logits[:, n_maps:].softmax(dim=1)], dim=1)


def enliven_layer_scale(net: nn.Module, value: float = 0.5) -> int:
    """Set every LayerScale ``gamma`` of a ViT to ``value``; returns how many there were.

    DINOv2 and DINOv3 models start with 1e-5: with random weights their blocks add nothing, and any change of precision
    looks perfect. Comparisons on random weights must call this first.
    """
    count = 0
    for name, parameter in net.named_parameters():
        if name.endswith((".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")):  # timm's ViT; its Eva (DINOv3)
            with torch.no_grad():
                parameter.fill_(value)
            count += 1
    return count


def _checked_tile(tile_size: int, patch: int, encoder: str) -> int:
    if tile_size % patch:
        step = math.lcm(patch, 8)  # the decoder doubles three times
        lower = tile_size // step * step
        raise UsageError(
            f"tile_size {tile_size} is not a multiple of the {patch} px patch of encoder {encoder!r}; "
            f"use {lower or step} or {lower + step}"
        )
    return tile_size
