"""On what kind of device a figure or a verdict was obtained, and with which version of which engine.

Two machines are of one kind if an engine takes the same arithmetic on both: for a CPU its architecture and the widest
of the vector and matrix instructions that engines choose by, for a GPU its compute capability.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

from cellseg_deploy.backends.cuda_runtime import parse_device
from cellseg_deploy.backends.onnxruntime import installed_builds
from cellseg_deploy.errors import CellsegError, UsageError

# Widest first; names as Linux writes them. What engines pick kernels by, and so what rounding depends on.
_MATRIX = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "bf16", "asimd")

INSTALL = {"onnxruntime": "cpu", "openvino": "openvino", "tensorrt": "tensorrt"}
"""Engine -> the extra that brings it to a CPU, or to a GPU where it has no other."""

_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}


def device_class(device: str, *, cpuinfo: str | None = None) -> str:
    """Kind of ``device``: ``cpu-x86_64-avx512_bf16``, ``cuda-8.6``; the instructions are known on Linux only.

    A GPU that cannot be asked is ``cuda-unknown``, which is like no other. Raises ``UsageError`` for what is neither
    ``cpu`` nor ``cuda`` nor ``cuda:N``. ``cpuinfo``: text of /proc/cpuinfo, by
    default this machine's.
    """
    if device != "cpu":
        try:
            index = parse_device(device)
        except UsageError:
            raise UsageError(f"unknown device {device!r}; expected cpu, cuda or cuda:N") from None
        return f"cuda-{_compute_capability(index)}"
    flags = set((_cpuinfo() if cpuinfo is None else cpuinfo).split())
    widest = next((name for name in _MATRIX if name in flags), "")
    return "-".join(part for part in ("cpu", platform.machine() or "unknown", widest) if part)


def engine_version(backend: str) -> str | None:
    """Version of the installed distribution of ``backend``, None without one; the engine is not loaded."""
    for name in _DISTRIBUTIONS[backend]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def engine_problem(backend: str, device: str) -> str:
    """Why ``backend`` cannot run on ``device`` (a sentence's end), "" if nothing speaks against it; nothing is loaded.

    What shows only when the engine is loaded is found by ``selection.select``, for the one that was chosen.
    """
    extra = "gpu" if backend == "onnxruntime" and device != "cpu" else INSTALL[backend]
    install = f"pip install 'cellseg-deploy[{extra}]'"
    found = sys.modules.get(backend) is not None or importlib.util.find_spec(backend) is not None
    if engine_version(backend) is None or not found:
        return f"not installed: {install}"
    if backend == "onnxruntime":
        builds = installed_builds()
        again = f"pip uninstall -y {' '.join(builds)} && {install}"
        if len(builds) > 1:
            return f"{' and '.join(builds)} overwrite each other's files; keep one: {again}"
        if device != "cpu" and builds != ["onnxruntime-gpu"]:
            return f"{builds[0]} runs no NVIDIA GPU: {again}"
    return ""


def _cpuinfo() -> str:
    """Lines ``flags`` (x86) or ``Features`` (Arm) of the first core; empty where there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compute_capability(index: int) -> str:
    from cellseg_deploy.backends.cuda_runtime import Cuda

    try:
        return Cuda(index).gpu.compute_capability
    except CellsegError:  # no bindings, no driver, no such GPU: opening the engine will say which
        return "unknown"
