"""``MODEL.engine.json``: what an engine is, what it was built on, and whether it may be opened here.

An engine is a program for one kind of GPU and one TensorRT version, and its bytes name neither its network nor its
origin. Opening it runs code. So the file next to it records all of this, with the SHA-256 of the engine, and the engine
is handed to TensorRT only after hash and machine are checked.

The hash guards against damaged, renamed and mixed-up files. Anyone who can write to the folder can write both files:
use engines from trusted sources, or build them yourself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.backends.tensorrt_buffers import BatchProfile
from cellseg_deploy.errors import ModelError, UsageError
from cellseg_deploy.models.spec import ModelSpec, check, from_json, to_json

SIDECAR_VERSION = 1
SUFFIX = ".engine"

_REBUILD = "build it again on this machine: cellseg-export tensorrt MODEL.onnx -o MODEL.engine"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine is built or opened. ``compute_capability``: as ``"8.6"``. ``cuda``: version of the runtime
    library, ``driver``: of the NVIDIA driver, both for the record only."""

    gpu: str
    compute_capability: str
    tensorrt: str
    cuda: str = "unknown"
    driver: str = "unknown"


class EngineSidecar(msgspec.Struct, frozen=True, kw_only=True):
    """Description of one engine file.

    ``engine_sha256``: of the engine's bytes. ``onnx_sha256``, ``model_identity``: of the ONNX file it was built from
    (see ``model_file``). ``precision``: of that file's weights. ``profile``: tiles per call. ``spec``: its ``parity``
    says how the counts of this engine, not of the ONNX file, were compared; ``parity_report``: the complete gate
    report.
    """

    sidecar_version: int = SIDECAR_VERSION
    engine_sha256: str
    engine_bytes: int
    onnx_name: str
    onnx_sha256: str
    model_identity: str
    precision: str
    built_on: Machine
    profile: BatchProfile
    workspace_mib: int | None
    spec: ModelSpec
    parity_report: dict[str, Any] | None = None


def sidecar_path(engine: Path) -> Path:
    """Return ``MODEL.engine.json`` for ``MODEL.engine``."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, sidecar: EngineSidecar) -> None:
    """Write ``sidecar`` next to ``engine`` atomically. Raises ``OutputError``."""
    from cellseg_deploy.files.atomic import write_bytes

    write_bytes(sidecar_path(engine), to_bytes(sidecar))


def to_bytes(sidecar: EngineSidecar) -> bytes:
    """Return ``sidecar`` as indented JSON, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(sidecar), indent=2) + b"\n"


def read_sidecar(engine: Path) -> EngineSidecar:
    """Return the checked sidecar of ``engine``. Raises ``ModelError`` if it is missing or invalid."""
    path = sidecar_path(engine)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: the description of the engine is missing ({error.strerror}); the engine cannot be opened "
            f"without it; copy both files together, or {_REBUILD}"
        ) from error
    try:
        loose = msgspec.json.decode(data)
        version = loose.get("sidecar_version") if isinstance(loose, dict) else None
        if version != SIDECAR_VERSION:
            raise ModelError(
                f"{path}: the description of the engine has version {version}, this program reads {SIDECAR_VERSION}; "
                f"{_REBUILD}"
            )
        sidecar = msgspec.convert(loose, EngineSidecar)
    except (msgspec.DecodeError, msgspec.ValidationError, UsageError) as error:
        raise ModelError(f"{path}: not the description of an engine: {error}; {_REBUILD}") from error
    from_json(to_json(sidecar.spec), source=str(path))  # its version, too
    check(sidecar.spec, source=str(path))
    return sidecar


def misfits(sidecar: EngineSidecar, here: Machine) -> list[str]:
    """Return why an engine must not be opened on ``here``; empty if it may.

    Rules of TensorRT: the same version and the same GPU model.
    """
    built = sidecar.built_on
    problems = []
    if built.tensorrt != here.tensorrt:
        problems.append(f"it was built with TensorRT {built.tensorrt}, this machine has {here.tensorrt}")
    if built.compute_capability != here.compute_capability:
        problems.append(
            f"it was built for {built.gpu} of compute capability {built.compute_capability}, this machine has "
            f"{here.gpu} of {here.compute_capability}"
        )
    elif built.gpu != here.gpu:
        problems.append(f"it was built on {built.gpu}, this machine has {here.gpu}")
    return problems


def check_engine(engine: Path, data: bytes, sidecar: EngineSidecar, here: Machine, *, how_to_rebuild: str = "") -> None:
    """Raise ``ModelError`` unless ``data``, the bytes of the file ``engine``, match ``sidecar`` and may be opened on
    ``here``. Call before TensorRT sees them. ``how_to_rebuild``: end of the message."""
    cure = how_to_rebuild or _REBUILD
    digest = hashlib.sha256(data).hexdigest()
    if digest != sidecar.engine_sha256:
        raise ModelError(
            f"{engine}: the engine does not match its description, or is damaged: SHA-256 {digest[:12]}..., expected "
            f"{sidecar.engine_sha256[:12]}...; {cure}"
        )
    problems = misfits(sidecar, here)
    if problems:
        raise ModelError(f"{engine}: this engine is not for this machine: {'; '.join(problems)}; {cure}")


def version_tuple(text: str) -> tuple[int, ...]:
    """Parse ``"10.13.0.35"`` as (10, 13, 0, 35); anything after the leading numbers is dropped."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
