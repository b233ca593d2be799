"""A GPU, CUDA's bindings and TensorRT as far as the backend talks to them, in plain Python.

What makes mistakes visible: device memory is not host memory, work put on a stream happens only when it is waited for,
a captured stream runs nothing, addresses that were freed are refused, and what fails gives a code, None or False.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np


class ErrorCode(IntEnum):
    cudaSuccess = 0  # noqa: N815  (CUDA's names, here and below)
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815


class FakeCuda:
    """``cuda.bindings.runtime`` on a machine with ``gpus``: name, major and minor compute capability of each."""

    cudaError_t = ErrorCode  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815

    def __init__(self, gpus: tuple[tuple[str, int, int], ...] = (("Fake RTX", 8, 6),)) -> None:
        self.gpus = gpus
        self.free_bytes = {"pinned": 1 << 30, "device": 1 << 30}
        self.memory: dict[int, tuple[str, Any]] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.streams: set[int] = set()
        self.log: list[str] = []
        self.fail: set[str] = set()

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def bytes_at(self, address: int, kind: str, nbytes: int) -> np.ndarray:
        found, block = self.memory[address]
        assert found == kind, f"{kind} memory expected, {found} memory given"
        assert nbytes <= len(block), "access beyond the end of a buffer"
        return np.frombuffer(block, np.uint8)[:nbytes]

    def _code(self, name: str) -> ErrorCode:
        self.log.append(name)
        return ErrorCode.cudaErrorInvalidValue if name in self.fail else ErrorCode.cudaSuccess

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:  # noqa: N802
        return (ErrorCode.cudaSuccess, len(self.gpus)) if self.gpus else (ErrorCode.cudaErrorNoDevice, None)

    def cudaGetErrorString(self, code: ErrorCode) -> tuple[Any, ...]:  # noqa: N802
        return ErrorCode.cudaSuccess, f"reason of {code.name}".encode()

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:  # noqa: N802
        return (self._code("cudaSetDevice"),)

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:  # noqa: N802
        name, major, minor = self.gpus[index]
        return ErrorCode.cudaSuccess, SimpleNamespace(
            name=name.encode() + b"\0", major=major, minor=minor, totalGlobalMem=8 << 30
        )

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return ErrorCode.cudaSuccess, 13050

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return ErrorCode.cudaSuccess, 13020

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(7)
        return self._code("cudaStreamCreateWithFlags"), 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.streams.remove(stream)
        return (self._code("cudaStreamDestroy"),)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.captured is None, "a captured stream cannot be waited for"
        for work in self.queue:
            work()
        self.queue.clear()
        return (self._code("cudaStreamSynchronize"),)

    def _allocate(self, kind: str, nbytes: int) -> tuple[Any, ...]:
        used = sum(len(block) for found, block in self.memory.values() if found == kind)
        if used + nbytes > self.free_bytes[kind]:
            return ErrorCode.cudaErrorMemoryAllocation, None
        block = (ctypes.c_uint8 * nbytes)(*([171] * min(nbytes, 64)))  # not zero: nobody promised that
        self.memory[ctypes.addressof(block)] = (kind, block)
        return ErrorCode.cudaSuccess, ctypes.addressof(block)

    def _free(self, kind: str, address: int) -> tuple[Any, ...]:
        assert self.memory.pop(address)[0] == kind
        return (ErrorCode.cudaSuccess,)

    def cudaMalloc(self, nbytes: int) -> tuple[Any, ...]:  # noqa: N802
        return self._allocate("device", nbytes)

    def cudaFree(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        return self._free("device", address)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self._allocate("pinned", nbytes)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        return self._free("pinned", address)

    def cudaMemcpyAsync(  # noqa: N802
        self, to: int, source: int, nbytes: int, kind: str, stream: int
    ) -> tuple[Any, ...]:
        kinds = ("device", "pinned") if kind == "in" else ("pinned", "device")

        def copy() -> None:
            self.bytes_at(to, kinds[0], nbytes)[:] = self.bytes_at(source, kinds[1], nbytes)

        self.put(copy)
        return (self._code("cudaMemcpyAsync"),)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:  # noqa: N802
        assert not self.queue, "work was still under way when the capture began"
        self.captured = []
        return (ErrorCode.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        work, self.captured = self.captured, None
        assert work is not None
        self.graphs[len(self.log)] = work
        return ErrorCode.cudaSuccess, len(self.log)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return self._code("cudaGraphInstantiate"), graph

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        return (ErrorCode.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.queue.extend(self.graphs[graph])
        return (self._code("cudaGraphLaunch"),)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        del self.graphs[graph]
        return (ErrorCode.cudaSuccess,)


class Flags(Enum):
    TF32 = 1


class ParserError(SimpleNamespace):
    def node_name(self) -> str:
        return self.name  # type: ignore[no-any-return]

    def node_operator(self) -> str:
        return self.operator  # type: ignore[no-any-return]

    def node(self) -> int:
        return 3

    def desc(self) -> str:
        return "cannot do\n  this"

    def code(self) -> str:
        return "UNSUPPORTED_NODE"


def make_tensorrt(cuda: FakeCuda, version: str = "10.13.0.35") -> Any:
    """The module ``tensorrt``, of ``version``, whose engines run on ``cuda``. What it does can be changed: attributes
    of ``behaviour`` (``gain``: its probabilities are multiplied by it); ``builds`` records what was asked."""
    trt = SimpleNamespace(__version__=version, builds=[])
    trt.behaviour = SimpleNamespace(
        parser_errors=[], parses=True, plan=True, context=True, runs=True, deserialises=True, gain=1.0
    )
    trt.DataType = Enum("DataType", "UINT8 FLOAT HALF")  # type: ignore[misc]
    trt.TensorIOMode = Enum("TensorIOMode", "INPUT OUTPUT")  # type: ignore[misc]
    trt.MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")  # type: ignore[misc]
    trt.ComputeCapability = Enum("ComputeCapability", "SM75 SM86")  # type: ignore[misc]
    trt.BuilderFlag = Flags
    old = version.startswith("10.")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(**({"STRONGLY_TYPED": 1} if old else {}))

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

    trt.ILogger = ILogger

    class Tensor(SimpleNamespace):
        pass

    class Network:
        def __init__(self, flags: int) -> None:
            assert flags == (2 if old else 0), "the network is not strongly typed"
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor] = []

        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))

        def get_input(self, i: int) -> Tensor:
            return self.inputs[i]

        def get_output(self, i: int) -> Tensor:
            return self.outputs[i]

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self.network = network

        num_errors = property(lambda self: len(trt.behaviour.parser_errors))

        def get_error(self, i: int) -> ParserError:
            return trt.behaviour.parser_errors[i]  # type: ignore[no-any-return]

        def parse(self, data: bytes) -> bool:
            import onnx

            self.network.data = data
            graph = onnx.load_model_from_string(data).graph
            kinds = {2: trt.DataType.UINT8, 1: trt.DataType.FLOAT, 10: trt.DataType.HALF}
            for values, tensors in ((graph.input, self.network.inputs), (graph.output, self.network.outputs)):
                for value in values:
                    dims = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
                    kind = kinds[value.type.tensor_type.elem_type]
                    tensors.append(Tensor(name=value.name, dtype=kind, shape=dims))
            return bool(trt.behaviour.parses)

    class Config:
        def __init__(self) -> None:
            self.flags = {Flags.TF32}
            self.pools: dict[Any, int] = {}
            self.capabilities: dict[int, Any] = {}

        def set_flag(self, flag: Flags) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Flags) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, nbytes: int) -> None:
            self.pools[pool] = nbytes

        def set_compute_capability(self, capability: Any, index: int) -> bool:
            self.capabilities[index] = capability
            return True

        def add_optimization_profile(self, profile: Any) -> int:
            self.profile = profile
            return 0

    class Profile:
        def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
            self.name, self.shapes = name, [tuple(low), tuple(opt), tuple(high)]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            trt.builds.append((network, config))
            if not trt.behaviour.plan:
                self.logger.log(ILogger.ERROR, "no kernel for node 4")
                return None
            content = {
                "shapes": config.profile.shapes,
                "output": list(network.outputs[0].shape),
                "model": hashlib.sha256(network.data).hexdigest(),
            }
            return json.dumps(content).encode()

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine = engine
            self.addresses: dict[str, int] = {}
            self.shape: tuple[int, ...] = ()
            self.runs = 0

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            low, _, high = self.engine.content["shapes"]
            self.shape = shape
            return bool(low[0] <= shape[0] <= high[0] and list(shape[1:]) == low[1:])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self.shape[0], *self.engine.content["output"][1:])

        def execute_async_v3(self, stream: int) -> bool:
            if stream not in cuda.streams or not trt.behaviour.runs:
                return False
            n, shape, addresses = self.shape[0], self.shape, dict(self.addresses)
            out_shape = self.get_tensor_shape("probabilities")
            trt.batches.append(n)

            def work() -> None:
                tiles = cuda.bytes_at(addresses["tiles"], "device", int(np.prod(shape))).reshape(shape)
                out = cuda.bytes_at(addresses["probabilities"], "device", 4 * int(np.prod(out_shape)))
                answer = np.zeros(out_shape, np.float32)
                mean = tiles.astype(np.float32).mean(axis=3)
                answer[:, 0] = trt.behaviour.gain / (1 + np.exp((mean - 128) / 8))
                out[:] = np.frombuffer(answer.tobytes(), np.uint8)

            cuda.put(work)
            return True

    class Engine:
        def __init__(self, content: dict[str, Any]) -> None:
            self.content = content
            self.num_io_tensors = 2

        def get_tensor_name(self, i: int) -> str:
            return ("tiles", "probabilities")[i]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name == "tiles" else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType.UINT8 if name == "tiles" else trt.DataType.FLOAT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (-1, *(self.content["shapes"][0] if name == "tiles" else self.content["output"])[1:])

        def get_tensor_profile_shape(self, name: str, index: int) -> list[Any]:
            return list(self.content["shapes"])

        def create_execution_context(self) -> Context | None:
            return Context(self) if trt.behaviour.context else None

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            trt.opened.append(data)
            if not trt.behaviour.deserialises:
                self.logger.log(ILogger.ERROR, "magic tag does not match")
                return None
            return Engine(json.loads(data))

    trt.batches, trt.opened = [], []
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt
