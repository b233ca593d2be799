"""The model shipped with the package, with its card and its weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cellseg_deploy.errors import ModelError
from cellseg_deploy.files.fingerprint import sha256_of

DEFAULT_SHA256 = "00a64ec6150db1c2111b14235a4bea32f4b4a6517f723842cf98c251d6ac9e9e"
"""SHA-256 of the shipped default.onnx, updated by hand with each new model, so that no other file passes for it."""


def default_model_path() -> Path:
    """Path of the shipped model; raises ``ModelError`` if it is missing from this installation or was modified."""
    path = Path(__file__).with_name("default.onnx")
    if not path.is_file():
        raise ModelError(
            f"no model ships with this installation ({path} does not exist); give one as `model`, "
            "or make one with cellseg-train and cellseg-export"
        )
    if (found := _sha256(path)) != DEFAULT_SHA256:
        raise ModelError(
            f"{path}: not the model that this version ships with (SHA-256 {found}, expected {DEFAULT_SHA256}); "
            "install cellseg-deploy again, or pass the file as `model` to use it anyway"
        )
    return path


@cache
def _sha256(path: Path) -> str:
    return sha256_of(path)


def default_weights_path() -> Path:
    """Path of the model's PyTorch weights, from which other forms are made; raises ``ModelError`` if missing."""
    path = Path(__file__).with_name("default.safetensors")
    if not path.is_file():
        raise ModelError(f"no weights ship with this installation ({path} does not exist); give a training run")
    return path
