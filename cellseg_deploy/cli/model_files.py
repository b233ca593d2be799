"""Model files that ``cellseg-evaluate`` rewrites with another description: ``.onnx``, ``.safetensors``.

Graph and weights are unchanged, and a file that holds another network is never replaced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from cellseg_deploy.errors import ModelError, OutputError
from cellseg_deploy.models import default_model_path, onnx_file, safetensors_file
from cellseg_deploy.models.spec import ModelSpec

ONNX = ".onnx"


@dataclass(frozen=True)
class DescribedModel:
    """``identity``: of graph and weights; files of one kind with the same identity compute the same.

    ``rewritten``: bytes of the file with another spec.
    """

    path: Path
    spec: ModelSpec
    identity: str
    rewritten: Callable[[ModelSpec], bytes]


def read(path: Path | None) -> DescribedModel:
    """Read the model at ``path`` (None: the shipped one) without running it. Raises ``ModelError``."""
    path = path or default_model_path()
    if path.suffix.lower() == safetensors_file.SUFFIX:
        weights = safetensors_file.read_weights_file(path)
        return DescribedModel(path, weights.spec, weights.identity, lambda s: safetensors_file.rewritten(weights, s))
    model = onnx_file.read_model_file(path)
    return DescribedModel(path, model.spec, model.identity, lambda spec: onnx_file.rewritten(model, spec))


def check_target(out: Path, model: DescribedModel, inputs: Sequence[Path]) -> None:
    """Raise ``UsageError`` if ``out`` is not a file for ``model`` or is among ``inputs``, ``OutputError`` if it holds
    anything but this network."""
    suffix = model.path.suffix.lower()
    if out.suffix.lower() != suffix:
        raise click.UsageError(f"OUT is the model file to write, ending in {suffix} as {model.path} does; got {out}")
    for folder in inputs:
        if out.resolve().parent == folder.resolve():
            raise click.UsageError(f"{out} is in the folder of images or masks {folder}; choose another folder for it")
    if not os.path.lexists(out):
        return
    try:
        identity = read(out).identity
    except ModelError as error:
        raise OutputError(
            f"{out}: not replaced, because it is not a cellseg model file ({error}); choose another name"
        ) from error
    if identity != model.identity:
        raise OutputError(
            f"{out}: holds a different network from {model.path}, so it is not replaced; choose another name"
        )
