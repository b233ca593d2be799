"""Files that a training run leaves on disk, and how they are read back.

    RUN/
      config.json        every setting, and the folders the data came from
      split.json         training and validation images
      log.csv            one row per epoch
      checkpoint.pt      everything needed to resume (replaced as a whole at the end of an epoch)
      model.safetensors  the best network so far, self-describing: settings and ModelSpec in its metadata
      tensorboard/, samples/

Files that a later step reads appear whole or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.files.atomic import atomic_file, write_bytes, writing
from cellseg_deploy.models.spec import METADATA_KEY, ModelSpec, from_json, to_json
from cellseg_train.config import ModelConfig, TrainConfig
from cellseg_train.model import CellSegNet

MODEL_CONFIG_KEY = "cellseg_model"
WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.pt"
CONFIG_FILE = "config.json"
SPLIT_FILE = "split.json"
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class LoadedNetwork:
    """A trained network in eval mode on the CPU, with the description stored in its file."""

    net: CellSegNet
    config: ModelConfig
    spec: ModelSpec


@dataclass(frozen=True)
class RunInputs:
    """Folders a training run reads, and its class files, as passed; absolute."""

    images: tuple[str, ...]
    masks: tuple[str, ...]
    val_images: tuple[str, ...] = ()
    val_masks: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """Content of ``config.json``: settings and inputs of a run."""

    config: TrainConfig
    inputs: RunInputs
    data_note: str = ""
    version: int = CHECKPOINT_VERSION


def save_record(run: Path, record: RunRecord) -> None:
    """Write ``config.json``."""
    write_bytes(run / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(record), indent=2))


def load_record(run: Path) -> RunRecord:
    """Read ``config.json``; ``UsageError`` if ``run`` is not a training run, ``ModelError`` if it cannot be read."""
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{run} is not a training run: it has no {CONFIG_FILE}; give the folder that cellseg-train wrote"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ModelError(f"{path} cannot be read: {error}; it was written by another version or edited") from error


def save_network(path: Path, state: dict[str, Tensor], config: ModelConfig, spec: ModelSpec) -> None:
    """Write weights with their description as one safetensors file. Raises ``ModelError`` if a weight is not finite."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ModelError(f"weights hold NaN or infinity and are not saved: {', '.join(broken[:5])}")
    metadata = {METADATA_KEY: to_json(spec), MODEL_CONFIG_KEY: msgspec.json.encode(config).decode()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def load_network(path: Path) -> LoadedNetwork:
    """Rebuild a network from a RUN folder or its ``model.safetensors``. Raises ``ModelError`` naming the problem."""
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        hint = "the run has not finished its first validation" if path.is_dir() else "give a run folder or its weights"
        raise ModelError(f"no trained network at {file}; {hint}")
    config, spec = read_description(file)
    net = CellSegNet(config)
    state = safetensors.torch.load_file(file)
    missing, unexpected = net.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ModelError(
            f"{file}: weights do not match their own description; {describe_mismatch(missing, unexpected)}"
        )
    return LoadedNetwork(net.eval(), config, spec)


def read_description(file: Path) -> tuple[ModelConfig, ModelSpec]:
    """Settings and spec from the metadata of a safetensors file; ``ModelError`` if cellseg-train did not write it."""
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
    if METADATA_KEY not in metadata or MODEL_CONFIG_KEY not in metadata:
        raise ModelError(f"{file} has no cellseg description; was it written by cellseg-train?")
    try:
        config = msgspec.json.decode(metadata[MODEL_CONFIG_KEY], type=ModelConfig)
    except (msgspec.DecodeError, msgspec.ValidationError, UsageError) as error:
        raise ModelError(f"{file}: network settings cannot be read: {error}") from error
    return config, from_json(metadata[METADATA_KEY], source=str(file))


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Replace ``checkpoint.pt`` in one step: a kill at any moment leaves the old one or the new one."""
    path = run / CHECKPOINT_FILE
    with atomic_file(path) as file, writing(path):
        torch.save({"version": CHECKPOINT_VERSION, **state}, file)


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """Return the last checkpoint, or None if the run stopped before its first. Raises ``ModelError`` if unreadable."""
    path = run / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler raised
        raise ModelError(f"{path} cannot be read ({error}); delete it to start this run again") from error
    if state.get("version") != CHECKPOINT_VERSION:
        raise ModelError(f"{path} has version {state.get('version')}, this program reads {CHECKPOINT_VERSION}")
    return state


def save_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def load_json(path: Path) -> Any:
    """Read what ``save_json`` wrote. Raises ``ModelError`` if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}; the run folder is incomplete") from error


def describe_mismatch(missing: list[str], unexpected: list[str], most: int = 8) -> str:
    """Describe missing and unexpected keys of a file, the first few of each."""

    def some(keys: list[str]) -> str:
        return ", ".join(keys[:most]) + (f", ... ({len(keys)} in all)" if len(keys) > most else "")

    return "; ".join(
        f"{title}: {some(keys)}" for title, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    )
