"""Convert an fp32 model file's graph to half precision: FP16 weights and arithmetic, with islands that stay in FP32.

    tiles uint8 -> Cast, normalise (FP32) -> half ... half -> Sigmoid (FP32) -> probabilities float32

Always in FP32, because half has 11 bits and ends at 65504: colour normalisation, LayerNorm (sums of squares), softmax
(sums of exponentials), the final sigmoid and so the output. In a *mixed* form whole parts of the network also stay in
FP32. Casts are inserted only where a tensor crosses between the two, one for all of its readers.

The graph is edited with onnx-ir. Two existing converters were tried on this very graph and rejected:
onnxconverter-common 1.16 leaves the output and the first Cast with contradicting types; ONNX Runtime's (1.32) writes
nodes out of order, one FP16 round trip around every operator kept in FP32, and silently clips weights beyond 65504 to
that value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellseg_deploy.errors import ModelError

HALF_MAX = 65504.0
"""Largest finite half-precision number."""

FLOAT_OPERATORS = frozenset({"LayerNormalization", "Softmax", "Sigmoid"})
FRONT = "normalise"
"""The part before the first weight: cast, layout, colours. Always FP32."""

_PART = re.compile(
    r"normalise|encoder\.patch_embed|encoder\.blocks\.\d+|encoder\.norm|branch\.\w+|decoder\.project|"
    r"decoder\.steps\.\d+|decoder\.head|decoder\.class_head"
)
_WEIGHTED = ("Conv", "MatMul", "Gemm")
# Inputs that stay float in any precision: the scales of a Resize.
_FLOAT_INPUTS = {"Resize": (1, 2)}


@dataclass(frozen=True)
class TypeSummary:
    """Types of a finished graph. ``half_weights``, ``float_weights``: number of weight values of that type.
    ``float_nodes``: how many nodes of each operator compute in FP32. ``float_parts``: see the function of that name.
    ``casts``: Cast nodes, including the first."""

    half_weights: int
    float_weights: int
    float_nodes: dict[str, int]
    float_parts: tuple[str, ...]
    casts: int


def node_parts(model: Any) -> list[str]:
    """The part of the network that each node of ``model`` (onnx.ModelProto) belongs to, in graph order.

    Parts are what a mixed form keeps in FP32 as a whole: ``encoder.blocks.3``, ``decoder.steps.1``, ``branch.to_half``.
    A node between two parts (a resize, a sum) belongs to the one before it. Raises ``ModelError`` if no node has a
    module's name.
    """
    found, last = [], FRONT
    for node in model.graph.node:
        match = _PART.match(node.name)
        last = match[0] if match else last
        found.append(last)
    if set(found) <= {FRONT}:
        raise ModelError(
            "the nodes of this graph have no module names, so its parts cannot be identified; expected a model "
            "written by `cellseg-export onnx`"
        )
    return found


def parts_of(model: Any) -> tuple[str, ...]:
    """The parts of ``model`` that can be converted to half precision, in order of first appearance."""
    return tuple(part for part in dict.fromkeys(node_parts(model)) if part not in (FRONT, "encoder.norm"))


def float_parts(model: Any) -> tuple[str, ...]:
    """The parts of a half-precision ``model`` whose weights are multiplied in FP32, in graph order."""
    from onnx import TensorProto

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {
        part: None
        for node, part in zip(model.graph.node, node_parts(model), strict=True)
        if node.op_type in _WEIGHTED and any(kinds.get(name) == TensorProto.FLOAT for name in node.input)
    }
    return tuple(found)


def parts_beyond_half(model: Any) -> dict[str, str]:
    """Parts of the fp32 ``model`` with a weight that half cannot represent, and the name of the first such weight."""
    from onnx import numpy_helper

    large = {
        tensor.name
        for tensor in model.graph.initializer
        if (array := numpy_helper.to_array(tensor)).dtype == np.float32 and not np.abs(array).max(initial=0) <= HALF_MAX
    }
    found: dict[str, str] = {}
    for node, part in zip(model.graph.node, node_parts(model), strict=True):
        for name in node.input:
            if name in large and not _stays_float(node.op_type, part, (), is_last=False):
                found.setdefault(part, name)
    return found


def to_half(model: Any, keep: Collection[str] = ()) -> Any:
    """Return a half-precision copy of ``model`` (onnx.ModelProto, fp32, as written by ``cellseg-export onnx``).

    ``keep``: parts to leave in FP32. Metadata is kept. Raises ``ModelError`` if a weight is beyond the range of half,
    or is not finite.
    """
    import onnx
    import onnx_ir as ir

    beyond = {part: name for part, name in parts_beyond_half(model).items() if part not in keep}
    if beyond:
        listed = ", ".join(f"{name} in {part}" for part, name in beyond.items())
        raise ModelError(
            f"weights beyond {HALF_MAX:g}, the largest number in half precision: {listed}; "
            "--precision mixed keeps such parts in FP32"
        )
    part_of = dict(zip((node.name for node in model.graph.node), node_parts(model), strict=True))
    types = _types(_inferred(model))
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]  # they are inferred again at the end
    graph_model = ir.from_proto(bare)
    graph = graph_model.graph
    for node in graph:
        for output in node.outputs:
            output.dtype = ir.DataType(types[output.name])
    ends = {str(value.name) for value in graph.outputs}
    is_float = {
        id(node): _stays_float(
            node.op_type,
            part_of[str(node.name)],
            keep,
            is_last=not ends.isdisjoint(str(output.name) for output in node.outputs),
        )
        for node in graph
    }
    for node in graph:
        if not is_float[id(node)]:
            for output in node.outputs:
                if output.dtype == ir.DataType.FLOAT:
                    output.dtype = ir.DataType.FLOAT16
    cast: dict[tuple[str, int], Any] = {}
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            wanted = _wanted(node, index, is_float[id(node)])
            if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or value.dtype == wanted:
                continue
            key = str(value.name), int(wanted)
            if key not in cast:
                cast[key] = _half_copy(graph, value) if value.is_initializer() else _cast(value, wanted)
            node.replace_input_with(index, cast[key])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    made = ir.to_proto(graph_model)
    del made.graph.value_info[:]
    _rename_halves(made)
    return _inferred(made)


def check_types(model: Any, keep: Collection[str] = ()) -> TypeSummary:
    """Check the types of a finished half-precision graph, as inferred from its nodes, not as declared.

    Raises ``ModelError`` naming the problem: an input other than uint8 or an output other than float; an operator of
    ``FLOAT_OPERATORS``, the normalisation or a part of ``keep`` in half; a product outside of them in float; a tensor
    of double or bfloat16; a weight that is not finite; a Cast without effect or undone by the next one.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    types = _types(_inferred(bare))
    graph = bare.graph
    problems = []
    if [value.type.tensor_type.elem_type for value in graph.input] != [TensorProto.UINT8]:
        problems.append("the input is not uint8")
    if any(types[value.name] != TensorProto.FLOAT for value in graph.output):
        problems.append("the output is not float32")
    wrong = sorted({TensorProto.DataType.Name(kind) for kind in types.values() if kind in _UNWANTED_TYPES})
    problems += [f"tensors of type {name}" for name in wrong]
    float_nodes: Counter[str] = Counter()
    ends = {value.name for value in graph.output}
    for node, part in zip(graph.node, node_parts(bare), strict=True):
        kinds = {types[name] for name in (*node.input, *node.output) if name in types}
        floating = kinds & {TensorProto.FLOAT, TensorProto.FLOAT16}
        if node.op_type == "Cast" or not floating:
            continue
        is_last = not ends.isdisjoint(node.output)
        stays = _stays_float(node.op_type, part, keep, is_last=is_last)
        expected = TensorProto.FLOAT if stays else TensorProto.FLOAT16
        if node.op_type != "Resize" and floating != {expected}:
            name = "float" if expected == TensorProto.FLOAT else "half"
            problems.append(f"{node.name} does not compute in {name}")
        if expected == TensorProto.FLOAT:
            float_nodes[node.op_type] += 1
    problems += _useless_casts(graph, types)
    count = Counter[int]()
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        count[tensor.data_type] += array.size
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append(f"the weights {tensor.name} are not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError(f"the half-precision graph is not as expected: {'; '.join(problems[:8])}{more}")
    return TypeSummary(
        half_weights=count[TensorProto.FLOAT16],
        float_weights=count[TensorProto.FLOAT],
        float_nodes=dict(sorted(float_nodes.items())),
        float_parts=float_parts(bare),
        casts=sum(node.op_type == "Cast" for node in graph.node),
    )


_UNWANTED_TYPES = (11, 16)  # double, bfloat16


def _stays_float(operator: str, part: str, keep: Collection[str], *, is_last: bool) -> bool:
    """Whether the node stays in FP32. ``is_last``: it gives the graph's output, as one joining classes and channels."""
    return operator in FLOAT_OPERATORS or part == FRONT or part in keep or is_last


def _wanted(node: Any, index: int, is_float: bool) -> Any:
    """Type required of input ``index`` of ``node``, if it is a floating-point input."""
    import onnx_ir as ir

    stays = is_float or index in _FLOAT_INPUTS.get(node.op_type, ())
    return ir.DataType.FLOAT if stays else ir.DataType.FLOAT16


def _cast(value: Any, wanted: Any) -> Any:
    """Output of a new Cast of ``value`` directly after its producer."""
    import onnx_ir as ir

    producer = value.producer()
    name = f"{value.name}_{'half' if wanted == ir.DataType.FLOAT16 else 'float'}"
    node = ir.node("Cast", [value], attributes={"to": ir.AttrInt64("to", int(wanted))}, name=f"{producer.name}/{name}")
    node.outputs[0].name = name
    node.outputs[0].dtype = wanted
    producer.graph.insert_after(producer, node)
    return node.outputs[0]


def _half_copy(graph: Any, value: Any) -> Any:
    """A new weight: ``value`` rounded to half. Its final name depends on whether the original still has readers."""
    import onnx_ir as ir

    name = f"{value.name}{_HALF_SUFFIX}"
    array = value.const_value.numpy().astype(np.float16)
    copy = ir.Value(
        name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.FLOAT16), shape=value.shape
    )
    graph.register_initializer(copy)
    return copy


