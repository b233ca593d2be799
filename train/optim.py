"""Parameter groups, schedule and precision of a training."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from cellseg_deploy.errors import BackendUnavailableError
from cellseg_train.config import OptimConfig
from cellseg_train.model import CellSegNet


def make_optimizer(net: CellSegNet, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms without weight decay; encoder blocks scaled by ``layer_decay`` and ``encoder_lr_ratio``.

    The factors are in each group's ``lr_scale``, which timm's schedulers (and only they) apply.
    """
    groups: list[dict[str, Any]] = []
    if config.freeze:
        net.encoder.requires_grad_(False)
    elif config.layer_decay < 1:
        groups += param_groups_layer_decay(
            net.encoder, config.weight_decay, layer_decay=config.layer_decay, no_weight_decay_list=_not_decayed(net)
        )
    else:
        groups += param_groups_weight_decay(net.encoder, config.weight_decay, no_weight_decay_list=_not_decayed(net))
    for group in groups:
        group["lr_scale"] = group.get("lr_scale", 1.0) * config.encoder_lr_ratio
    decoder = torch.nn.ModuleDict({name: module for name, module in net.named_children() if name != "encoder"})
    groups += param_groups_weight_decay(decoder, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then cosine to ``min_lr_ratio * lr`` at the last of ``steps`` updates."""
    warmup = round(config.warmup_fraction * steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps, 1),
        lr_min=config.lr * config.min_lr_ratio,
        warmup_t=warmup,
        warmup_lr_init=config.lr * 1e-3,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def choose_device(name: str) -> torch.device:
    """Device for ``name``; ``auto`` takes CUDA, then Apple's MPS, then the CPU; an unavailable device is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailableError(
            f"{name!r} is not a PyTorch device; use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise BackendUnavailableError(f"device {name!r} is not available to PyTorch here; use --device cpu or auto")
    return device


def choose_amp(mode: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype or None. ``auto`` needs hardware for it: bf16 without AMX ran at half the speed of fp32 on a CPU
    with AVX-512 (measured with a 2048 x 2048 matrix product)."""
    if mode == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return torch.bfloat16 if device.type == "cpu" and has_amx() else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mode]


def _not_decayed(net: CellSegNet) -> set[str]:
    names: set[str] = net.encoder.no_weight_decay()
    return names
