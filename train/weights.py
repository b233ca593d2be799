"""Starting weights: none, from a hub, from a checkpoint file, or from a network of this package.

``hub``: timm's weights for the encoder; ``hf-hub:OWNER/NAME``: any repository of the Hugging Face hub with a
checkpoint of it (some, such as MahmoodLab/UNI, require an account with access). ``shipped``: the network
that comes with the package.

A checkpoint that fits only in part would silently train from half-random weights; it is an error that lists
the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor

from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models import default_weights_path
from cellseg_deploy.models.spec import WeightsInfo
from cellseg_train.checkpoint import MODEL_CONFIG_KEY, describe_mismatch, read_description
from cellseg_train.config import HUB_PREFIX, SHIPPED, TINY, ModelConfig
from cellseg_train.model import CellSegNet

# Parts of published ViT checkpoints that a segmentation encoder does not use: classifiers, and DINOv2's mask token.
_NOT_ENCODER = ("head.", "head_dist.", "fc_norm.", "mask_token", "dino_head.", "ibot_head.")
_POSITIONS = "encoder.pos_embed"
_CLASS_HEAD = "decoder.class_head."
_WRAPPERS = ("model", "state_dict", "teacher")
_PREFIXES = ("module.", "backbone.")
# Aliases whose weights are not timm's weights for the architecture: repository and licence.
_HUB_OF_ALIAS = {"uni": ("MahmoodLab/UNI", "CC BY-NC-ND 4.0, research only, gated (MahmoodLab/UNI)")}


def load_initial_weights(net: CellSegNet, weights: str) -> WeightsInfo:
    """Fill ``net`` from ``weights`` (``none``, ``hub``, ``shipped`` or a path) and return where they came from.

    Raises ``UsageError`` for a source that does not fit the encoder and ``ModelError`` for an unreadable file or
    one whose keys do not fit.
    """
    check_source(net.config, weights)
    if weights == "none":
        return WeightsInfo(origin="random initialisation", licence="as the training data allows")
    if weights == "hub" and net.config.encoder in _HUB_OF_ALIAS:
        repository, licence = _HUB_OF_ALIAS[net.config.encoder]
        return _from_repository(net, repository, licence)
    if weights == "hub":
        return _from_hub(net)
    if weights.startswith(HUB_PREFIX):
        return _from_repository(net, weights.removeprefix(HUB_PREFIX), "see the model's page on the hub")
    path = _file_of(weights)
    if _is_own(path):
        return _from_own(net, path)
    _load_encoder(net, _fitted(net, _encoder_state(path), str(path)), str(path))
    return WeightsInfo(origin=f"encoder from {path.name}", licence="see the source of the checkpoint")


def _fitted(net: CellSegNet, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """``state`` under timm's names, positions resampled to the tile, without keys that are not the encoder's."""
    module = eva if isinstance(net.encoder, eva.Eva) else vision_transformer
    try:
        fitted: dict[str, Tensor] = module.checkpoint_filter_fn(state, net.encoder)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise ModelError(f"{source} does not fit encoder {net.config.encoder!r}: {error}") from error
    return {key: value for key, value in fitted.items() if not key.startswith(_NOT_ENCODER)}


def check_source(config: ModelConfig, weights: str) -> None:
    """Raise ``UsageError`` if ``weights`` is invalid for this network; reads nothing."""
    if config.encoder_name == TINY and (weights == "hub" or weights.startswith(HUB_PREFIX)):
        raise UsageError("the tiny encoder has no published weights; use --weights none or a file")
    if weights.startswith(HUB_PREFIX):
        owner, _, name = weights.removeprefix(HUB_PREFIX).partition("/")
        if not owner or not name or "/" in name:
            raise UsageError(f"weights {weights!r}: expected {HUB_PREFIX}OWNER/NAME, as in {HUB_PREFIX}MahmoodLab/UNI")
    elif weights == "hub":
        if config.encoder in _HUB_OF_ALIAS:
            return
        source = timm.get_pretrained_cfg(config.encoder_name)
        if source is None or not source.has_weights:
            raise UsageError(f"timm has no weights for {config.encoder_name!r}; use --weights none or a file")
    elif weights not in ("none", SHIPPED) and not Path(weights).is_file():
        raise UsageError(f"weights {weights!r}: no such file; give a checkpoint file, 'shipped', 'hub' or 'none'")


def _from_hub(net: CellSegNet) -> WeightsInfo:
    name = net.config.encoder_name
    source = timm.get_pretrained_cfg(name)
    try:
        donor = timm.create_model(name, pretrained=True, num_classes=0, global_pool="", img_size=net.config.tile_size)
    except Exception as error:  # the hub's client raises many kinds of network errors
        raise UsageError(
            f"weights of {name!r} could not be fetched from the hub ({type(error).__name__}: {error}); "
            "download the checkpoint elsewhere and give it as --weights FILE"
        ) from error
    _load_encoder(net, donor.state_dict(), f"hub {source.hf_hub_id or source.url}")
    return WeightsInfo(origin=f"encoder from {source.hf_hub_id or source.url}", licence=source.license or "unknown")


def _from_repository(net: CellSegNet, repository: str, licence: str) -> WeightsInfo:
    """Load the encoder from ``model.safetensors`` or ``pytorch_model.bin`` of a repository of the Hugging Face hub."""
    try:
        state = load_state_dict_from_hf(repository)
    except Exception as error:  # the hub's client raises many kinds of network errors
        raise UsageError(
            f"weights of {repository!r} could not be fetched from the hub ({type(error).__name__}: {error}); "
            "log in if it wants an account, or download the checkpoint elsewhere and give it as --weights FILE"
        ) from error
    _load_encoder(net, _fitted(net, _unwrapped(state, f"hub {repository}"), f"hub {repository}"), f"hub {repository}")
    return WeightsInfo(origin=f"encoder from {repository}", licence=licence)


def _is_own(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as handle:
            return MODEL_CONFIG_KEY in (handle.metadata() or {})
    except SafetensorError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def _from_own(net: CellSegNet, path: Path) -> WeightsInfo:
    config, spec = read_description(path)
    state = _with_classes_of(net, config, safetensors.torch.load_file(path))
    missing, unexpected = _try_load(net, _resampled(net, state), str(path))
    if missing or unexpected:
        raise ModelError(
            f"{path} holds a {config.encoder}/{config.variant} network that does not fit this one "
            f"({net.config.encoder}/{net.config.variant}); {describe_mismatch(missing, unexpected)}"
        )
    return WeightsInfo(origin=f"fine-tuned from {spec.name}: {spec.weights.origin}", licence=spec.weights.licence)


def _with_classes_of(net: CellSegNet, config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of a network with the classes of ``config``, with a class head for those of ``net``: shared classes
    keep their weights, the others start as in ``net``."""
    state = dict(state)
    for key in [key for key in state if key.startswith(_CLASS_HEAD)]:
        given = state.pop(key)
        if net.config.classes == config.classes:
            state[key] = given
        elif net.config.classes:
            state[key] = _rows_by_class(net, config, net.state_dict()[key].clone(), given)
    if net.config.classes and not config.classes:
        state |= {key: value for key, value in net.state_dict().items() if key.startswith(_CLASS_HEAD)}
    return state


