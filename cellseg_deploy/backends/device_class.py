"""On what kind of device a figure or a verdict was obtained, and with which version of which engine.

Two machines are of one kind if an engine takes the same arithmetic on both: for a CPU its architecture and the widest
of the vector and matrix instructions that engines choose by, for a GPU its compute capability.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path

from cellseg_deploy.errors import CellsegError

# Widest first; names as Linux writes them. What engines pick kernels by, and so what rounding depends on.
_MATRIX = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "bf16", "asimd")

_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}


def device_class(device: str, *, cpuinfo: str | None = None) -> str:
    """Kind of ``device``: ``cpu-x86_64-avx512_bf16``, ``cuda-8.6``; the instructions are known on Linux only.

    A GPU that cannot be asked is ``cuda-unknown``, which is like no other. ``cpuinfo``: text of /proc/cpuinfo, by
    default this machine's.
    """
    if device != "cpu":
        return f"cuda-{_compute_capability(device)}"
    flags = set((_cpuinfo() if cpuinfo is None else cpuinfo).split())
    widest = next((name for name in _MATRIX if name in flags), "")
    return "-".join(part for part in ("cpu", platform.machine() or "unknown", widest) if part)


def engine_version(backend: str) -> str | None:
    """Version of the installed distribution of ``backend``, None without one; the engine is not loaded."""
    for name in _DISTRIBUTIONS[backend]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _cpuinfo() -> str:
    """Lines ``flags`` (x86) or ``Features`` (Arm) of the first core; empty where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compute_capability(device: str) -> str:
    from cellseg_deploy.backends.cuda_runtime import Cuda, parse_device

    try:
        return Cuda(parse_device(device)).gpu.compute_capability
    except CellsegError:  # no bindings, no driver, no such GPU: opening the engine will say which
        return "unknown"
