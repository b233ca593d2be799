"""Cleaning up the graph from PyTorch's exporter: readable names, no traces of the machine it was made
on, and a check that it contains nothing an engine might refuse."""

from __future__ import annotations

from ast import literal_eval
from collections import Counter
from typing import Any

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import INPUT_NAME

SCOPES_KEY = "pkg.torch.onnx.name_scopes"

# Not allowed in a finished graph, and why.
_UNWANTED = {
    "BatchNormalization": "batch norms belong in the weights of the convolution before them",
    "Attention": "TensorRT refuses it in fp32; use opset 20 to 22",
    "RotaryEmbedding": "TensorRT refuses it; use opset 20 to 22",
}


def finish_graph(model: Any, *, name: str, version: str) -> None:
    """Tidy ``model`` (onnx.ModelProto) in place without changing what it computes. ``name``: name of the graph."""
    read_input_through_cast(model)
    name_by_module(model)
    strip(model)
    model.graph.name = name
    model.producer_name, model.producer_version = "cellseg-deploy", version


def check_graph(model: Any, *, opset: int) -> None:
    """Raise ``ModelError`` if the graph has another opset, operators of other domains or any of ``_UNWANTED``, if it
    does not begin with the cast, or resizes by another method than the decoder's bilinear one."""
    problems = []
    opsets = {(entry.domain or "ai.onnx", int(entry.version)) for entry in model.opset_import}
    if opsets != {("ai.onnx", opset)}:
        problems.append(f"operator sets {sorted(opsets)}, expected opset {opset} of ai.onnx alone")
    if model.functions or any(node.domain not in ("", "ai.onnx") for node in model.graph.node):
        problems.append("operators outside of ONNX's own")
    kinds = Counter(node.op_type for node in model.graph.node)
    problems += [f"{kinds[kind]} {kind}: {why}" for kind, why in _UNWANTED.items() if kinds[kind]]
    first = model.graph.node[0]
    readers = [node.op_type for node in model.graph.node if INPUT_NAME in node.input]
    if first.op_type != "Cast" or readers != ["Cast"]:
        problems.append(f"input {INPUT_NAME!r} is read by {', '.join(readers)}; expected one Cast, the first node")
    for node in model.graph.node:
        mode = next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")
        if node.op_type == "Resize" and mode != "linear":
            problems.append(f"{node.name} is a {mode} Resize; was the position embedding not baked in?")
    if problems:
        raise ModelError(
            f"the exported graph is not as expected: {'; '.join(problems)}; "
            "this version of PyTorch or onnxscript may be too new or too old"
        )


def read_input_through_cast(model: Any) -> None:
    """Make the Cast the only reader of the input and the first node.

    Class tokens are repeated to the batch size; the exporter reads it from the uint8 input, but the cast has it too.
    """
    nodes = list(model.graph.node)
    casts = [node for node in nodes if node.op_type == "Cast" and list(node.input) == [INPUT_NAME]]
    if not casts:
        return  # reported by check_graph
    for node in nodes:
        if node is not casts[0]:
            for i, value in enumerate(node.input):
                if value == INPUT_NAME:
                    node.input[i] = casts[0].output[0]
    ordered = [casts[0], *(node for node in nodes if node is not casts[0])]
    copies = [_copy(node) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def name_by_module(model: Any) -> None:
    """Name nodes ``module/Operator`` after the PyTorch module they come from (``encoder.blocks.3.attn.qkv/MatMul``),
    and restore ``module.weight`` for the matrices that the exporter transposed and numbered."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    renamed = {name: name.removeprefix("net.") for name in weights}
    taken = set(renamed.values())
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        module = module_of(node)
        base = f"{module}/{node.op_type}" if module else node.op_type
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        if node.op_type == "MatMul" and node.input[1].startswith("val_") and node.input[1] in weights:
            wanted = f"{module}.weight"
            if wanted not in taken and renamed[node.input[1]] == node.input[1]:
                renamed[node.input[1]] = wanted
                taken.add(wanted)
    for tensor in weights.values():
        tensor.name = renamed[tensor.name]
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            node.input[i] = renamed.get(value, value)
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)


def module_of(node: Any) -> str:
    """Innermost PyTorch module of ``node``, without the deploy wrapper's ``net.``; empty for the wrapper itself."""
    for entry in node.metadata_props:
        if entry.key == SCOPES_KEY:
            scopes = literal_eval(entry.value)
            # The last scope is the operation, the others are nested modules.
            innermost = str(scopes[-2]) if len(scopes) > 1 else ""
            return "" if innermost == "net" else innermost.removeprefix("net.")
    return ""


def strip(model: Any) -> None:
    """Remove comments and stack traces, which contain paths of this machine."""
    graph = model.graph
    model.ClearField("doc_string")
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in part:
            entry.ClearField("doc_string")
            entry.ClearField("metadata_props")


def _copy(node: Any) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    return copied
