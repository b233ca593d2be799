"""Measuring the limits of a machine, library by library: see ``limits``.

For OpenVINO, a chain of products is timed, so that converting fp32 inputs to bf16 or 8 bits weighs as
little as inside a network, and its report of the kernels is kept: a chain that was not computed in the precision
requested is not a limit for that precision.

Memory is measured by the triad ``a = b + s c`` of STREAM (McCalpin 1995) over arrays larger than the last-level cache.
As in STREAM, three arrays are counted, without data fetched before it is overwritten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from cellseg_benchmarks.harness import images, memory
from cellseg_benchmarks.harness.machine import cache_bytes
from cellseg_benchmarks.harness.worker import Subject
from cellseg_deploy.backends.openvino import import_openvino, shared_core
from cellseg_deploy.errors import BackendUnavailableError, UsageError

CHAIN = 8
"""Number of consecutive products for a library that runs whole networks."""


def subject(part: str, device: str, size: int, threads: int | None, triad: bool = True) -> Subject:
    """Entries of one library: see ``limit_workers``."""
    parts = {"numpy": _numpy, "torch": _torch, "openvino": _openvino, "files": _files}
    if part not in parts:
        raise UsageError(f"unknown limit {part!r}; expected one of {', '.join(parts)}")
    return parts[part](device, size, threads, triad)


@dataclass
class _Entries:
    """Entries as they are collected, with their facts."""

    made_by: str
    device: str = "cpu"
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, work: float, call: Callable[[], object], kernel: str = "") -> None:
        """Add an entry; it is run once, and left out with the reason if it fails."""
        try:
            call()
        except Exception as error:  # the library may raise anything if it lacks a kernel
            self.missing[f"{self.made_by} {name}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        self.calls[name], self.work[name] = call, work
        if kernel:
            self.kernels[name] = kernel

    def subject(self, sync: Callable[[], object] = lambda: None) -> Subject:
        facts: Mapping[str, Any] = {
            "library": self.made_by,
            "device": self.device,
            "work": self.work,
            "kernels": self.kernels,
            "missing": self.missing,
        }
        return Subject(calls=self.calls, facts=facts, sync=sync)


def _numpy(device: str, size: int, threads: int | None, triad: bool) -> Subject:
    del device, threads, triad  # OpenBLAS reads the environment
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    out = np.empty_like(a)
    found = _Entries(f"numpy {np.__version__}")
    found.add("gemm fp32", 2.0 * size**3, lambda: np.matmul(a, b, out=out))
    return found.subject()


def _torch(device: str, size: int, threads: int | None, triad: bool) -> Subject:
    torch = _required("torch", "train")
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailableError("not yet run: PyTorch finds no GPU here")
    if threads is not None:
        torch.set_num_threads(threads)
    from cellseg_train.fp32 import full_fp32

    full_fp32()
    found = _Entries(f"torch {torch.__version__}", "cpu" if device == "cpu" else "cuda")
    generator = torch.Generator().manual_seed(0)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a = torch.randn(size, size, generator=generator).to(device=device, dtype=dtype)
        out = torch.empty_like(a)
        found.add(f"gemm {name}", 2.0 * size**3, partial(torch.matmul, a, a, out=out))
    whole = torch.randint(-127, 127, (size, size), generator=generator, dtype=torch.int8).to(device)
    # PyTorch's only product of 8-bit matrices, public or private.
    found.add("gemm int8", 2.0 * size**3, lambda: torch._int_mm(whole, whole))
    if triad:
        n = triad_elements(
            memory.available_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0], on_cpu=device == "cpu"
        )
        n = min(n, size**2 * 64)  # small matrices are requested where the run must be short
        x, y, z = (torch.ones(n, dtype=torch.float64, device=device) for _ in range(3))
        found.add("triad", 24.0 * n, lambda: torch.add(x, y, alpha=3.0, out=z))
    return found.subject(torch.cuda.synchronize if device != "cpu" else lambda: None)


def _openvino(device: str, size: int, threads: int | None, triad: bool) -> Subject:
    del device, triad
    ov = import_openvino()
    core = shared_core()
    found = _Entries(f"openvino {str(ov.__version__).partition('-')[0]}")
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    rng = np.random.default_rng(0)
    given = rng.random((size, size), np.float32)
    for name, hint in (("fp32", "f32"), ("bf16", "bf16"), ("int8", "f32")):
        if name == "bf16" and "BF16" not in able:
            found.missing[f"{found.made_by} gemm bf16"] = "this processor has no bf16 instructions"
            continue
        settings = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads or 0}
        compiled = core.compile_model(_chain(ov, size, quantised=name == "int8"), "CPU", settings)
        kernels = products_in(compiled)
        if not is_in_precision(kernels, name):
            found.missing[f"{found.made_by} gemm {name}"] = f"computed as {', '.join(sorted(set(kernels)))}"
            continue
        request = compiled.create_infer_request()
        call = partial(request.infer, {0: given})
        found.add(f"gemm {name}", 2.0 * CHAIN * size**3, call, kernels[0].partition("/")[0])
    return found.subject()


def _chain(ov: Any, size: int, *, quantised: bool) -> Any:
    """openvino.Model of ``CHAIN`` products of (size, size); ``quantised``: of 8-bit values, as NNCF quantises them."""
    from openvino import opset13 as ops

    rng = np.random.default_rng(1)
    given = ops.parameter([size, size], ov.Type.f32)
    value = given
    for _ in range(CHAIN):
        if quantised:
            low, high = (ops.constant(np.float32(edge)) for edge in (0, 2.55))
            value = ops.fake_quantize(value, low, high, low, high, 256)
            whole = ops.constant(rng.integers(-127, 127, (size, size), np.int8))
            weight = ops.multiply(ops.convert(whole, "f32"), ops.constant(np.float32(0.01 / size**0.5)))
        else:
            weight = ops.constant((rng.standard_normal((size, size)) / size**0.5).astype(np.float32))
        value = ops.matmul(value, weight, False, False)
    return ov.Model([value], [given], "chain")


def products_in(compiled: Any) -> list[str]:
    """``kernel/type`` of each product in a compiled OpenVINO network, as actually built."""
    found = []
    for op in compiled.get_runtime_model().get_ops():
        facts = op.get_rt_info()
        if facts["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            found.append(f"{facts['primitiveType'].astype(str)}/{facts['runtimePrecision'].astype(str)}")
    return found


def is_in_precision(kernels: Sequence[str], precision: str) -> bool:
    """Whether all of ``kernels`` (see ``products_in``), and at least one, compute in ``precision``."""
    types = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("u8", "i8")}[precision]
    return bool(kernels) and all(kernel.rpartition("/")[2] in types for kernel in kernels)


def triad_elements(available: int | None, *, on_cpu: bool) -> int:
    """Doubles in each array of the triad: twice the last cache and at least 64 MB, at most a sixteenth of memory."""
    cache = None
    if on_cpu:
        try:
            cache = cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text())
        except OSError:
            cache = None
    wanted = max(64 * 2**20, 2 * (cache or 0))
    return min(wanted, (available or 2**30) // 16) // 8


def _files(device: str, size: int, threads: int | None, triad: bool) -> Subject:
    """Reading an image in each format, and writing a label image, in one thread."""
    del device, size, threads, triad
    from cellseg_deploy.files.atomic import write_bytes
    from cellseg_deploy.images.read import read_image
    from cellseg_deploy.outputs import label_tiff

    smear = images.smear_with_truth()
    place = tempfile.TemporaryDirectory(prefix="cellseg-limits-")
    folder, pixels = Path(place.name), float(smear.labels_hw.size)
    found = _Entries("one thread")
    for name in images.FORMATS:
        path = folder / f"image.{name}"
        write_bytes(path, images.encoded(smear.image_hwc, name))
        found.add(f"read {name}", pixels, partial(read_image, path))
    found.add("write label TIFF in memory", pixels, lambda: label_tiff.encode(smear.labels_hw))
    target = folder / "labels.tif"
    found.add("write label TIFF to disk", pixels, lambda: write_bytes(target, label_tiff.encode(smear.labels_hw)))
    return replace(found.subject(), close=place.cleanup)


def _required(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendUnavailableError(f"{name} is not installed: pip install 'cellseg-deploy[{extra}]'") from error
