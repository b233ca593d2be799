"""ONNX Runtime with inputs and outputs bound to device memory.

Otherwise ONNX Runtime allocates, copies and frees around every call. Here one device buffer is kept for each batch
size in use (the full batch and an image's last partial one), so a call is: copy tiles in, run, copy out.

Nothing in this module depends on the device being a GPU, so it is tested on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.tensorrt_buffers import plan_buffers
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

CPU_PROVIDER = "CPUExecutionProvider"
RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_KEPT_SIZES = 2
# Operators that must not run on the CPU if a GPU was requested. A few integer shape operations run there by design.
_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Resize", "Softmax", "LayerNormalization", "Gelu", "Sigmoid"}


class BoundSession:
    """A session whose ``tiles`` and ``probabilities`` are on one device."""

    def __init__(self, runtime: Any, session: Any, spec: ModelSpec, *, device_type: str, device_id: int = 0) -> None:
        """``runtime``: the module onnxruntime. ``device_type``: ONNX Runtime's name, ``cuda`` or ``cpu``."""
        self._new_value = runtime.OrtValue.ortvalue_from_shape_and_type
        self._session = session
        self._spec = spec
        self._device = (device_type, device_id)
        self._values: dict[int, tuple[Any, Any]] = {}

    def run(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return probabilities (N, K, S, S) for ``tiles_nhwc``, contiguous uint8 (N, S, S, 3), as a new array."""
        tiles, probabilities = self._values_for(len(tiles_nhwc))
        tiles.update_inplace(tiles_nhwc)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, tiles)
        binding.bind_ortvalue_output(OUTPUT_NAME, probabilities)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return np.array(probabilities.numpy(), np.float32)  # a copy: the next call writes to the same memory

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that hold memory, the most recently used last."""
        return tuple(self._values)

    def _values_for(self, n: int) -> tuple[Any, Any]:
        """Return input and output on the device for ``n`` tiles; sizes not used recently are freed."""
        pair = self._values.pop(n, None)
        if pair is None:
            while len(self._values) >= _KEPT_SIZES:
                del self._values[next(iter(self._values))]
            plan = plan_buffers(self._spec, n)
            tiles, probabilities = (
                self._new_value(tensor.shape, tensor.dtype, *self._device)
                for tensor in (plan.tiles, plan.probabilities)
            )
            pair = tiles, probabilities
        self._values[n] = pair
        return pair


def nodes_by_provider(session: Any) -> dict[str, Counter[str]]:
    """Count node types per execution provider, for a session opened with ``RECORD_ASSIGNMENT``; empty if this
    ONNX Runtime (before 1.24) does not report them."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    found: dict[str, Counter[str]] = {}
    for part in () if ask is None else ask():
        kinds = found.setdefault(str(part.ep_name), Counter())
        kinds.update(str(node.op_type) for node in part.get_nodes())
    return found


def heavy_on_cpu(nodes: dict[str, Counter[str]]) -> list[str]:
    """Return expensive operators assigned to the CPU, as ``3 Conv``; must be empty if a GPU was requested."""
    return _counted(sorted((kind, n) for kind, n in nodes.get(CPU_PROVIDER, Counter()).items() if kind in _HEAVY))


def summary(nodes: dict[str, Counter[str]]) -> dict[str, int]:
    """Return the number of nodes per provider, for the record."""
    return {provider: kinds.total() for provider, kinds in nodes.items()}


def _counted(kinds: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{n} {kind}" for kind, n in kinds]
