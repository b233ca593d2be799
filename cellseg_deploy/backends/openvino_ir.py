"""OpenVINO's own file pair, ``MODEL.xml`` and ``MODEL.bin``: its metadata, and the checks before it is run.

The ModelSpec and the facts below are in ``rt_info`` of the .xml, under ``cellseg``. The .xml also holds the SHA-256 of
its .bin, so that a mixed-up, truncated or partly copied pair is refused. This guards against accidents: anyone who can
write to the folder can write both files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec, from_json, to_json

SUFFIX = ".xml"
_SECTION, _SPEC, _FACTS = "cellseg", "spec", "facts"
_AGAIN = "write it again with `cellseg-export openvino`"


class IrFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of an .xml in addition to the ModelSpec.

    ``model_identity``, ``onnx_sha256``: of the source ONNX file (see ``model_file``). ``precision``: of its arithmetic
    unless bf16 is requested: ``fp32`` or ``int8``. ``weights``: how most weights are stored. ``floating``: names of
    the operations that an int8 form keeps in floating point because the counts need it. ``made_with``: versions of
    the programs that wrote it. ``bin_sha256``: of the matching .bin.
    """

    model_identity: str
    onnx_sha256: str
    precision: str
    weights: str
    floating: tuple[str, ...] = ()
    made_with: dict[str, str] = {}
    bin_sha256: str = ""


@dataclass(frozen=True)
class IrFile:
    """A checked pair. ``xml``, ``bin``: exactly the bytes that were checked; run these, not the paths."""

    path: Path
    spec: ModelSpec
    facts: IrFacts
    file_sha256: str
    xml: bytes = field(repr=False)
    bin: bytes = field(repr=False)


def weights_path(path: Path) -> Path:
    """Return the path of the .bin that belongs to the .xml ``path``."""
    return path.with_suffix(".bin")


def read_pair(path: Path) -> tuple[bytes, bytes]:
    """Return the bytes of ``path`` and of its .bin; raises ``ModelError`` if one is missing or empty."""
    contents = []
    for part in (path, weights_path(path)):
        if not part.is_file():
            raise ModelError(f"{part}: {'not a file' if part.exists() else 'no such file'}; the .xml needs the "
                f".bin of the same name; {_AGAIN}")  # fmt: skip
        try:
            contents.append(part.read_bytes())
        except OSError as error:
            raise ModelError(f"{part}: the model cannot be read ({error.strerror}); check its permissions") from error
        if not contents[-1]:
            raise ModelError(f"{part}: the file is empty (0 bytes); copy it again, or {_AGAIN}")
    if not contents[0].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        # OpenVINO detects the format by content: an ONNX file named .xml could make it open any file as external data.
        raise ModelError(f"{path}: not an OpenVINO model: the file is not XML; {_AGAIN}")
    return contents[0], contents[1]


def write_rt_info(model: Any, spec: ModelSpec, facts: IrFacts) -> None:
    """Write ``spec`` and ``facts`` into the rt_info of ``model`` (openvino.Model)."""
    info = model.get_rt_info()
    if "framework" in info:  # OpenVINO copies the metadata of the ONNX file there, including an outdated ModelSpec
        del info["framework"]
    model.set_rt_info(to_json(spec), [_SECTION, _SPEC])
    model.set_rt_info(msgspec.json.encode(facts).decode(), [_SECTION, _FACTS])


def check_ir(path: Path, model: Any, xml: bytes, weights: bytes) -> IrFile:
    """Return the checked ``model`` (openvino.Model read from ``xml`` and ``weights``); raises ``ModelError`` if it was
    not written by this package, is not this pair, or holds weights that are not finite."""
    if not (model.has_rt_info([_SECTION, _SPEC]) and model.has_rt_info([_SECTION, _FACTS])):
        raise ModelError(
            f"{path}: no {_SECTION!r} section in this OpenVINO model; expected one written by `cellseg-export openvino`"
        )
    spec = from_json(model.get_rt_info([_SECTION, _SPEC]).astype(str), source=str(path))
    try:
        facts = msgspec.json.decode(model.get_rt_info([_SECTION, _FACTS]).astype(str), type=IrFacts)
    except msgspec.DecodeError as error:  # a ValidationError is one too
        raise ModelError(f"{path}: its {_SECTION!r} section is invalid: {error}; {_AGAIN}") from error
    if hashlib.sha256(weights).hexdigest() != facts.bin_sha256:
        raise ModelError(
            f"{weights_path(path)}: not the weights that {path.name} was written with (SHA-256 differs): another "
            f"model's, or damaged; copy both files again, or {_AGAIN}"
        )
    check_ports(path, model, spec)
    check_finite(path, model)
    digest = hashlib.sha256(xml)
    digest.update(weights)
    return IrFile(path, spec, facts, digest.hexdigest(), xml, weights)


def check_ports(path: Path, model: Any, spec: ModelSpec) -> None:
    """Raise ``ModelError`` unless inputs and outputs of ``model`` match ``spec``, with a dynamic batch size."""
    size = spec.tile_size
    for what, ports, name, kind, tail in (
        ("input", model.inputs, INPUT_NAME, "u8", (size, size, 3)),
        ("output", model.outputs, OUTPUT_NAME, "f32", (len(spec.channels), size, size)),
    ):
        expected = f"{name}: {kind} [?,{','.join(map(str, tail))}]"
        got = ", ".join(
            f"{'/'.join(sorted(port.get_names()))}: {port.get_element_type().to_string()} {port.get_partial_shape()}"
            for port in ports
        )
        if len(ports) != 1 or got.replace(" ", "") != expected.replace(" ", ""):
            raise ModelError(f"{path}: {what} of the model is {got or 'none'}; expected {expected}; {_AGAIN}")


def check_finite(path: Path, model: Any) -> None:
    """Raise ``ModelError`` if a constant of ``model`` holds NaN or infinity: such a network finds nothing."""
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or not node.get_element_type().is_real():
            continue
        if not np.isfinite(np.asarray(node.data, np.float32)).all():
            raise ModelError(f"{path}: the weights {node.get_friendly_name()!r} hold NaN or infinity; {_AGAIN}")
