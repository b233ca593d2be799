"""The one-file model: reading, checking and identifying it, and writing its ModelSpec.

No model is run before all of this holds: the file is complete, its weights are embedded and finite, it maps ``tiles``
to ``probabilities`` as specified, and its ModelSpec fits. ONNX Runtime itself would accept NaN weights and follow
external-data paths out of the model's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, ModelSpec, from_json, to_json

MAX_BYTES = 2**31 - 1
"""A protobuf message, and so an ONNX file with embedded weights, cannot be larger."""

_PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class ModelFile:
    """A checked model file. ``data``: exactly the bytes that were checked; run these, not the path.

    ``identity``: SHA-256 over graph and weights without metadata (see ``model_identity``). ``precision``: type in which
    weights are multiplied (``fp32``, ``fp16``, ``bf16``, ``int8``, or ``mixed``: some parts fp16, some fp32).
    """

    path: Path
    spec: ModelSpec
    identity: str
    file_sha256: str
    precision: str
    opset: int
    data: bytes = field(repr=False)


def read_model_file(path: Path) -> ModelFile:
    """Read and check the ``.onnx`` file ``path``; raises ``ModelError`` with a one-sentence reason."""
    return check_model(path, _read_bytes(path))


def check_model(path: Path, data: bytes) -> ModelFile:
    """Check ``data``, the bytes of a model file; ``path`` names it in messages. Raises as ``read_model_file``."""
    model = _parse(path, data)
    if not model.graph.node:
        raise ModelError(f"{path}: the model has no node; the file is empty or cut short; copy or export it again")
    spec = read_spec(model, source=str(path))
    _check_embedded(path, model)
    _check_versions(path, model)
    _check_well_formed(path, data)
    _check_input_and_output(path, model, spec)
    _check_finite(path, model)
    return ModelFile(
        path=path,
        spec=spec,
        identity=model_identity(model),
        file_sha256=hashlib.sha256(data).hexdigest(),
        precision=_precision(model),
        opset=_opset(model),
        data=data,
    )


def read_spec(model: Any, *, source: str) -> ModelSpec:
    """Return the ModelSpec in the metadata of ``model`` (onnx.ModelProto); ``source`` names the file in errors."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return from_json(entry.value, source=source)
    raise ModelError(
        f"{source}: no {METADATA_KEY!r} metadata in this ONNX file; expected a model written by `cellseg-export onnx`"
    )


def set_spec(model: Any, spec: ModelSpec) -> None:
    """Store ``spec`` in the metadata of ``model`` (onnx.ModelProto), replacing any existing one."""
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    others = [(entry.key, entry.value) for entry in kept]
    del model.metadata_props[:]
    for key, value in (*others, (METADATA_KEY, to_json(spec))):
        model.metadata_props.add(key=key, value=value)


def write_spec(path: Path, spec: ModelSpec) -> None:
    """Replace the ModelSpec of the model file ``path``; graph, weights and therefore the model identity stay.

    The file is replaced atomically. Raises ``ModelError``, or ``OutputError`` if it cannot be written.
    """
    from cellseg_deploy.files.atomic import write_bytes

    model = _parse(path, _read_bytes(path))
    set_spec(model, spec)
    write_bytes(path, model.SerializeToString(deterministic=True))


