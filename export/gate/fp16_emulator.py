"""Run a half-precision graph in real half arithmetic on the CPU, as a GPU would, overflow included.

ONNX Runtime has hardly any half-precision operators for CPUs: it computes in float between the operators, which hides
overflow. Here PyTorch runs the exported graph itself, node by node. Every tensor that the graph declares
half is a half tensor, rounded after each node (sums within a product are kept in float, as on tensor cores), and the
first node that returns infinity or NaN for finite input is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import DataError, ModelError
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec
from cellseg_export.forms.fp16_graph import HALF_MAX, node_parts

_DTYPES = {1: torch.float32, 2: torch.uint8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16}


@dataclass(frozen=True)
class Overflow:
    """``node`` of ``part`` returned ``n_bad`` of ``n`` values as infinity or NaN although the input was finite."""

    node: str
    part: str
    n_bad: int
    n: int

    def __str__(self) -> str:
        return (
            f"overflow in {self.part}: {self.n_bad} of {self.n} values that {self.node} gives lie beyond "
            f"{HALF_MAX:g}, the largest number in half precision"
        )


class HalfBackend(Backend):
    """A graph (onnx.ModelProto) run by PyTorch in the types it declares.

    ``overflow``: the first one found, None so far; the call in which it occurs raises ``DataError``. ``largest``: by
    part, the largest absolute value of a half tensor so far.
    """

    name = "pytorch-half"
    device = "cpu"

    def __init__(self, model: Any, spec: ModelSpec, precision: str = "fp16") -> None:
        """Raises ``ModelError`` if the graph contains an operator that is not supported here."""
        self.spec = spec
        self.precision = precision
        self.overflow: Overflow | None = None
        self.largest: dict[str, float] = {}
        graph = model.graph
        self._nodes = list(zip(graph.node, node_parts(model), strict=True))
        self._weights = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
        self._calls = [_operator(node) for node in graph.node]
        last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
        self._dead = [
            [name for name in dict.fromkeys(node.input) if last_use[name] == i and name not in self._weights]
            for i, node in enumerate(graph.node)
        ]

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        values: dict[str, Tensor] = {**self._weights, INPUT_NAME: torch.from_numpy(tiles_nhwc.copy())}
        with torch.inference_mode():
            for (node, part), call, dead in zip(self._nodes, self._calls, self._dead, strict=True):
                answers = call([values[name] if name else None for name in node.input])
                for name, answer in zip(node.output, answers, strict=True):
                    self._look_at(node, part, answer)
                    values[name] = answer
                for name in dead:
                    values.pop(name, None)
        return np.asarray(values[OUTPUT_NAME].numpy(), np.float32)

    def describe(self) -> dict[str, Any]:
        """Version of PyTorch."""
        return {"torch": str(torch.__version__)}

    def _look_at(self, node: Any, part: str, answer: Tensor) -> None:
        if not answer.is_floating_point():
            return
        largest = float(answer.abs().amax()) if answer.numel() else 0.0
        if not np.isfinite(largest):  # inf and NaN both end up here
            n_bad = int((~answer.isfinite()).sum())
            self.overflow = Overflow(node.name, part, n_bad, answer.numel())
            raise DataError(str(self.overflow))
        if answer.dtype == torch.float16:
            self.largest[part] = max(self.largest.get(part, 0.0), largest)


# ---------------------------------------------------------------------------------- ONNX operators in terms of PyTorch

Inputs = Sequence[Tensor | None]
Call = Callable[[Inputs], Sequence[Tensor]]


def _operator(node: Any) -> Call:
    """Return the function that computes ``node``; ``ModelError`` if there is none."""
    import onnx

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    make = _OPERATORS.get(node.op_type)
    if make is None:
        raise ModelError(
            f"{node.name}: operator {node.op_type} cannot be checked in half arithmetic; expected a graph written by "
            "`cellseg-export onnx`"
        )
    function = make(attributes)
    return lambda inputs: [function(*inputs)]


def _tensor(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    return torch.from_numpy(np.array(numpy_helper.to_array(tensor)))


def _ints(tensor: Tensor | None) -> list[int]:
    assert tensor is not None
    return [int(value) for value in tensor.reshape(-1)]


def _cast(a: dict[str, Any]) -> Callable[..., Tensor]:
    dtype = _DTYPES[a["to"]]
    return lambda x: x.to(dtype)


def _conv(a: dict[str, Any]) -> Callable[..., Tensor]:
    pads = a.get("pads", [0, 0, 0, 0])
    if list(pads[:2]) != list(pads[2:]) or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ModelError(f"a Conv pads {pads} ({a.get('auto_pad')}); only equal padding on both sides is known here")
    strides, dilations = list(a.get("strides", [1, 1])), list(a.get("dilations", [1, 1]))
    return lambda x, w, b=None: F.conv2d(x, w, b, strides, list(pads[:2]), dilations, a.get("group", 1))


def _gemm(a: dict[str, Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        product: Tensor = (x.T if a.get("transA") else x) @ (w.T if a.get("transB") else w) * a.get("alpha", 1.0)
        return product if b is None else product.add(b, alpha=a.get("beta", 1.0))

    return run


def _layer_norm(a: dict[str, Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[a.get("axis", -1) % x.ndim :]
        return F.layer_norm(x, shape, scale.reshape(shape), bias, a.get("epsilon", 1e-5))

    return run


def _reshape(a: dict[str, Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, shape: Tensor) -> Tensor:
        wanted = _ints(shape)
        if not a.get("allowzero"):
            wanted = [x.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def _slice(_: dict[str, Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        first, last = _ints(starts), _ints(ends)
        chosen = list(range(len(first))) if axes is None else _ints(axes)
        stride = [1] * len(first) if steps is None else _ints(steps)
        window = [slice(None)] * x.ndim
        for axis, start, stop, step in zip(chosen, first, last, stride, strict=True):
            window[axis] = slice(start, stop, step)
        return x[tuple(window)]

    return run


def _resize(a: dict[str, Any]) -> Callable[..., Tensor]:
    kind = a.get("mode", b"nearest"), a.get("coordinate_transformation_mode", b"half_pixel")
    if kind[0] != b"linear" or kind[1] not in (b"half_pixel", b"pytorch_half_pixel") or a.get("antialias"):
        raise ModelError(f"a Resize is {kind}; only the decoder's bilinear one is known here")

    def run(x: Tensor, _roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        if sizes is not None:
            return F.interpolate(x, size=_ints(sizes)[2:], mode="bilinear", align_corners=False)
        assert scales is not None
        size = [int(side * float(scale)) for side, scale in zip(x.shape[2:], scales[2:], strict=True)]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    return run


def _depth_to_space(a: dict[str, Any]) -> Callable[..., Tensor]:
    if a.get("mode", b"DCR") != b"CRD":
        raise ModelError("a DepthToSpace orders its input by depth first; only a pixel shuffle (CRD) is known here")
    return lambda x: F.pixel_shuffle(x, a["blocksize"])


def _shape(a: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)[a.get("start", 0) : a.get("end", x.ndim)]


def _squeeze(_: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _unsqueeze(_: dict[str, Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Tensor) -> Tensor:
        wanted = _ints(axes)
        for axis in sorted(axis % (x.ndim + len(wanted)) for axis in wanted):
            x = x.unsqueeze(axis)
        return x

    return run


def _expand(_: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda x, shape: x.broadcast_to(np.broadcast_shapes(tuple(x.shape), tuple(_ints(shape)))).clone()


def _gelu(a: dict[str, Any]) -> Callable[..., Tensor]:
    how = a.get("approximate", b"none").decode()
    return lambda x: F.gelu(x, approximate=how)


def _plain(function: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Callable[..., Tensor]]:
    return lambda _: function


_OPERATORS: dict[str, Callable[[dict[str, Any]], Callable[..., Tensor]]] = {
    "Add": _plain(torch.add),
    "Cast": _cast,
    "Concat": lambda a: lambda *parts: torch.cat(parts, dim=a["axis"]),
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": _plain(torch.div),
    "Expand": _expand,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": _plain(lambda x: x),
    "LayerNormalization": _layer_norm,
    "MatMul": _plain(torch.matmul),
    "Mul": _plain(torch.mul),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda a: lambda x: torch.softmax(x, a.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Transpose": lambda a: lambda x: x.permute(tuple(a["perm"])),
    "Unsqueeze": _unsqueeze,
}
