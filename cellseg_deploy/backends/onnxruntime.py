"""ONNX Runtime on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.backends.onnxruntime_binding import (
    CPU_PROVIDER,
    RECORD_ASSIGNMENT,
    BoundSession,
    heavy_on_cpu,
    nodes_by_provider,
    summary,
)
from cellseg_deploy.backends.telemetry import import_onnxruntime
from cellseg_deploy.errors import BackendUnavailableError, DataError, ModelError, UsageError, plural
from cellseg_deploy.models.onnx_file import ModelFile, read_model_file
from cellseg_deploy.models.spec import INPUT_NAME, OUTPUT_NAME
from cellseg_deploy.threads import cores

_CUDA = "CUDAExecutionProvider"

# Distributions that all install into the folder `onnxruntime`; two of them overwrite each other's files.
_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")


class OnnxRuntimeBackend(Backend):
    """A model file in ONNX Runtime, on exactly the requested device."""

    name = "onnxruntime"

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Check ``path`` and open it; raises as ``open_backend`` does."""
        provider, provider_options = _provider_for(device)
        runtime = _import_runtime(provider)
        self.model_file = read_model_file(path)
        self._session = _open_session(runtime, self.model_file, (provider, provider_options), threads)
        in_use = self._session.get_providers()
        if in_use[0] != provider:
            # Where the provider's library cannot be loaded, ONNX Runtime falls back to the CPU without a word.
            reason = _why_not_loaded(runtime)
            raise BackendUnavailableError(
                f"device {device!r} was requested, but ONNX Runtime {runtime.__version__} could only open {in_use[0]}"
                f"{f' ({reason})' if reason else ''}; check the NVIDIA driver and that "
                "CUDA and cuDNN match this ONNX Runtime, or use `device='cpu'`"
            )
        self.spec = self.model_file.spec
        nodes = {} if provider == CPU_PROVIDER else nodes_by_provider(self._session)
        left = heavy_on_cpu(nodes)
        if left:
            raise BackendUnavailableError(
                f"device {device!r} was requested, but ONNX Runtime {runtime.__version__} would run "
                f"{', '.join(left)} on the CPU; update ONNX Runtime, or use `device='cpu'`"
            )
        self._nodes = summary(nodes)
        self._bound: BoundSession | None = None
        if provider != CPU_PROVIDER:
            self._bound = BoundSession(
                runtime, self._session, self.spec, device_type="cuda", device_id=provider_options["device_id"]
            )
        self.precision = self.model_file.precision
        self.device = "cpu" if provider == CPU_PROVIDER else f"cuda:{provider_options['device_id']}"
        self._threads = threads
        self._version = str(runtime.__version__)

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            if self._bound is not None:
                return self._bound.run(tiles_nhwc)
            (probabilities,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: tiles_nhwc})
            return np.asarray(probabilities, np.float32)
        except Exception as error:  # ONNX Runtime's exceptions have no public common root
            if re.search(r"bad.?alloc|allocate memory|out of memory", str(error), re.IGNORECASE):
                raise MemoryError(f"ONNX Runtime ran out of memory on {plural(len(tiles_nhwc), 'tile')}") from error
            raise DataError(
                f"ONNX Runtime could not run {plural(len(tiles_nhwc), 'tile')}: {_first_line(error)}"
            ) from error

    def _close(self) -> None:
        """Release the session and its memory."""
        self._bound = None
        self._session = None

    def describe(self) -> dict[str, Any]:
        """Return model hashes, engine version and settings."""
        return {
            "model_path": str(self.model_file.path),
            "model_identity": self.model_file.identity,
            "model_file_sha256": self.model_file.file_sha256,
            "model_opset": self.model_file.opset,
            "onnxruntime": self._version,
            "threads": self._threads,
            "providers": self._session.get_providers() if self._session is not None else [],
            "nodes_by_provider": self._nodes,
        }


def installed_builds() -> list[str]:
    """Return the names of the installed ONNX Runtime distributions; more than one means broken files."""
    found = []
    for name in _BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    return found


