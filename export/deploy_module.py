"""The network as it is deployed: raw tiles in, probabilities out, nothing left for a caller to get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from cellseg_train.config import ModelConfig
from cellseg_train.model import CellSegNet, normalise


class Normalise(nn.Module):
    """Colour normalisation of ``config``; a module, so that its nodes in an exported graph bear a name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, images_nchw: Tensor) -> Tensor:
        return normalise(images_nchw, self.config)


class DeployModule(nn.Module):
    """``tiles`` uint8 (N, S, S, 3) RGB to ``probabilities`` float32 (N, K, S, S)."""

    def __init__(self, net: CellSegNet) -> None:
        super().__init__()
        self.normalise = Normalise(net.config)
        self.net = net

    def forward(self, tiles: Tensor) -> Tensor:
        # The cast comes first: TensorRT takes uint8 input, but only to cast it.
        images_nchw = tiles.to(torch.float32).permute(0, 3, 1, 2)
        return cast(Tensor, self.net(self.normalise(images_nchw)).sigmoid())


@contextmanager
def plain_attention(net: nn.Module) -> Iterator[None]:
    """Attention of timm's blocks as matrix products and softmax while the context lasts, not as one fused operator.

    Those are the nodes that every engine knows and that half precision can be treated with one by one.
    """
    fused = [module for module in net.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