def _rows_by_class(net: CellSegNet, config: ModelConfig, own: Tensor, given: Tensor) -> Tensor:
    """``own`` with the rows of ``given`` for the shared classes. A class has four rows, one per pixel."""
    for number, name in enumerate(net.config.classes):
        if name in config.classes:
            there = config.classes.index(name)
            own[4 * number : 4 * number + 4] = given[4 * there : 4 * there + 4]
    return own


def class_remark(config: ModelConfig, weights: str) -> str:
    """Note on the classes when a network of this package initialises another, empty if the classes are the same."""
    if weights in ("none", "hub") or weights.startswith(HUB_PREFIX):
        return ""
    path = _file_of(weights)
    if not _is_own(path):
        return ""
    there = read_description(path)[0].classes
    if there == config.classes:
        return ""
    if not config.classes:
        return f"the classes of --weights {weights} ({', '.join(there)}) are left out; give --classes to train them too"
    kept = [name for name in config.classes if name in there]
    new = [name for name in config.classes if name not in there]
    begun = [f"{', '.join(kept)} as in --weights {weights}"] if kept else []
    begun += [f"{', '.join(new)} from random weights (--weights {weights} has no such class)"] if new else []
    return f"classes: {'; '.join(begun)}; the rest is taken from there"


def _resampled(net: CellSegNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of a network of this package, positions resampled to the tile of ``net`` by timm's function."""
    positions, wanted = state.get(_POSITIONS), net.encoder.pos_embed
    if positions is None or wanted is None or positions.shape[1] == wanted.shape[1]:
        return state
    prefix = 0 if net.encoder.no_embed_class else net.encoder.num_prefix_tokens
    resampled = resample_abs_pos_embed(positions, [net.grid, net.grid], num_prefix_tokens=prefix)
    return state | {_POSITIONS: resampled}


def taught_diameter_px(weights: str) -> float | None:
    """Median cell diameter in model px that the network ``weights`` was trained on; None for any other start."""
    if weights in ("none", "hub") or weights.startswith(HUB_PREFIX):
        return None
    path = _file_of(weights)
    return read_description(path)[1].cell_diameter_px if _is_own(path) else None


def _file_of(weights: str) -> Path:
    return default_weights_path() if weights == SHIPPED else Path(weights)


def _encoder_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler can raise any error
        raise ModelError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}); "
            "files with other objects than tensors are refused, convert them to safetensors"
        ) from error
    return _unwrapped(content, str(path))


def _unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    """Return the named tensors, without the wrappers that training scripts put around them."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{source} holds no table of named tensors; expected a timm, DINOv2 or DINOv3 checkpoint")
    for prefix in _PREFIXES:
        if content and all(key.startswith(prefix) for key in content):
            content = {key[len(prefix) :]: value for key, value in content.items()}
    state: dict[str, Tensor] = content
    return state


def _load_encoder(net: CellSegNet, state: dict[str, Tensor], source: str) -> None:
    missing, unexpected = _try_load(net.encoder, state, source)
    if missing or unexpected:
        raise ModelError(
            f"{source} does not fit encoder {net.config.encoder!r}; {describe_mismatch(missing, unexpected)}; "
            "choose the --encoder it was made for"
        )


def _try_load(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> tuple[list[str], list[str]]:
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes differ
        raise ModelError(f"{source}: {error}") from error
    return list(result.missing_keys), list(result.unexpected_keys)