def _provider_for(device: str) -> tuple[str, dict[str, Any]]:
    if device == "cpu":
        return CPU_PROVIDER, {}
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise UsageError(f"unknown device {device!r}; expected cpu, cuda or cuda:N")
    # TF32 would round fp32 weights to 10 bits silently; precision is a form of the model, not of the machine.
    # By default cuDNN's algorithms are chosen by timing them, again in each process and for each batch size: other runs
    # may then give other bits, and the first batch of each size waits.
    return _CUDA, {"device_id": int(match[1] or 0), "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}


def import_runtime(device: str) -> Any:
    """Import onnxruntime if it supports ``device``; raises ``BackendUnavailableError``."""
    return _import_runtime(_provider_for(device)[0])


def _import_runtime(provider: str) -> Any:
    """Import onnxruntime, checking that at most one build is installed and that it supports ``provider``."""
    extra = "cpu" if provider == CPU_PROVIDER else "gpu"
    builds = installed_builds()
    if len(builds) > 1:
        raise BackendUnavailableError(
            f"{' and '.join(builds)} are both installed and overwrite each other's files; keep one: "
            f"pip uninstall -y {' '.join(builds)} && pip install 'cellseg-deploy[{extra}]'"
        )
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise BackendUnavailableError(
            f"ONNX Runtime is not installed or broken ({error}); run: pip install 'cellseg-deploy[{extra}]'"
        ) from error
    if provider not in onnxruntime.get_available_providers():
        raise BackendUnavailableError(
            f"this ONNX Runtime ({onnxruntime.__version__}) is built without {provider}; for an NVIDIA GPU run: "
            f"pip uninstall -y {' '.join(builds)} && pip install 'cellseg-deploy[gpu]'"
        )
    if extra == "gpu" and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # preload_dlls prints; stdout is reserved for results
            onnxruntime.preload_dlls()
    return onnxruntime


def _open_session(runtime: Any, model: ModelFile, provider: tuple[str, dict[str, Any]], threads: int | None) -> Any:
    on_gpu = provider[0] != CPU_PROVIDER
    options = runtime.SessionOptions()
    # Its own default counts cores outside the process's share too, and pins a thread to each: the helpers' work then
    # waits on one core while another idles.
    options.intra_op_num_threads = threads or cores()
    # Idle threads of the engine poll for work: 0.1 ms bridges the gaps inside a call (shorter costs a lone image 10 to
    # 15 %), and longer takes the core from the helpers.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    if on_gpu:
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    options.log_severity_level = 4  # every failure is raised; nothing is printed in addition
    try:
        # By default a provider that fails is replaced by the CPU, and the reason is only printed, to stdout.
        return runtime.InferenceSession(model.data, sess_options=options, providers=[provider], enable_fallback=0)
    except Exception as error:  # as in _predict
        if on_gpu and re.search(r"cuda|cudnn|cublas", str(error), re.IGNORECASE):
            raise BackendUnavailableError(
                f"ONNX Runtime {runtime.__version__} could not open the GPU: {_gpu_reason(error)}; check the NVIDIA "
                "driver (nvidia-smi) and what else uses the GPU, or take `device='cpu'`"
            ) from error
        raise ModelError(
            f"{model.path}: ONNX Runtime {runtime.__version__} refuses the model: {_first_line(error)}; "
            "update ONNX Runtime or export the model again"
        ) from error


def _gpu_reason(error: BaseException) -> str:
    """Return CUDA's own message, without the files and host that ONNX Runtime's CUDA provider adds."""
    found = re.search(r"\w+ failure -?\w+: [^;]*", str(error))
    return found[0].strip() if found else _first_line(error)


def _why_not_loaded(runtime: Any) -> str:
    """Return the dynamic linker's reason why the library of the CUDA provider cannot be loaded, "" if it can."""
    folder = Path(str(runtime.__file__)).parent / "capi"
    # The second needs the first.
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        if not (folder / name).is_file():  # named otherwise on other systems
            return ""
        try:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return _first_line(error).replace(f"{folder}/", "")
    return ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
