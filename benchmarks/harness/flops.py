"""Arithmetic of an ONNX model, counted from its graph: 2 operations per multiply-add.

===============  ==========================================================================================
MatMul, Gemm     2 M N K, times the number of matrices in a batch
Conv             2 x output values x (input channels / groups) x kernel area
ConvTranspose    2 x input values x (output channels / groups) x kernel area
Attention        2 N heads L S (head size of the queries + head size of the values): both of its products
===============  ==========================================================================================

Biases, norms, softmax and activations are not counted: hundredths of a ViT, and bound by memory rather than arithmetic.
Products of multi-head attention written out as MatMul are counted as MatMul. An operator of this kind that is
not known here raises, because a figure that omits some of the work would be worthless.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.errors import ModelError

_HEAVY = re.compile(r"MatMul|Gemm|Conv|Attention|Einsum|RNN|LSTM|GRU")
_SMALL_VALUES = 1024  # constants for computing shapes have few values; weights have many
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flops:
    """Operations per tile, in total and by operator."""

    total: int
    by_operator: dict[str, int]


def count_flops(path: Path) -> Flops:
    """Operations per tile of the .onnx file ``path``. Raises ``ModelError`` if they cannot be counted."""
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # onnx raises whatever protobuf raised
        raise ModelError(f"{path}: not a readable .onnx file ({error})") from error
    return count_graph(model, source=str(path))


def count_graph(model: Any, *, source: str = "the model") -> Flops:
    """As ``count_flops``, for an ``onnx.ModelProto``, which is changed as by ``count_nodes``."""
    by_operator: dict[str, int] = {}
    for node, flops in count_nodes(model, source=source):
        by_operator[node.op_type] = by_operator.get(node.op_type, 0) + flops
    return Flops(sum(by_operator.values()), dict(sorted(by_operator.items())))


def count_nodes(model: Any, *, source: str = "the model") -> list[tuple[Any, int]]:
    """The nodes of an ``onnx.ModelProto`` that count, each with its operations per tile.

    ``model`` is changed: its first input gets a batch of one, and large weights lose their values. Raises
    ``ModelError`` if operations cannot be counted.
    """
    for name in sorted({op for op in _operators(model) if _HEAVY.search(op) and op not in _COUNTED}):
        raise ModelError(f"{source}: operator {name} is not counted; its work is unknown")
    shapes = _inferred(model, source)
    counted = []
    for node in model.graph.node:
        if node.op_type in _COUNTED:
            try:
                counted.append((node, _COUNTED[node.op_type](node, shapes)))
            except KeyError as error:
                raise ModelError(f"{source}: shape of {error} at {node.op_type} {node.name!r} is not known") from None
    return counted


def _operators(model: Any) -> set[str]:
    """Operators of the graph and of all graphs within it (branches, loops, functions)."""
    found: set[str] = set()
    stack = [model.graph, *model.functions]
    inner = 0
    while stack:
        graph = stack.pop()
        for node in graph.node:
            found.add(node.op_type)
            nested = [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]
            inner += len(nested)
            stack += nested
    if (inner or model.functions) and any(_HEAVY.search(op) for op in found):
        raise ModelError("a model with branches, loops or functions cannot be counted; export it again")
    return found


def _inferred(model: Any, source: str) -> dict[str, Shape]:
    """Shape of each tensor for one tile."""
    import onnx

    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    first = next((value for value in graph.input if value.name not in weights), None)
    if first is None:
        raise ModelError(f"{source}: the graph has no input")
    first.type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]  # the exporter's shapes are for a free batch size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > _SMALL_VALUES]
    for tensor in large:  # shape inference does not need a copy of a gigabyte of weights
        if tensor.name not in {value.name for value in graph.input}:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph.initializer.remove(tensor)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ModelError(f"{source}: shapes cannot be inferred ({' '.join(str(error).split())[:300]})") from error
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _matmul(node: Any, shapes: dict[str, Shape]) -> int:
    left, right = shapes[node.input[0]], shapes[node.input[1]]
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    batch = _broadcast(left[:-2], right[:-2])
    return 2 * math.prod(batch) * rows * columns * left[-1]


def _gemm(node: Any, shapes: dict[str, Shape]) -> int:
    left, out = shapes[node.input[0]], shapes[node.output[0]]
    inner = left[0] if _attribute(node, "transA", 0) else left[1]
    return 2 * out[0] * out[1] * inner


def _conv(node: Any, shapes: dict[str, Shape]) -> int:
    weight, out = shapes[node.input[1]], shapes[node.output[0]]
    return 2 * math.prod(out) * math.prod(weight[1:])  # (out channels, in channels / groups, kernel ...)


def _conv_transpose(node: Any, shapes: dict[str, Shape]) -> int:
    image, weight = shapes[node.input[0]], shapes[node.input[1]]
    return 2 * math.prod(image) * math.prod(weight[1:])  # (in channels, out channels / groups, kernel ...)


def _attention(node: Any, shapes: dict[str, Shape]) -> int:
    query, key, value = (shapes[name] for name in node.input[:3])
    if len(query) == 4:  # (N, heads, L, head size)
        n, heads, length, head = query
        return 2 * n * heads * length * key[2] * (head + value[3])
    n, length, width = query  # (N, L, heads x head size); fewer heads of keys and values are shared, not saved
    heads, kv_heads = (_attribute(node, name, 0) for name in ("q_num_heads", "kv_num_heads"))
    return 2 * n * length * key[1] * (width + value[2] // kv_heads * heads)


def _broadcast(left: Shape, right: Shape) -> Shape:
    longest = max(len(left), len(right))
    padded = ((1,) * (longest - len(shape)) + shape for shape in (left, right))
    return tuple(max(pair) for pair in zip(*padded, strict=True))


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


_COUNTED = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}
