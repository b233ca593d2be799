"""TensorRT on an NVIDIA GPU: an engine file, or an ONNX model from which one is built once and kept.

    MODEL.engine + MODEL.engine.json -> hash and machine checked -> engine -> context -> calls of up to ``max`` tiles
    MODEL.onnx -> the user's cache folder -> already there? else build -> as above

Everything decided without a device is in other modules and tested without one: batches and buffers
(``tensorrt_buffers``), building (``tensorrt_build``), the description of an engine (``tensorrt_sidecar``), the cache
(``engine_cache``), CUDA's calls (``cuda_runtime``).

Precision is that of the model file. An fp32 model gives an fp32 engine, with TF32 off: half precision is made by
``cellseg-export tensorrt``, through the parity gate.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.cuda_runtime import Cuda, Gpu, PinnedBuffers, opening, parse_device
from cellseg_deploy.backends.engine_cache import cache_folder, engine_name, prepare_folder
from cellseg_deploy.backends.tensorrt_buffers import Call, plan_buffers, plan_calls
from cellseg_deploy.backends.tensorrt_build import (
    BuildOptions,
    build_engine,
    check_version,
    make_logger,
    why,
)
from cellseg_deploy.backends.tensorrt_sidecar import (
    SUFFIX,
    EngineSidecar,
    Machine,
    check_engine,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, OutputInUseError, UsageError, plural
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.lock import exclusive
from cellseg_deploy.models.onnx_file import ModelFile, read_model_file
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

_DRIVER_FILE = Path("/sys/module/nvidia/version")
UNVERIFIED = (
    "unverified: built by cellseg-infer, its counts have not been compared on this GPU; "
    "`cellseg-export tensorrt` builds one and compares"
)

_log = logging.getLogger(__name__)


class TensorRTBackend(Backend):
    """A TensorRT engine on one GPU, with buffers for its largest batch and a stream of its own; nothing is shared."""

    name = "tensorrt"

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cuda",
        rebuild: bool = False,
        options: BuildOptions | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Open the engine ``path``, or the engine of the ONNX model ``path``, on ``device`` (``cuda``, ``cuda:N``).

        ``rebuild``: build the engine of an ONNX model again even if it is in the cache. ``options``: of that build.
        ``cuda_graph``: record the full batch once and replay it, which saves the launch of each kernel and costs the
        memory of a second context.

        Raises ``BackendUnavailableError`` without TensorRT, CUDA bindings or GPU, ``ModelError`` for an engine that is
        damaged or made for another machine, ``UsageError``, ``OutputError`` for the cache folder.
        """
        index = parse_device(device)
        if path.suffix.lower() not in (SUFFIX, ".onnx"):
            raise UsageError(f"{path}: expected an engine ({SUFFIX}) or a model (.onnx)")
        if rebuild and path.suffix.lower() == SUFFIX:
            raise UsageError(
                f"{path}: an engine cannot be built from itself; give the .onnx it was made from, or run: "
                f"cellseg-export tensorrt MODEL.onnx -o {path}"
            )
        self._resources = ExitStack()
        try:
            trt, cuda, here = open_device(index)
            if path.suffix.lower() == SUFFIX:
                spec, sidecar, data = open_engine(path, here)
                self.engine_path = path
            else:
                model = read_model_file(path)
                self.engine_path, sidecar, data = cached_engine(
                    trt, model, here, options or BuildOptions(), rebuild=rebuild
                )
                # The model may have been calibrated since; its own parity result does not cover its engine.
                spec = msgspec.structs.replace(model.spec, parity=sidecar.spec.parity)
            self.sidecar, self.spec = sidecar, spec
            self.device, self.precision = f"cuda:{index}", sidecar.precision
            self.batch_step = sidecar.profile.max if sidecar.profile.min == sidecar.profile.max else 1
            self._open(trt, cuda, data, cuda_graph)
        except BaseException:
            self.close()
            raise

    def _open(self, trt: Any, cuda: Cuda, data: bytes, cuda_graph: bool) -> None:
        """Create engine, context, stream and buffers; ``close`` frees them in reverse order."""
        self._cuda = cuda
        self._version = str(trt.__version__)
        self._logger = make_logger(trt)
        runtime = trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise ModelError(
                f"{self.engine_path}: TensorRT {trt.__version__} cannot open this engine: {why(self._logger)}; "
                "build it again"
            )
        self._runtime, self._engine = runtime, engine
        check_signature(trt, engine, self.sidecar, self.engine_path)
        self._context = self._new_context()
        plan = plan_buffers(self.spec, self.sidecar.profile.max)
        self._plan = plan
        with opening():
            self._stream = cuda.create_stream()
            self._resources.callback(cuda.destroy_stream, self._stream)
            self._tiles = PinnedBuffers(cuda, plan.tiles.shape, plan.tiles.dtype)
            self._resources.callback(self._tiles.close)
            self._probabilities = PinnedBuffers(cuda, plan.probabilities.shape, plan.probabilities.dtype)
            self._resources.callback(self._probabilities.close)
        self._bind(self._context)
        self._use_graph = cuda_graph
        self._graph: Any = None

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self._cuda.select()  # the caller may be on another thread than the one that opened
        out = np.empty((len(tiles_nhwc), *self._plan.probabilities.shape[1:]), np.float32)
        for call in plan_calls(len(tiles_nhwc), self.sidecar.profile):
            self._tiles.host[: call.n] = tiles_nhwc[call.rows]
            self._tiles.host[call.n : call.batch] = 0
            self._run(call)
            out[call.rows] = self._probabilities.host[: call.n]
        return out

    def _run(self, call: Call) -> None:
        """Run the tiles in the pinned input; the results are in the pinned probabilities afterwards."""
        if self._use_graph and call.batch == self.sidecar.profile.max:
            if self._graph is None:
                self._graph = self._capture(call.batch)
            self._cuda.launch(self._graph, self._stream)
        else:
            self._shape(self._context, call.batch)
            self._enqueue(self._context, call.batch)
        self._cuda.synchronize(self._stream)

    def _capture(self, batch: int) -> Any:
        """Capture the full batch as a graph with its own context: a graph holds addresses in the context's memory, and
        another batch size would move that memory."""
        context = self._new_context()
        self._bind(context)
        self._shape(context, batch)
        self._enqueue(context, batch)  # run once first: a change of shape causes work that cannot be captured
        self._cuda.synchronize(self._stream)
        graph = self._cuda.capture(self._stream, partial(self._enqueue, context, batch))
        self._graph_context = context
        self._resources.callback(self._cuda.destroy_graph, graph)
        return graph

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise MemoryError(
                f"TensorRT could not create a context, usually for lack of GPU memory: {why(self._logger)}"
            )
        return context

    def _bind(self, context: Any) -> None:
        for name, buffers in ((INPUT_NAME, self._tiles), (OUTPUT_NAME, self._probabilities)):
            if not context.set_tensor_address(name, buffers.device_address):
                raise DataError(f"TensorRT does not accept the buffer of {name}: {why(self._logger)}")

    def _shape(self, context: Any, batch: int) -> None:
        shape = self._plan.tiles.shape_of(batch)
        if not context.set_input_shape(INPUT_NAME, shape):
            raise DataError(f"TensorRT does not accept tiles of shape {shape}: {why(self._logger)}")
        got = tuple(context.get_tensor_shape(OUTPUT_NAME))
        if got != self._plan.probabilities.shape_of(batch):  # a larger result would overrun the buffer
            raise DataError(
                f"TensorRT would answer with shape {got}, expected {self._plan.probabilities.shape_of(batch)}"
            )

    def _enqueue(self, context: Any, batch: int) -> None:
        """Queue copy in, run and copy out on the stream."""
        self._cuda.copy_to_device(
            self._tiles.device_address, self._tiles.host_address, self._plan.tiles.nbytes_of(batch), self._stream
        )
        if not context.execute_async_v3(int(self._stream)):
            raise DataError(f"TensorRT could not run {plural(batch, 'tile')}: {why(self._logger)}")
        self._cuda.copy_to_host(
            self._probabilities.host_address,
            self._probabilities.device_address,
            self._plan.probabilities.nbytes_of(batch),
            self._stream,
        )

    def _close(self) -> None:
        """Free device and pinned memory, the stream, and the engine after them."""
        try:
            if hasattr(self, "_stream"):
                self._cuda.select()
                self._cuda.synchronize(self._stream)
        finally:
            self._resources.close()
        for part in ("_stream", "_graph_context", "_context", "_engine", "_runtime"):  # in this order
            if hasattr(self, part):
                delattr(self, part)

    def describe(self) -> dict[str, Any]:
        """Return versions, GPU, batch sizes, hashes, and how the counts of this engine were compared."""
        sidecar = self.sidecar
        return {
            "tensorrt": self._version,
            "built_with_tensorrt": sidecar.built_on.tensorrt,
            "gpu": self._cuda.gpu.name,
            "compute_capability": self._cuda.gpu.compute_capability,
            "cuda": self._cuda.gpu.cuda_version,
            "driver": driver_version(),
            "engine_path": str(self.engine_path),
            "engine_sha256": sidecar.engine_sha256,
            "model_file_sha256": sidecar.onnx_sha256,
            "model_identity": sidecar.model_identity,
            "batch_profile": str(sidecar.profile),
            "cuda_graph": self._use_graph,
        }


