"""Arithmetic counted from graphs, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cellseg_benchmarks.harness.flops import count_flops, count_graph
from cellseg_deploy.errors import ModelError
from cellseg_deploy.models import default_model_path


def model_of(
    nodes: list[Any], inputs: dict[str, tuple[Any, ...]], weights: dict[str, tuple[int, ...]], opset: int = 20
) -> Any:
    """An ONNX model whose outputs are those of its last node, without shapes."""
    constants = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in nodes[-1].output]
    graph = helper.make_graph(nodes, "g", given, made, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(op: str, inputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), ["out"], **attributes)


@pytest.mark.parametrize(
    ("made", "inputs", "weights", "flops"),
    [
        # (7, 5) x (5, 3): 7 * 3 sums of 5 products
        (node("MatMul", "x w"), {"x": ("n", 7, 5)}, {"w": (5, 3)}, 2 * 7 * 3 * 5),
        # a batch of 4 heads, spread over both sides
        (node("MatMul", "x w"), {"x": ("n", 4, 6, 8)}, {"w": (1, 4, 8, 9)}, 2 * 4 * 6 * 9 * 8),
        (node("MatMul", "x w"), {"x": ("n", 1, 6, 8)}, {"w": (1, 4, 8, 9)}, 2 * 4 * 6 * 9 * 8),
        (node("MatMul", "x w"), {"x": ("n", 5)}, {"w": (5,)}, 2 * 1 * 5),
        (node("Gemm", "x w b"), {"x": ("n", 5)}, {"w": (5, 3), "b": (3,)}, 2 * 1 * 3 * 5),
        (node("Gemm", "w x", transA=1, transB=1), {"x": ("n", 5)}, {"w": (5, 3)}, 2 * 3 * 1 * 5),
        # 8 x 8 in, 3 x 3 kernel, padding 1, stride 2: 4 x 4 out of 6 channels, each a sum of 3 * 9 products
        (
            node("Conv", "x w", pads=[1, 1, 1, 1], strides=[2, 2]),
            {"x": ("n", 3, 8, 8)},
            {"w": (6, 3, 3, 3)},
            2 * 6 * 4 * 4 * 3 * 9,
        ),
        # depthwise: each of 4 channels sees itself only
        (node("Conv", "x w", group=4), {"x": ("n", 4, 5, 5)}, {"w": (4, 1, 5, 5)}, 2 * 4 * 1 * 1 * 25),
        # each of 3 * 5 * 5 inputs goes to 2 channels through a kernel of 2 x 2
        (node("ConvTranspose", "x w", strides=[2, 2]), {"x": ("n", 3, 5, 5)}, {"w": (3, 2, 2, 2)}, 2 * 75 * 2 * 4),
        (node("Relu", "x"), {"x": ("n", 3, 5, 5)}, {}, 0),
    ],
)
def test_operators(made: Any, inputs: dict[str, Any], weights: dict[str, Any], flops: int) -> None:
    found = count_graph(model_of([made], inputs, weights))
    assert found.total == flops
    assert found.by_operator == ({made.op_type: flops} if flops else {})


def test_attention_as_one_operator() -> None:
    shapes = {"q": (1, 3, 10, 8), "k": (1, 3, 12, 8), "v": (1, 3, 12, 4)}
    model = model_of([node("Attention", "q k v")], shapes, {}, opset=23)
    # 3 heads: 10 x 12 scores of 8 products each, then 10 x 4 values of 12 products each
    assert count_graph(model).total == 3 * (2 * 10 * 12 * 8 + 2 * 10 * 4 * 12)
    flat = {"q": (1, 10, 24), "k": (1, 12, 24), "v": (1, 12, 12)}
    model = model_of([node("Attention", "q k v", q_num_heads=3, kv_num_heads=3)], flat, {}, opset=23)
    assert count_graph(model).total == 3 * (2 * 10 * 12 * 8 + 2 * 10 * 4 * 12)


def test_a_free_batch_counts_as_one_tile_whatever_was_written_down() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["out"]),
    ]
    model = model_of(nodes, {"x": ("n", 4, 4)}, {"w": (4, 4)})
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ("n", 4, 4)))
    assert count_graph(model).total == 2 * (2 * 4 * 4 * 4)


def test_large_weights_are_counted_without_their_values() -> None:
    model = model_of([node("MatMul", "x w")], {"x": ("n", 2, 64)}, {"w": (64, 64)})
    assert count_graph(model).total == 2 * 2 * 64 * 64
    assert not model.graph.initializer


@pytest.mark.parametrize(
    ("made", "inputs", "words"),
    [
        (node("Einsum", "x w", equation="nij,jk->nik"), {"x": ("n", 2, 2)}, "operator Einsum is not counted"),
        (node("MatMulInteger", "x w"), {"x": ("n", 2, 2)}, "operator MatMulInteger is not counted"),
        (node("MatMul", "x w"), {"x": ("n", "h", "w")}, "shape of 'x' at MatMul"),
    ],
)
def test_what_cannot_be_told_raises(made: Any, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        count_graph(model_of([made], inputs, {"w": (2, 2)}))


def test_work_inside_a_branch_raises() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["x"], ["out"], then_branch=inner, else_branch=inner)
    with pytest.raises(ModelError, match="branches, loops or functions"):
        count_graph(model_of([branch], {"x": ("n", 2, 2)}, {"w": (2, 2)}))


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x07nonsense")
    for path in (tmp_path / "x.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ModelError, match=r"not a readable \.onnx file"):
            count_flops(path)


def test_the_shipped_model_by_hand() -> None:
    """Its encoder: a token for each 14 x 14 px of a tile, width 192, 6 blocks of 12 width^2 weights each, 3 heads."""
    found = count_flops(default_model_path()).by_operator
    tokens = (224 // 14) ** 2
    linear = 2 * tokens * 6 * 12 * 192**2
    attention = 2 * 2 * 6 * tokens * tokens * 192
    assert found["MatMul"] == linear + attention
    patches = 2 * tokens * 192 * 14 * 14 * 3
    project = 2 * tokens * 192 * 1  # per output channel of the decoder's first step, 1 x 1
    assert found["Conv"] > patches + project
