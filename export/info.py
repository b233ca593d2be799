"""The full description of any form of a network, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models.spec import ModelSpec
from cellseg_export.info_packages import describe_bioimageio, describe_triton, is_triton


def describe(path: Path) -> dict[str, Any]:
    """Describe ``path``: a model file in any form, or the folder of a training run, Triton entry or Triton repository.

    Under ``file`` and ``spec``, ready for JSON. The file is checked as before a run. Raises
    ``ModelError``, or ``UsageError`` for any other kind of file.
    """
    if path.suffix.lower() == ".onnx":
        return _describe_onnx(path)
    if path.suffix.lower() == ".engine":
        return _describe_engine(path)
    if path.suffix.lower() == ".xml":
        return _describe_openvino(path)
    if path.suffix.lower() == ".zip":
        return describe_bioimageio(path)
    if path.is_dir() and is_triton(path):
        return describe_triton(path)
    if path.is_dir() or path.suffix.lower() == ".safetensors":
        return _describe_weights(path)
    raise UsageError(
        f"{path}: expected an .onnx, an .xml, an .engine, a bioimage.io .zip, a model.safetensors, or the folder of a "
        "training run, of a Triton entry or of a Triton repository"
    )


def needs_torch(path: Path) -> bool:
    """Whether PyTorch is needed to read ``path``: only for weights and training runs."""
    return path.suffix.lower() == ".safetensors" or (path.is_dir() and not is_triton(path))


def as_text(description: dict[str, Any]) -> str:
    """``description`` as aligned lines; nested values are indented."""
    return "\n".join(_lines(description, indent=0))


def _describe_onnx(path: Path) -> dict[str, Any]:
    from collections import Counter

    import numpy as np
    import onnx

    from cellseg_deploy.models.onnx_file import read_model_file

    checked = read_model_file(path)
    graph = onnx.load_model_from_string(checked.data).graph
    operators = Counter(node.op_type for node in graph.node)
    return {
        "file": {
            "path": str(path),
            "form": "onnx",
            "precision": checked.precision,
            "bytes": len(checked.data),
            "parameters": int(sum(np.prod(t.dims, dtype=np.int64) for t in graph.initializer)),
            "opset": checked.opset,
            "nodes": sum(operators.values()),
            "operators": dict(sorted(operators.items())),
            "identity": checked.identity,
            "sha256": checked.file_sha256,
        },
        "spec": _builtins(checked.spec),
    }


def _describe_engine(path: Path) -> dict[str, Any]:
    """Describe an engine from its sidecar, and whether the sidecar matches these bytes; the engine is not opened."""
    import hashlib

    from cellseg_deploy.backends.tensorrt_sidecar import read_sidecar

    sidecar = read_sidecar(path)
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: the engine cannot be read ({error.strerror})") from error
    facts = msgspec.to_builtins(sidecar)
    spec = facts.pop("spec")
    facts.pop("parity_report")  # long, and next to the engine in its own file
    head = {"path": str(path), "form": "tensorrt engine", "whole": digest == sidecar.engine_sha256}
    return {"file": head | facts, "spec": spec}


def _describe_openvino(path: Path) -> dict[str, Any]:
    """Describe the .xml; needs OpenVINO, which reads and checks it."""
    from cellseg_deploy.backends.openvino import read_ir

    file = read_ir(path)
    head = {"path": str(path), "form": "openvino", "bytes": len(file.xml) + len(file.bin), "sha256": file.file_sha256}
    return {"file": head | msgspec.to_builtins(file.facts), "spec": _builtins(file.spec)}


def _describe_weights(path: Path) -> dict[str, Any]:
    import hashlib

    from cellseg_train.checkpoint import WEIGHTS_FILE, load_network

    network = load_network(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "file": {
            "path": str(file),
            "form": "pytorch weights",
            "precision": "fp32",
            "bytes": file.stat().st_size,
            "parameters": sum(parameter.numel() for parameter in network.net.parameters()),
            "sha256": digest,
        },
        "network": asdict(network.config),
        "spec": _builtins(network.spec),
    }


def _builtins(spec: ModelSpec) -> Any:
    return msgspec.to_builtins(spec)


def _lines(value: dict[str, Any], indent: int) -> list[str]:
    width = max((len(key) for key in value), default=0)
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            lines += [f"{' ' * indent}{key}", *_lines(entry, indent + 2)]
        else:
            shown = ", ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry) if entry != {} else ""
            lines.append(f"{' ' * indent}{key:<{width}}  {shown}".rstrip())
    return lines