def open_device(index: int) -> tuple[Any, Cuda, Machine]:
    """Return TensorRT, GPU ``index`` selected, and the sidecar's record of both. Raises ``BackendUnavailableError``.

    The GPU is checked first: without one, installing TensorRT would not help.
    """
    with opening():
        cuda = Cuda(index)
    trt = import_tensorrt()
    check_version(trt)
    return trt, cuda, machine_of(trt, cuda.gpu)


def import_tensorrt() -> Any:
    """Import ``tensorrt``; raises ``BackendUnavailableError`` with the command that installs it."""
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as error:  # OSError: its libraries failed to load
        raise BackendUnavailableError(
            f"TensorRT is not installed or broken ({error}); on a machine with an NVIDIA GPU run: "
            "pip install 'cellseg-deploy[tensorrt]'"
        ) from error
    if not hasattr(tensorrt, "Builder"):
        raise BackendUnavailableError(
            "the package tensorrt is installed without its libraries; run: "
            "pip uninstall -y tensorrt && pip install 'cellseg-deploy[tensorrt]'"
        )
    return tensorrt


def import_tensorrt_rtx() -> Any:
    """Import ``tensorrt_rtx``, whose builder needs no GPU; raises ``BackendUnavailableError``."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"TensorRT-RTX is not installed or broken ({error}); `cellseg-export tensorrt --check-only` needs it; run: "
            "pip install 'cellseg-deploy[trt-check]'"
        ) from error
    return tensorrt_rtx


def machine_of(trt: Any, gpu: Gpu) -> Machine:
    """Describe this machine as an engine's sidecar records it."""
    return Machine(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        tensorrt=str(trt.__version__),
        cuda=gpu.cuda_version,
        driver=driver_version(),
    )


