"""Model files that must be refused before anything is run, made from a sound one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_onnx

from cellseg_deploy.models.spec import METADATA_KEY

Change = Callable[[Any], None]


@dataclass(frozen=True)
class BadModel:
    """``make``: writes the model to a new folder, gives its path. ``words``: found in the one line of the refusal."""

    name: str
    make: Callable[[Path], Path]
    words: str


# ------------------------------------------------------------------------------------------------- the file as it lies


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(change(make_onnx().SerializeToString()))
        return path

    return make


def _missing(folder: Path) -> Path:
    return folder / "model.onnx"


def _folder(folder: Path) -> Path:
    (folder / "model.onnx").mkdir()
    return folder / "model.onnx"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


def _pytorch(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_bytes(make_onnx().SerializeToString())
    return path


# ------------------------------------------------------------------------------------------------------ what it says


def _changed(change: Change) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = make_onnx()
        change(model)
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


def _renamed(what: str) -> Change:
    def change(model: Any) -> None:
        old = getattr(model.graph, what)[0].name
        for value in (*model.graph.input, *model.graph.output):
            value.name = "x" if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["x" if name == old else name for name in names]

    return change


def _dim(what: str, index: int, value: int) -> Change:
    def change(model: Any) -> None:
        getattr(model.graph, what)[0].type.tensor_type.shape.dim[index].dim_value = value

    return change


def _no_dims(model: Any) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _second_input(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "more"


def _type(what: str) -> Change:
    def change(model: Any) -> None:
        from onnx import TensorProto

        value = getattr(model.graph, what)[0].type.tensor_type
        value.elem_type = TensorProto.FLOAT if what == "input" else TensorProto.FLOAT16

    return change


def _future_ir(model: Any) -> None:
    model.ir_version = 99


def _future_opset(model: Any) -> None:
    model.opset_import[0].version = 99


def _metadata(value: str | None) -> Change:
    def change(model: Any) -> None:
        del model.metadata_props[:]
        if value is not None:
            model.metadata_props.add(key=METADATA_KEY, value=value)

    return change


def spec_with(**changes: Any) -> Change:
    """The metadata with other values, as a hand or another program would write them."""

    def change(model: Any) -> None:
        model.metadata_props[0].value = json.dumps(json.loads(model.metadata_props[0].value) | changes)

    return change


def point_with(**changes: Any) -> Change:
    """The same for the operating point of ``counting``."""

    def change(model: Any) -> None:
        said = json.loads(model.metadata_props[0].value)
        said["operating_points"]["counting"] |= changes
        model.metadata_props[0].value = json.dumps(said)

    return change


def _custom_operator(model: Any) -> None:
    model.graph.node[3].op_type = "Teleport"
    model.graph.node[3].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)


def _unknown_operator(model: Any) -> None:
    model.graph.node[3].op_type = "Teleport"


def _weight(value: float) -> Change:
    def change(model: Any) -> None:
        from onnx import numpy_helper

        weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
        weight[0, 0] = value
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))

    return change


def _infinite_constant(model: Any) -> None:
    from onnx import helper, numpy_helper

    bad = numpy_helper.from_array(np.array([np.inf], np.float32), "c")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=bad))


# ----------------------------------------------------------------------------------------------------- external data


def with_external_weights(folder: Path, kind: str) -> Path:
    """A model whose weights lie in a file of their own, where ``kind`` says; whoever follows gets a sound network.

    ``beside``: the ordinary case of other programs. ``missing``: nothing is there.
    """
    from onnx import TensorProto

    own, elsewhere = folder / "model", folder / "elsewhere"
    own.mkdir()
    elsewhere.mkdir()
    model = make_onnx()
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    (elsewhere / "weights.bin").write_bytes(data)
    location = "weights.bin"
    if kind == "parent":
        location = "../elsewhere/weights.bin"
    elif kind == "absolute":
        location = str(elsewhere / "weights.bin")
    elif kind == "symlink":
        (own / "weights.bin").symlink_to(elsewhere / "weights.bin")
    elif kind == "hard link":
        (own / "weights.bin").hardlink_to(elsewhere / "weights.bin")
    elif kind == "beside":
        (own / "weights.bin").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    path = own / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _external(kind: str) -> Callable[[Path], Path]:
    return lambda folder: with_external_weights(folder, kind)


BAD_MODELS = (
    # the file
    BadModel("missing", _missing, "no such file"),
    BadModel("empty", _bytes(lambda _: b""), "empty"),
    BadModel("truncated", _bytes(lambda data: data[: len(data) // 2]), "not a whole ONNX file|no node|no 'cellseg'"),
    BadModel("truncated by a byte", _bytes(lambda data: data[:-1]), "not a whole ONNX file"),
    BadModel("text", _bytes(lambda _: b"hello, this is text" * 10), "not a whole ONNX file"),
    BadModel("folder", _folder, "not a file"),
    BadModel("pipe", _pipe, "not a file"),
    BadModel("PyTorch's ending", _pytorch, r"\.pt"),
    # metadata
    BadModel("no metadata", _changed(_metadata(None)), "no 'cellseg' metadata"),
    BadModel("metadata no JSON", _changed(_metadata("{")), "not JSON"),
    BadModel("future metadata version", _changed(spec_with(spec_version=99)), "99.*update cellseg-deploy"),
    BadModel("tile no multiple of patch", _changed(spec_with(patch_size=15)), "tile_size 56 is not a multiple of 15"),
    BadModel("halo of half a tile", _changed(spec_with(halo=28)), "halo 28 does not fit a tile of 56"),
    BadModel("no scale", _changed(spec_with(image_scale=0)), "image_scale"),
    BadModel("threshold above 1", _changed(point_with(foreground_threshold=1.5)), "foreground_threshold.*1.5"),
    BadModel("threshold below 0", _changed(point_with(foreground_threshold=-0.1)), "foreground_threshold.*-0.1"),
    BadModel(
        "threshold NaN", _changed(point_with(foreground_threshold=float("nan"))), "not JSON|invalid model metadata"
    ),
    # input and output
    BadModel("input name", _changed(_renamed("input")), "input of the model is x: uint8.*expected tiles"),
    BadModel("output name", _changed(_renamed("output")), "output of the model is x: float.*expected probabilities"),
    BadModel("input dtype", _changed(_type("input")), "tiles: float.*expected tiles: uint8|checker"),
    BadModel("output dtype", _changed(_type("output")), "probabilities: float16.*expected|checker"),
    BadModel("input shape", _changed(_dim("input", 1, 42)), "42.*expected tiles: uint8"),
    BadModel("fixed batch", _changed(_dim("input", 0, 1)), "free N"),
    BadModel("input without shape", _changed(_no_dims), "expected tiles: uint8|checker"),
    BadModel("two inputs", _changed(_second_input), "tiles.*more.*expected|checker"),
    BadModel("output channels", _changed(_dim("output", 1, 3)), "3.*expected probabilities"),
    # what it was written for
    BadModel("future IR", _changed(_future_ir), "IR version 99.*update"),
    BadModel("future opset", _changed(_future_opset), "opset version 99.*update"),
    BadModel("custom operator", _changed(_custom_operator), "refuses the model|cannot read the model"),
    BadModel("unknown operator", _changed(_unknown_operator), "refuses the model|cannot read the model"),
    # weights
    BadModel("NaN weight", _changed(_weight(float("nan"))), "'weight'.*NaN"),
    BadModel("infinite weight", _changed(_weight(float("inf"))), "'weight'.*infinity"),
    BadModel("infinite constant", _changed(_infinite_constant), "NaN or infinity"),
    BadModel("external data by ..", _external("parent"), "outside the file"),
    BadModel("external data by absolute path", _external("absolute"), "outside the file"),
    BadModel("external data by symlink", _external("symlink"), "outside the file"),
    BadModel("external data by hard link", _external("hard link"), "outside the file"),
    BadModel("external data missing", _external("missing"), "outside the file"),
    BadModel("external data beside the model", _external("beside"), "outside the file"),
)