def rewritten(model: ModelFile, spec: ModelSpec) -> bytes:
    """Return the bytes of ``model`` with ``spec`` instead of its own; graph, weights and therefore identity stay."""
    proto = _parse(model.path, model.data)
    set_spec(proto, spec)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def model_identity(model: Any) -> str:
    """SHA-256 (hex) of what ``model`` (onnx.ModelProto) computes: opsets, functions, nodes, inputs, outputs, weights.

    Metadata, comments, producer names and tensor storage are excluded, so calibrating or re-saving a model keeps its
    identity.
    """
    digest = hashlib.sha256()

    def add(kind: bytes, *parts: bytes) -> None:
        digest.update(kind)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    for opset in sorted(model.opset_import, key=lambda entry: entry.domain):
        add(b"opset", opset.domain.encode(), str(opset.version).encode())
    for function in model.functions:
        names = (function.domain, function.name, "inputs", *function.input, "outputs", *function.output)
        add(b"function", *(name.encode() for name in names))
        for node in function.node:
            add(b"node", _bare_node(node))
    for value in (*model.graph.input, *model.graph.output):
        add(b"value", value.name.encode(), value.type.SerializeToString(deterministic=True))
    for node in model.graph.node:
        add(b"node", _bare_node(node))
    for tensor in sorted(model.graph.initializer, key=lambda entry: str(entry.name)):
        array = _to_array(tensor)
        add(b"tensor", tensor.name.encode(), str(tensor.data_type).encode(), str(array.shape).encode(), array.tobytes())
    for tensor in model.graph.sparse_initializer:
        add(b"sparse", tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ checks


def _read_bytes(path: Path) -> bytes:
    if path.suffix.lower() != ".onnx":
        raise ModelError(f"{path}: expected a model file ending in .onnx, got {path.suffix or 'no ending'}")
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise ModelError(f"{path}: {what}; expected a model written by `cellseg-export onnx`")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(
                f"{path}: {size} bytes; ONNX with embedded weights is limited to 2 GiB; export it in half precision"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise ModelError(f"{path}: the model file is empty (0 bytes); copy or export it again")
    return data


def _parse(path: Path, data: bytes) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load_model_from_string(data)  # from bytes: external data is never loaded
    except DecodeError as error:
        raise ModelError(f"{path}: not a whole ONNX file ({error}); copy or export it again") from error


def _check_embedded(path: Path, model: Any) -> None:
    import onnx

    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data):
            raise ModelError(
                f"{path}: the weights {tensor.name!r} are stored outside the file; only embedded weights are accepted, "
                "because a path to weights could name any file on this computer; export the model again"
            )


def _check_versions(path: Path, model: Any) -> None:
    """Refuse newer versions than onnx knows: checker and OpenVINO would read them as the latest they know."""
    import onnx

    for what, version, latest in (
        ("IR", model.ir_version, int(onnx.IR_VERSION)),
        ("opset", _opset(model), onnx.defs.onnx_opset_version()),
    ):
        if version > latest:
            raise ModelError(
                f"{path}: written in ONNX {what} version {version}, onnx {onnx.__version__} reads up to {latest}; "
                "update onnx and the engine, or export the model with an earlier version"
            )


def _check_well_formed(path: Path, data: bytes) -> None:
    import onnx

    try:
        onnx.checker.check_model(data)  # the bytes: passing the model would make another copy
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{path}: the ONNX checker refuses the model: {reason}; export it again") from error


def _check_input_and_output(path: Path, model: Any, spec: ModelSpec) -> None:
    from onnx import TensorProto

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    size = spec.tile_size
    for what, values, name, kind, tail in (
        ("input", inputs, INPUT_NAME, TensorProto.UINT8, (size, size, 3)),
        ("output", list(model.graph.output), OUTPUT_NAME, TensorProto.FLOAT, (len(spec.channels), size, size)),
    ):
        expected = f"{name}: {TensorProto.DataType.Name(kind).lower()} (N, {', '.join(map(str, tail))})"
        got = ", ".join(_describe(value) for value in values) or "none"
        fits = len(values) == 1 and values[0].name == name and values[0].type.tensor_type.elem_type == kind
        dims = values[0].type.tensor_type.shape.dim if fits else ()
        static = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
        if not fits or static != (None, *tail):
            raise ModelError(
                f"{path}: {what} of the model is {got}; expected {expected} with a free N; export it again"
            )


def _check_finite(path: Path, model: Any) -> None:
    for tensor in _tensors(model):
        array = _to_array(tensor)
        if array.dtype.kind in "fcV" and not np.isfinite(array).all():
            raise ModelError(
                f"{path}: the weights {tensor.name!r} hold NaN or infinity; such a model finds nothing; export it again"
            )


# ----------------------------------------------------------------------------------------------------------- details


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor of a model: weights and constants, including those of sub-graphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def _to_array(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _bare_node(node: Any) -> bytes:
    bare = type(node)()
    bare.CopyFrom(node)
    bare.ClearField("doc_string")
    bare.ClearField("metadata_props")  # PyTorch's exporter writes stack traces there
    data: bytes = bare.SerializeToString(deterministic=True)
    return data


def _describe(value: Any) -> str:
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    dims = [str(dim.dim_value) if dim.HasField("dim_value") else "N" for dim in value.type.tensor_type.shape.dim]
    return f"{value.name}: {kind} ({', '.join(dims)})"


def _opset(model: Any) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _precision(model: Any) -> str:
    """Type in which weights are multiplied: ``mixed`` if the products have two floating-point types. Scales of layer
    norms, which stay in float in any form, are ignored."""
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.INT8: "int8",
        TensorProto.UINT8: "int8",
    }
    count = dict.fromkeys(names.values(), 0)
    for tensor in _tensors(model):
        if tensor.data_type in names:
            count[names[tensor.data_type]] += int(np.prod(tensor.dims, dtype=np.int64))
    most = max(count, key=lambda name: count[name])
    if most == "int8":
        return most
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    multiplied = {
        kinds[name]
        for node in model.graph.node
        if node.op_type in _PRODUCTS
        for name in node.input[:2]
        if name in kinds
    }
    if {TensorProto.FLOAT, TensorProto.FLOAT16} <= multiplied:
        return "mixed"
    return names[multiplied.pop()] if len(multiplied) == 1 else most
