"""Faults put into a model file on purpose, fp32 or half, each with what the gate must say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

Tamper = Callable[[onnx.ModelProto], None]


def tampered(path: Path, out: Path, tamper: Tamper) -> Path:
    model = onnx.load(path)
    tamper(model)
    onnx.save(model, out)
    return out


def weights_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def set_weights(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def perturb_one_block(model: onnx.ModelProto, strength: float = 1.0) -> None:
    name = "encoder.blocks.1.mlp.fc1.weight"
    weight = weights_of(model, name)
    noise = np.random.default_rng(0).normal(0, strength * weight.std(dtype=np.float64), weight.shape)
    set_weights(model, name, (weight + noise).astype(weight.dtype))


def perturb_one_block_much(model: onnx.ModelProto) -> None:
    """So that cells change: fp16 forms are judged by these alone, and the blocks of a tiny network matter little."""
    perturb_one_block(model, 8.0)


def swap_mean_and_std(model: onnx.ModelProto) -> None:
    names = [next(n for n in model.graph.node if n.name == f"normalise/{op}").input[1] for op in ("Sub", "Div")]
    mean, std = (weights_of(model, name) for name in names)
    set_weights(model, names[0], std)
    set_weights(model, names[1], mean)


def zero_the_boundary_head(model: onnx.ModelProto) -> None:
    head = next(node for node in model.graph.node if node.name == "decoder.head/Conv")
    for name in head.input[1:]:
        weight = weights_of(model, name).copy()
        weight[len(weight) // 2 :] = 0  # the sub-pixel convolution has four planes a channel
        set_weights(model, name, weight)


def flip_output_channels(model: onnx.ModelProto) -> None:
    head = next(node for node in model.graph.node if node.name == "decoder.head/Conv")
    for name in head.input[1:]:
        weight = weights_of(model, name)
        set_weights(model, name, np.roll(weight, len(weight) // 2, axis=0))


def flip_colours(model: onnx.ModelProto) -> None:
    """BGR: first convolutions and normalisation with their input channels reversed."""
    for node in model.graph.node:
        if node.name in {"normalise/Sub", "normalise/Div"}:
            set_weights(model, node.input[1], weights_of(model, node.input[1])[:, ::-1].copy())
        if node.op_type == "Conv" and weights_of(model, node.input[1]).shape[1] == 3:
            set_weights(model, node.input[1], weights_of(model, node.input[1])[:, ::-1].copy())


FAULTS: dict[str, tuple[Tamper, str]] = {
    "one block's weights": (perturb_one_block, r"diverge at encoder\.blocks\.1:"),
    "mean and std": (swap_mean_and_std, r"diverge at normalise:"),
    "boundary head": (zero_the_boundary_head, r"channel boundary: .* says 0\.5000 everywhere"),
    "output channels": (flip_output_channels, r"channel boundary is the reference's foreground"),
    "colours": (flip_colours, r"BGR"),
}
HALF_FAULTS = FAULTS | {"one block's weights": (perturb_one_block_much, r"diverge at encoder\.blocks\.1:")}
