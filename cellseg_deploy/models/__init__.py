"""The model that ships with the package, with its card and its weights."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import ModelError


def default_model_path() -> Path:
    """Path of the shipped model; raises ``ModelError`` if this installation has none."""
    path = Path(__file__).with_name("default.onnx")
    if not path.is_file():
        raise ModelError(
            f"no model ships with this installation ({path} does not exist); give one with --model, "
            "or make one with cellseg-train and cellseg-export"
        )
    return path


def default_weights_path() -> Path:
    """The same model as PyTorch weights, which other forms are made from; ``ModelError`` if they are not here."""
    path = Path(__file__).with_name("default.safetensors")
    if not path.is_file():
        raise ModelError(f"no weights ship with this installation ({path} does not exist); give a training run")
    return path