def driver_version() -> str:
    """Return the NVIDIA driver version on Linux, ``unknown`` elsewhere; for the record."""
    try:
        return _DRIVER_FILE.read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def open_engine(path: Path, here: Machine, *, how_to_rebuild: str = "") -> tuple[ModelSpec, EngineSidecar, bytes]:
    """Read the engine file ``path`` once, so that the returned bytes are the ones hashed. Raises ``ModelError``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the engine cannot be read ({error.strerror})") from error
    sidecar = read_sidecar(path)
    check_engine(path, data, sidecar, here, how_to_rebuild=how_to_rebuild)
    return sidecar.spec, sidecar, data


def cached_engine(
    trt: Any, model: ModelFile, here: Machine, options: BuildOptions, *, rebuild: bool
) -> tuple[Path, EngineSidecar, bytes]:
    """Return the engine of ``model`` for ``here`` from the user's cache folder, built now if it is missing.

    Its name derives from the model's identity (calibration does not orphan it), GPU, TensorRT and options. A damaged
    engine is refused, not replaced, so that the damage is noticed. One without a sidecar is from an interrupted build
    and is built again. If several processes need the same engine, one builds it; the others wait and use it.
    """
    folder = prepare_folder(cache_folder())
    facts = (here.gpu, here.compute_capability, here.tensorrt, msgspec.to_builtins(options))
    path = folder / engine_name(model.spec.name, model.identity, *facts)
    if not rebuild and sidecar_path(path).exists():
        try:
            return _kept_engine(path, model, here)
        except ModelError:
            if not os.access(folder, os.W_OK):
                raise
            # Damaged, or about to be replaced by another process: only the holder of the lock can tell.
    with _alone(path):
        if not rebuild and sidecar_path(path).exists():
            return _kept_engine(path, model, here)
        return _new_engine(trt, path, model, here, options)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the location of the engine ``path`` in the cache; logs if it must wait for another process."""
    name = f"{path.name}.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path.parent, name))
        except OutputInUseError:
            _log.warning("another process is building this TensorRT engine; waiting for it")
            stack.enter_context(exclusive(path.parent, name, wait=True))
        yield


