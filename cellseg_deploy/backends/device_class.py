"""The kind of device on which a figure or verdict was obtained, and the engine version.

Two machines are of one kind if an engine uses the same arithmetic on both: for a CPU, its architecture and the widest
vector and matrix instructions that engines choose by; for a GPU, its compute capability.
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

# Widest first; names as Linux writes them. Engines pick kernels by these, so rounding depends on them.
_MATRIX = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "bf16", "asimd")

INSTALL = {"onnxruntime": "cpu", "openvino": "openvino", "tensorrt": "tensorrt"}
"""Engine -> the extra that installs it for a CPU, or for a GPU if it runs on nothing else."""

UNKNOWN_DEVICE = "which kind of GPU this is cannot be told; pip install cuda-bindings, and check nvidia-smi"
"""Why no record is kept or applies where a GPU cannot be queried, and what to do, as the end of a sentence."""

_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}


def device_class(device: str, *, cpuinfo: str | None = None) -> str:
    """Return the kind of ``device``: ``cpu-x86_64-avx512_bf16``, ``cuda-8.6``; instructions are known on Linux only.

    A GPU that cannot be queried is ``cuda-unknown``, which matches nothing (``is_known``). Raises ``UsageError`` for
    anything but ``cpu``, ``cuda`` or ``cuda:N``. ``cpuinfo``: text of /proc/cpuinfo, this machine's by default.
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


def is_known(name: str) -> bool:
    """Return whether the ``device_class`` ``name`` is a kind of device: what is unknown is not even like itself."""
    return "unknown" not in name.split("-")


def engine_version(backend: str) -> str | None:
    """Return the installed version of ``backend``, None if it is not installed; the engine is not loaded."""
    for name in _DISTRIBUTIONS[backend]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def engine_problem(backend: str, device: str) -> str:
    """Return why ``backend`` cannot run on ``device`` (end of a sentence), "" if no reason is known; nothing is loaded.

    Problems that only loading reveals are found by ``selection.select``, for the chosen engine.
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
    """Return the line ``flags`` (x86) or ``Features`` (Arm) of the first core; empty without /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compute_capability(index: int) -> str:
    from cellseg_deploy.backends.cuda_runtime import Cuda

    try:
        return Cuda(index).gpu.compute_capability
    except CellsegError:  # no bindings, no driver, no such GPU: opening the engine reports which
        return "unknown"
