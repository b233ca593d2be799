"""The part of the CUDA runtime needed to run an engine: devices, a stream, memory, copies, a captured graph.

The bindings are NVIDIA's own (``cuda.bindings.runtime``): each call returns a tuple whose first entry is an error
code. Every code is checked here and turned into an error of this package.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import BackendUnavailableError, DataError, UsageError

_INSTALL = "pip install cuda-bindings"  # in the extras gpu and tensorrt


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU and its CUDA. ``compute_capability``: as ``"8.6"``. Versions: as ``"13.0"``;
    ``driver_cuda_version`` is the newest CUDA the driver supports, ``cuda_version`` that of the runtime library."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    cuda_version: str
    driver_cuda_version: str


def parse_device(device: str) -> int:
    """Return the GPU index in ``cuda`` or ``cuda:N``; raises ``UsageError`` for anything else."""
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise UsageError(f"device {device!r} cannot run a TensorRT engine; expected cuda or cuda:N")
    return int(match[1] or 0)


def import_bindings() -> Any:
    """Import ``cuda.bindings.runtime``; raises ``BackendUnavailableError`` naming the command that installs it."""
    try:
        from cuda.bindings import runtime
    except (ImportError, RuntimeError) as error:  # RuntimeError: a CUDA library failed to load
        raise BackendUnavailableError(f"NVIDIA's CUDA bindings cannot be loaded ({error}); run: {_INSTALL}") from error
    return runtime


class Cuda:
    """CUDA calls on one GPU. Errors: ``BackendUnavailableError`` while opening, ``MemoryError`` when memory runs out,
    ``DataError`` for any other call that fails."""

    def __init__(self, index: int, bindings: Any | None = None) -> None:
        """Select GPU ``index``. ``bindings``: the module to call, NVIDIA's by default."""
        self._rt = import_bindings() if bindings is None else bindings
        self.gpu = _open_gpu(self._rt, index)

    def select(self) -> None:
        """Make this GPU current in the calling thread, which CUDA requires in each thread."""
        self._call(self._rt.cudaSetDevice, self.gpu.index)

    def create_stream(self) -> Any:
        """Create a stream that does not wait for the default one."""
        return self._call(self._rt.cudaStreamCreateWithFlags, self._rt.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        self._call(self._rt.cudaStreamDestroy, stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until all work queued on ``stream`` is done; errors of that work are raised here."""
        self._call(self._rt.cudaStreamSynchronize, stream)

    def allocate(self, nbytes: int) -> int:
        """Allocate ``nbytes`` of device memory and return its address."""
        return int(self._call(self._rt.cudaMalloc, nbytes))

    def free(self, address: int) -> None:
        self._call(self._rt.cudaFree, address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Allocate ``nbytes`` of host memory that the GPU can copy from and to asynchronously; return its address."""
        return int(self._call(self._rt.cudaHostAlloc, nbytes, self._rt.cudaHostAllocDefault))

    def free_pinned(self, address: int) -> None:
        self._call(self._rt.cudaFreeHost, address)

    def copy_to_device(self, device: int, host: int, nbytes: int, stream: Any) -> None:
        """Queue a copy; ``host`` must be pinned and must not change before ``synchronize``."""
        self._call(
            self._rt.cudaMemcpyAsync, device, host, nbytes, self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice, stream
        )

    def copy_to_host(self, host: int, device: int, nbytes: int, stream: Any) -> None:
        """Queue a copy; ``host`` must be pinned and must not be read before ``synchronize``."""
        self._call(
            self._rt.cudaMemcpyAsync, host, device, nbytes, self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream
        )

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what ``work`` queues on ``stream``, without running it, as a graph to ``launch``."""
        self._call(
            self._rt.cudaStreamBeginCapture,
            stream,
            self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        )
        try:
            work()
        finally:
            graph = self._call(self._rt.cudaStreamEndCapture, stream)  # also after an error: else the stream is lost
        try:
            return self._call(self._rt.cudaGraphInstantiate, graph, 0)
        finally:
            self._call(self._rt.cudaGraphDestroy, graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._call(self._rt.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call(self._rt.cudaGraphExecDestroy, graph)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call and check; return the value, or None if the call returns only a code."""
        code, *values = function(*arguments)
        if code != self._rt.cudaError_t.cudaSuccess:
            what = f"{getattr(function, '__name__', 'CUDA call')}: {_text_of(self._rt, code)}"
            if code == self._rt.cudaError_t.cudaErrorMemoryAllocation:
                raise MemoryError(
                    f"out of GPU memory ({what}); use a smaller batch, or close other programs that use the GPU"
                )
            raise DataError(f"a CUDA call failed, {what}")
        return values[0] if values else None


class PinnedBuffers:
    """A host array in pinned memory with a device buffer of the same size, for the life of one backend."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        """Allocate both for an array of ``shape`` and ``dtype``; on ``MemoryError`` neither is kept."""
        self._cuda = cuda
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self.host_address = cuda.allocate_pinned(nbytes)
        try:
            self.device_address = cuda.allocate(nbytes)
        except BaseException:
            cuda.free_pinned(self.host_address)
            raise
        self.host = as_array(self.host_address, shape, dtype)

    def close(self) -> None:
        """Free both; the array must not be used afterwards."""
        del self.host
        self._cuda.free_pinned(self.host_address)
        self._cuda.free(self.device_address)


def as_array(address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the memory at ``address`` as an array, without a copy; the allocator must keep it alive."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype=np.dtype(dtype))
    return array.reshape(shape)


@contextmanager
def opening() -> Iterator[None]:
    """Report a CUDA call that fails while a device is opened as an unavailable device."""
    try:
        yield
    except DataError as error:
        raise BackendUnavailableError(f"{error}; check the NVIDIA driver with nvidia-smi") from error


def _open_gpu(rt: Any, index: int) -> Gpu:
    code, count = _pair(rt.cudaGetDeviceCount())
    if code != rt.cudaError_t.cudaSuccess or not count:
        reason = _text_of(rt, code) if code != rt.cudaError_t.cudaSuccess else "CUDA lists no device"
        raise BackendUnavailableError(
            f"no NVIDIA GPU can be used here ({reason}); TensorRT engines are built and run on the machine with the "
            "GPU (see nvidia-smi there), and `backend='auto'` runs the .onnx without one"
        )
    if index >= count:
        raise BackendUnavailableError(f"device cuda:{index} was requested, but the last GPU here is cuda:{count - 1}")
    (code,) = rt.cudaSetDevice(index)
    if code != rt.cudaError_t.cudaSuccess:
        raise BackendUnavailableError(f"device cuda:{index} cannot be used: {_text_of(rt, code)}")
    code, properties = _pair(rt.cudaGetDeviceProperties(index))
    if code != rt.cudaError_t.cudaSuccess or properties is None:
        raise BackendUnavailableError(f"device cuda:{index} could not be queried: {_text_of(rt, code)}")
    name = properties.name
    return Gpu(
        index=index,
        name=(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)).rstrip("\0"),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        cuda_version=_version(_pair(rt.cudaRuntimeGetVersion())[1]),
        driver_cuda_version=_version(_pair(rt.cudaDriverGetVersion())[1]),
    )


def _pair(result: Any) -> tuple[Any, Any]:
    """Return code and value; the bindings omit the value, or return None, if a call failed."""
    code, *values = result
    return code, values[0] if values else None


def _text_of(rt: Any, code: Any) -> str:
    failed, text = _pair(rt.cudaGetErrorString(code))
    if failed != rt.cudaError_t.cudaSuccess or text is None:
        return str(code)
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _version(number: int | None) -> str:
    """Format CUDA's 13050 as 13.5; ``none`` without a driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"