def _kept_engine(path: Path, model: ModelFile, here: Machine) -> tuple[Path, EngineSidecar, bytes]:
    _, sidecar, data = open_engine(path, here, how_to_rebuild="build it again with `rebuild=True`")
    if sidecar.model_identity != model.identity:
        raise ModelError(f"{path}: this engine was built from another network; build it again with `rebuild=True`")
    return path, sidecar, data


def _new_engine(
    trt: Any, path: Path, model: ModelFile, here: Machine, options: BuildOptions
) -> tuple[Path, EngineSidecar, bytes]:
    if model.precision == "fp32":
        _log.warning(
            "%s holds fp32 weights, so this is an fp32 engine without TF32; "
            "for half precision run: cellseg-export tensorrt %s -o MODEL.engine",
            model.path,
            model.path,
        )
    _log.warning("building a TensorRT engine for %s, once; this takes a minute or more", here.gpu)
    build_to(trt, model, here, options, path, parity=UNVERIFIED)
    _log.warning("engine kept in %s; its counts have not been compared on this GPU", path)
    return _kept_engine(path, model, here)


def build_to(
    trt: Any,
    model: ModelFile,
    here: Machine,
    options: BuildOptions,
    path: Path,
    *,
    parity: str,
    source: ModelFile | None = None,
) -> EngineSidecar:
    """Build the engine of ``model`` into the file ``path`` with its sidecar next to it; return the sidecar.

    ``parity``: how the counts of this engine were compared, replacing that sentence of the model file in its ModelSpec.
    ``source``: the model file to name in the sidecar, if ``model`` was derived from another one for this build.
    The sidecar comes last: an engine without one is not opened. Raises as ``build_engine``, and ``OutputError``.
    """
    data = build_engine(trt, model, options)
    source = source or model
    sidecar = EngineSidecar(
        engine_sha256=hashlib.sha256(data).hexdigest(),
        engine_bytes=len(data),
        onnx_name=source.path.name,
        onnx_sha256=source.file_sha256,
        model_identity=source.identity,
        precision=model.precision,
        built_on=here,
        profile=options.profile,
        workspace_mib=options.workspace_mib,
        spec=msgspec.structs.replace(model.spec, parity=parity),
    )
    sidecar_path(path).unlink(missing_ok=True)  # of an older engine, about to be replaced
    write_bytes(path, data)
    write_sidecar(path, sidecar)
    return sidecar


def check_signature(trt: Any, engine: Any, sidecar: EngineSidecar, path: Path) -> None:
    """Raise ``ModelError`` unless the opened engine's inputs and outputs match its sidecar: buffers depend on them."""
    plan = plan_buffers(sidecar.spec, sidecar.profile.max)
    modes, types = trt.TensorIOMode, trt.DataType
    expected = {
        (INPUT_NAME, modes.INPUT, types.UINT8, (-1, *plan.tiles.shape[1:])),
        (OUTPUT_NAME, modes.OUTPUT, types.FLOAT, (-1, *plan.probabilities.shape[1:])),
    }
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {
        (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
        for name in names
    }
    # A profile with a single batch size may appear as a fixed first dimension.
    free = {(name, mode, dtype, (-1, *shape[1:])) for name, mode, dtype, shape in found}
    if free != expected:
        raise ModelError(
            f"{path}: inputs and outputs of the engine are {sorted(map(str, found))}, not those of its description; "
            "build it again"
        )
    shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(INPUT_NAME, 0)]
    if shapes != list(sidecar.profile.input_shapes(sidecar.spec)):
        raise ModelError(
            f"{path}: the engine takes tiles of {shapes}, its description says batches of {sidecar.profile}; "
            "build it again"
        )
