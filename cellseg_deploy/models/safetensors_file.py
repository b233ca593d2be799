"""The ModelSpec in a ``model.safetensors`` that cellseg-train wrote, read and replaced without PyTorch.

A safetensors file is eight bytes (little endian) with the length of a JSON header, the header, and the weights. The
header's ``__metadata__`` holds strings, including our ModelSpec; the weights are located by offsets from the header's
end, so they stay unchanged when the header changes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import METADATA_KEY, ModelSpec, from_json, to_json

SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_LENGTH_BYTES, _ALIGNMENT = 8, 8
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class WeightsFile:
    """``identity``: SHA-256 over the weights and their layout, without the metadata."""

    path: Path
    spec: ModelSpec
    identity: str
    header: dict[str, Any]
    weights: bytes


def read_weights_file(path: Path) -> WeightsFile:
    """Read ``path``. Raises ``ModelError`` if it is not a safetensors file or was not written by cellseg-train."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from error
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    try:
        if not 0 < length <= min(_MAX_HEADER, len(data)):
            raise ValueError(f"header of {length} bytes in a file of {len(data)}")
        header = json.loads(data[_LENGTH_BYTES:end])
        metadata = header.pop(_METADATA, {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise ModelError(f"{path}: no {METADATA_KEY!r} metadata; expected a file written by cellseg-train")
    weights = data[end:]
    if weights_end(header) != len(weights):
        raise ModelError(f"{path}: the safetensors file is cut short or damaged; copy it again")
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(weights)
    spec = from_json(metadata[METADATA_KEY], source=str(path))
    return WeightsFile(path, spec, digest.hexdigest(), {_METADATA: metadata, **header}, weights)


def rewritten(file: WeightsFile, spec: ModelSpec) -> bytes:
    """Return the bytes of ``file`` with ``spec`` instead of its own; weights and other metadata stay."""
    metadata = {**file.header[_METADATA], METADATA_KEY: to_json(spec)}
    header = json.dumps({**file.header, _METADATA: metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + file.weights


def weights_end(header: dict[str, Any]) -> int:
    """Number of bytes of weights that ``header`` (without metadata) declares; -1 if it is not a table of tensors."""
    try:
        return max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError):
        return -1
