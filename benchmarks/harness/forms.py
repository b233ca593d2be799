"""The forms of a network that are timed side by side, and how each is opened in a worker.

Every form takes uint8 tiles (N, S, S, 3) on the host and returns float32 probabilities on the host, as in production,
so transfers and layout changes count. PyTorch is not held back: ``inference_mode``, channels_last (the tiles' own
layout), weights in bf16 or half for forms of that name, ``torch.compile`` with frozen weights.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.cells import tiling
from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.segmenter import resize

Tiles = npt.NDArray[np.uint8]
REFERENCE = "pytorch-fp32"
FP32_ONNX = "fp32.onnx"


@dataclass(frozen=True)
class Form:
    """One form on one kind of device (``cpu`` or ``cuda``).

    ``arithmetic``: precision whose peak bounds it. ``file``: in the folder of forms, "" for the network itself.
    ``settings``: how to open it. ``judged_as``: its name in the parity table; "" for PyTorch, which is the reference
    for the others.
    """

    name: str
    engine: str
    device: str
    arithmetic: str
    file: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    judged_as: str = ""

    @property
    def key(self) -> str:
        """Unique name of the form."""
        return self.name if self.device == "cpu" else f"{self.name} on {self.device}"


def _torch(name: str, device: str, arithmetic: str, **settings: Any) -> Form:
    return Form(name, "pytorch", device, arithmetic, settings=settings)


FORMS = (
    _torch("pytorch-fp32", "cpu", "fp32"),
    _torch("pytorch-autocast-bf16", "cpu", "bf16", autocast="bfloat16"),
    _torch("pytorch-bf16", "cpu", "bf16", dtype="bfloat16"),
    _torch("pytorch-compile-fp32", "cpu", "fp32", compiled=True),
    _torch("pytorch-compile-bf16", "cpu", "bf16", dtype="bfloat16", compiled=True),
    Form("onnxruntime-fp32", "onnxruntime", "cpu", "fp32", FP32_ONNX, {}, "fp32"),
    Form("openvino-fp32", "openvino", "cpu", "fp32", FP32_ONNX, {"precision": "fp32"}, "openvino-fp32"),
    Form("openvino-bf16", "openvino", "cpu", "bf16", FP32_ONNX, {"precision": "bf16"}, "openvino-bf16"),
    Form("openvino-int8", "openvino", "cpu", "int8", "int8.xml", {"precision": "fp32"}, "int8"),
    # With the other operations in bf16 it is not the form that the gate judged.
    Form("openvino-int8-bf16", "openvino", "cpu", "int8", "int8.xml", {"precision": "bf16"}),
    _torch("pytorch-fp32", "cuda", "fp32"),
    _torch("pytorch-bf16", "cuda", "bf16", dtype="bfloat16"),
    _torch("pytorch-fp16", "cuda", "fp16", dtype="float16"),
    _torch("pytorch-compile-fp16", "cuda", "fp16", dtype="float16", compiled=True),
    _torch("pytorch-graph-fp16", "cuda", "fp16", dtype="float16", graph=True),
    Form("onnxruntime-fp32", "onnxruntime", "cuda", "fp32", FP32_ONNX, {}, "fp32"),
    Form("onnxruntime-fp16", "onnxruntime", "cuda", "fp16", "fp16.onnx", {}, "fp16"),
    Form("tensorrt-fp32", "tensorrt", "cuda", "fp32", "fp32.engine"),
    Form("tensorrt-fp16", "tensorrt", "cuda", "fp16", "fp16.engine"),
    Form("tensorrt-fp16-graph", "tensorrt", "cuda", "fp16", "fp16.engine", {"cuda_graph": True}),
)


def forms_for(devices: Sequence[str], names: Sequence[str] | None = None) -> list[Form]:
    """Forms on ``devices`` (``cpu``, ``cuda``), only ``names`` if passed. Raises ``UsageError`` for an unknown name."""
    known = list(dict.fromkeys(form.name for form in FORMS))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UsageError(f"no form named {', '.join(unknown)}; there are {', '.join(known)}")
    return [form for form in FORMS if form.device in devices and (not names or form.name in names)]


def sample_tiles(spec: ModelSpec, n: int) -> Tiles:
    """``n`` different tiles of a sample smear, as passed to the network: uint8 (n, S, S, 3)."""
    from cellseg_benchmarks.harness.images import smears

    scaled = resize(next(smears(1)), spec.image_scale)
    plan = tiling.plan((scaled.shape[0], scaled.shape[1]), spec.tile_size, spec.halo)
    tiles = tiling.cut(tiling.pad(scaled, plan), plan, 0, min(n, len(plan)))
    return np.ascontiguousarray(tiles[np.arange(n) % len(tiles)])


# ------------------------------------------------------------------------------------------------------ in the worker


def subject(
    engine: str, network: str, file: str, device: str, batch: int, threads: int | None, settings: dict[str, Any]
) -> Subject:
    """The form opened on ``device``, with one call, ``predict``, of ``batch`` tiles; it has already run once.

    ``network``: .safetensors or run folder, for PyTorch; ``file``: for the other engines. Raises
    ``BackendUnavailableError`` and ``ModelError`` as ``open_backend`` does.
    """
    before = gpu_bytes_in_use(device)
    backend = (
        open_torch(Path(network), device, threads, settings)
        if engine == "pytorch"
        else open_engine(engine, Path(file), device, batch, threads, settings)
    )
    tiles = sample_tiles(backend.spec, batch)
    backend.predict(tiles)
    after = gpu_bytes_in_use(device)  # workers start one after another, so the added memory is this one's
    taken = None if before is None or after is None else after - before
    facts = {key: value for key, value in backend.describe().items() if "path" not in key}
    return Subject(
        calls={"predict": lambda: backend.predict(tiles)},
        facts={"precision": backend.precision, "device": backend.device, "details": facts, "batch": batch},
        questions={"save": lambda path: np.save(path, backend.predict(tiles))},
        gpu_bytes=lambda: taken,
        close=backend.close,
    )


def open_torch(network: Path, device: str, threads: int | None, settings: dict[str, Any]) -> Backend:
    """``network`` in PyTorch; ``settings`` of ``TorchForm``."""
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailableError("PyTorch is not installed: pip install 'cellseg-deploy[train]'") from error
    from cellseg_benchmarks.harness.torch_form import TorchForm
    from cellseg_train.checkpoint import load_network

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchForm(load_network(network), device, **settings)


def open_engine(
    engine: str, file: Path, device: str, batch: int, threads: int | None, settings: dict[str, Any]
) -> Backend:
    """``file`` in ``engine``; OpenVINO is compiled for batches of ``batch``, so that no tile is padding."""
    if engine == "openvino":
        from cellseg_deploy.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(file, device=device, threads=threads, static_batch=batch, use_cache=False, **settings)
    from cellseg_deploy.backends import EngineOptions, open_backend

    return open_backend(file, EngineOptions(backend=engine, device=device, threads=threads, **settings))


def gpu_bytes_in_use(device: str) -> int | None:
    """Memory in use on the GPU ``device``, by any process; None for the CPU, or if nothing here can tell.

    With NVIDIA's bindings the first call makes the CUDA context of this process, so its memory is not part of a
    difference; nvidia-smi, which is asked without them, makes none.
    """
    if device == "cpu":
        return None
    from cellseg_deploy.backends.cuda_runtime import import_bindings, parse_device

    try:
        runtime = import_bindings()
    except BackendUnavailableError:
        return _bytes_by_nvidia_smi(parse_device(device))
    (selected,) = runtime.cudaSetDevice(parse_device(device))
    error, free, total = runtime.cudaMemGetInfo()
    return None if int(selected) or int(error) else int(total) - int(free)


def _bytes_by_nvidia_smi(index: int) -> int | None:
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, stdin=subprocess.DEVNULL)
        return int(done.stdout) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
