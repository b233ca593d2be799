"""The machine a figure was measured on: processor, memory, versions, threads, load. No host name, user or path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cellseg_benchmarks.harness.memory import meminfo
from cellseg_deploy import threads as thread_plans
from cellseg_deploy.backends.device_class import device_class
from cellseg_deploy.errors import CellsegError

_PACKAGES = (
    *("cellseg-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
    *("cuda-bindings", "torch"),
)
_MORE_PACKAGES = (
    "opencv-python-headless",
    "scikit-image",
    "scipy",
    "pillow",
    "tifffile",
    "imagecodecs",
    "nncf",
    "timm",
)
# CPU features that decide the speed of matrix products, narrow to wide; names as Linux writes them.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"),
    "ORT_NUM_THREADS",
)
DRIVER_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia")
"""What NVIDIA's driver leaves on Linux, also where a container has no nvidia-smi."""
_BUSY_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """Facts that do not change while a benchmark runs; None or empty if the system does not report them.

    ``cores``: available to this process; ``cpu_quota``: cores' worth of time a container allows. ``threads``:
    environment variables that set numbers of threads, where they are set.
    """

    system: str
    processor: str
    device_class: str
    instructions: tuple[str, ...]
    logical_cores: int | None
    physical_cores: int | None
    cores: int | None
    cpu_quota: float | None
    last_level_cache_bytes: int | None
    memory_bytes: int | None
    gpu: dict[str, Any] | None
    no_gpu: str
    threads: dict[str, str]
    python: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Load:
    """Load of the machine from other work. ``average``: over 1, 5 and 15 minutes, in cores. ``busy_share``: of
    all cores over half a second in which the benchmark itself did nothing."""

    average: tuple[float, ...] = ()
    busy_share: float | None = None
    memory_available_bytes: int | None = None
    swap_used_bytes: int | None = None


@dataclass(frozen=True)
class Conditions:
    """Machine, and its load before and after."""

    machine: Machine
    before: Load
    after: Load = field(default_factory=Load)

    def remarks(self) -> list[str]:
        """Notes for a reader of the figures: sentences."""
        found = []
        for when, load in (("before", self.before), ("after", self.after)):
            if load.busy_share is not None and load.busy_share > 0.05:
                found.append(f"other work kept {load.busy_share:.0%} of the cores busy {when} the measurement")
        return found


def describe_machine() -> dict[str, Any]:
    """System, processor, Python, and versions of the packages that make and run forms."""
    return {
        "system": platform.platform(),
        "processor": platform.processor() or "unknown",
        "python": platform.python_version(),
        **{name: _version(name) or "not installed" for name in _PACKAGES},
    }


def look() -> Machine:
    """Describe this machine."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split()) | set(_field(cpuinfo, "Features").split())
    gpu, no_gpu = look_for_gpu()
    versions = {name: found for name in (*_PACKAGES, *_MORE_PACKAGES) if (found := _version(name))}
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        processor=_field(cpuinfo, "model name") or platform.processor() or "unknown",
        device_class=device_class("cpu"),
        instructions=tuple(name for name in _INSTRUCTIONS if name in flags),
        logical_cores=os.cpu_count(),
        physical_cores=physical_cores(cpuinfo),
        cores=usable_cores(),
        cpu_quota=thread_plans.cpu_quota(),
        last_level_cache_bytes=cache_bytes(_read("/sys/devices/system/cpu/cpu0/cache/index3/size")),
        memory_bytes=meminfo().get("MemTotal"),
        gpu=gpu,
        no_gpu=no_gpu,
        threads={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        python=platform.python_version(),
        versions=versions,
    )


def load(sleep: Callable[[float], None] = time.sleep) -> Load:
    """Return the current load; takes half a second, in which the caller must not compute."""
    before = cpu_ticks(_read("/proc/stat"))
    sleep(_BUSY_SECONDS)
    after = cpu_ticks(_read("/proc/stat"))
    memory = meminfo()
    swap = memory["SwapTotal"] - memory["SwapFree"] if {"SwapTotal", "SwapFree"} <= memory.keys() else None
    return Load(
        average=tuple(round(value, 2) for value in os.getloadavg()) if hasattr(os, "getloadavg") else (),
        busy_share=busy_share(before, after),
        memory_available_bytes=memory.get("MemAvailable"),
        swap_used_bytes=swap,
    )


def look_for_gpu() -> tuple[dict[str, Any] | None, str]:
    """Facts of the first NVIDIA GPU and "", or None and why no GPU can be used."""
    from cellseg_deploy.backends.cuda_runtime import Cuda

    try:
        return asdict(Cuda(0).gpu), ""
    except CellsegError as error:
        reason = str(error).partition(";")[0]
    driver = shutil.which("nvidia-smi") or any(Path(path).exists() for path in DRIVER_SIGNS)
    if driver and _version("torch") is not None:  # PyTorch includes its own CUDA
        import torch

        if torch.cuda.is_available():
            facts = torch.cuda.get_device_properties(0)
            capability = f"{facts.major}.{facts.minor}"
            return {"index": 0, "name": facts.name, "compute_capability": capability,
                    "memory_bytes": facts.total_memory}, ""  # fmt: skip
    return None, reason


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def physical_cores(cpuinfo: str) -> int | None:
    """Pairs of socket and core in the text of /proc/cpuinfo; None if it has none."""
    sockets = re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return len(set(zip(sockets, cores, strict=False))) or None


def cache_bytes(text: str) -> int | None:
    """``32768K`` as bytes."""
    match = re.fullmatch(r"(\d+)([KMG])", text.strip())
    return None if match is None else int(match[1]) * 1024 ** (1 + "KMG".index(match[2]))


def cpu_ticks(stat: str) -> tuple[int, int] | None:
    """Idle ticks and all ticks of all cores since the start, from the text of /proc/stat."""
    words = stat.partition("\n")[0].split()
    if len(words) < 5 or words[0] != "cpu":
        return None
    ticks = [int(word) for word in words[1:9]]  # guest time is part of user time
    return ticks[3] + (ticks[4] if len(ticks) > 4 else 0), sum(ticks)


def busy_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Share of ticks between two ``cpu_ticks`` that were not idle."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round(1 - (after[0] - before[0]) / (after[1] - before[1]), 4)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return "" if match is None else match[1].strip()
