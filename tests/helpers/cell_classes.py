"""A network that tells cells apart by their colour, and fields of such cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_spec
from PIL import Image

from cellseg_deploy.models.spec import ModelSpec, to_json

CLASSES = ("red", "white", "platelet")
COLOURS = {"red": (150, 30, 30), "white": (30, 30, 150), "platelet": (30, 150, 30)}
Cell = tuple[str, float, float, float]
"""Class, centre x and y, and radius in px."""

FIELD: tuple[Cell, ...] = (
    ("red", 20, 20, 10),
    ("white", 60, 24, 14),
    ("platelet", 95, 20, 5),
    ("red", 25, 60, 10),
    ("red", 1, 85, 10),  # cut by the left border, by a little less than half
    ("platelet", 95, 50, 5),
    ("white", 70, 98, 12),  # cut at the bottom, by more than half
)
"""Of 100 x 120 px."""


def class_spec(**changes: Any) -> ModelSpec:
    """ModelSpec of the network, for cells of 20 px at the image's own scale."""
    return make_spec(**({"channels": ("foreground", *CLASSES), "classes": CLASSES} | changes))


def field(cells: tuple[Cell, ...] = FIELD, hw: tuple[int, int] = (100, 120)) -> np.ndarray:
    """RGB image (h, w, 3): ``cells`` on a bright ground."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    image = np.full((*hw, 3), 230, np.uint8)
    for name, centre_x, centre_y, radius in cells:
        image[(x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2] = COLOURS[name]
    return image


def save_field(path: Path, cells: tuple[Cell, ...] = FIELD, hw: tuple[int, int] = (100, 120)) -> None:
    """``field`` as an image file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(field(cells, hw)).save(path)


def class_onnx(spec: ModelSpec | None = None) -> Any:
    """onnx.ModelProto: dark pixels are cell, and red, white or platelet as far as they are red, blue or green."""
    from onnx import TensorProto, helper, numpy_helper

    spec = class_spec() if spec is None else spec
    k, size = len(spec.channels), spec.tile_size
    weight, bias = np.zeros((k, 3, 1, 1), np.float32), np.zeros(k, np.float32)
    weight[0], bias[0] = -1 / 24, 16
    for channel, colour in enumerate((0, 2, 1), start=1):
        weight[channel, colour] = 1 / 16
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["tiles"], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["as_float"], ["nchw"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["nchw", "weight", "bias"], ["logits"]),
            helper.make_node("Split", ["logits", "parts"], ["of_cell", "of_class"], axis=1),
            helper.make_node("Sigmoid", ["of_cell"], ["foreground"]),
            helper.make_node("Softmax", ["of_class"], ["classes"], axis=1),
            helper.make_node("Concat", ["foreground", "classes"], ["probabilities"], axis=1),
        ],
        "colours",
        [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["n", size, size, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", k, size, size])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(bias, "bias"),
            numpy_helper.from_array(np.array([1, k - 1], np.int64), "parts"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model.metadata_props.add(key="cellseg", value=to_json(spec))
    return model
