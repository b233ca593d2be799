"""The network as deployed: raw tiles in, probabilities out, no preprocessing left to the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from cellseg_train.model import CellSegNet, Normalise


class DeployModule(nn.Module):
    """``tiles`` uint8 (N, S, S, 3) RGB to ``probabilities`` float32 (N, K, S, S)."""

    def __init__(self, net: CellSegNet) -> None:
        super().__init__()
        self.normalise = Normalise(net.config)
        self.net = net
        self.n_maps = len(net.config.map_channels)
        self.has_classes = bool(net.config.classes)

    def forward(self, tiles: Tensor) -> Tensor:
        # The cast comes first: TensorRT accepts uint8 input, but only to cast it.
        images_nchw = tiles.to(torch.float32).permute(0, 3, 1, 2)
        logits = cast(Tensor, self.net(self.normalise(images_nchw)))
        if not self.has_classes:
            return logits.sigmoid()
        return torch.cat([logits[:, : self.n_maps].sigmoid(), logits[:, self.n_maps :].softmax(dim=1)], dim=1)


@contextmanager
def exportable(net: CellSegNet) -> Iterator[None]:
    """While the context lasts, ``net`` computes the same result with operators that every engine supports.

    Attention as matrix products and softmax instead of one fused operator: half precision can then be handled node by
    node. A fixed image size for encoders that accept any: they would resample their position embedding in the graph,
    with an antialiased cubic Resize that TensorRT refuses.
    """
    changes: list[tuple[nn.Module, str, bool]] = [
        (module, "fused_attn", False) for module in net.modules() if getattr(module, "fused_attn", False)
    ]
    if net.encoder.dynamic_img_size:
        changes += [(net.encoder, "dynamic_img_size", False), (net.encoder.patch_embed, "flatten", True)]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in changes:
            setattr(module, name, not value)