_HALF_SUFFIX = "::half"


def _rename_halves(model: Any) -> None:
    """Give half weights the name of the original where it is no longer in use: people look weights up by name."""
    graph = model.graph
    names = {tensor.name for tensor in graph.initializer}
    renamed = {
        name: plain if (plain := name.removesuffix(_HALF_SUFFIX)) not in names else f"{plain}_half"
        for name in names
        if name.endswith(_HALF_SUFFIX)
    }
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in graph.node:
        for i, value in enumerate(node.input):
            if value in renamed:
                node.input[i] = renamed[value]


def _inferred(model: Any) -> Any:
    """``model`` with the type of every tensor; ``ModelError`` if two nodes contradict each other."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"the types in this graph contradict each other: {error}; export it again") from error


def _types(model: Any) -> dict[str, int]:
    """Element type of every tensor of ``model``, by name."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return types | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}


def _useless_casts(graph: Any, types: dict[str, int]) -> list[str]:
    """Casts to the type a tensor already has, that undo the previous one, or that are duplicated."""
    problems, made = [], set()
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    for node in casts.values():
        source, target = node.input[0], types[node.output[0]]
        if types[source] == target:
            problems.append(f"{node.name} casts to the type its input has")
        if source in casts and types[casts[source].input[0]] == target:
            problems.append(f"{node.name} undoes {casts[source].name}")
        if (source, target) in made:
            problems.append(f"{node.name} is made twice")
        made.add((source, target))
    return problems
