"""Thread counts of every component, decided in this one place.

========================  =======================================================================================
engine, on a CPU          the full total: a network of any size is most of the work, and the operating system
                          shares the cores between its threads and the helpers. If fewer threads than cores were
                          requested, a quarter goes to the helpers, so that the total is respected.
engine, on a GPU          one: it waits for the GPU.
helpers                   one per core, at most 16: decoding, labelling, encoding of different images. They first do
                          what the engine needs and then wait, so surplus helpers cost nothing.
OpenCV inside a helper    one: work is split among threads by image, not by rows within an image.
tifffile, inside          one (``maxworkers=1`` in each call); imagecodecs and Pillow use one by default.
BLAS, OpenMP of numpy     no stage calls BLAS, so its threads sleep; nothing to set.
========================  =======================================================================================

With one thread in total (``exclusive``), helper and engine take turns.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cellseg_deploy.errors import UsageError

MAX_HELPERS = 16


@dataclass(frozen=True)
class ThreadPlan:
    """``engine``: CPU threads of the engine, None for its own default. ``helpers``: threads for everything else.
    ``exclusive``: engine and helpers take turns."""

    engine: int | None
    helpers: int
    exclusive: bool = False


def plan(total: int | None = None, *, device: str = "cpu") -> ThreadPlan:
    """Plan a run with ``total`` threads overall, None for all cores; ``device``: device of the network.

    Raises ``UsageError`` if ``total`` is below 1.
    """
    return plan_for(cores(), total, on_gpu=device != "cpu")


def plan_for(n_cores: int, total: int | None, *, on_gpu: bool) -> ThreadPlan:
    """Return ``plan`` for a machine with ``n_cores`` cores; see the module docstring."""
    if total is not None and total < 1:
        raise UsageError(f"threads must be at least 1, got {total}")
    usable = min(n_cores, MAX_HELPERS)
    if on_gpu:
        return ThreadPlan(None if total is None else 1, usable if total is None else min(total, MAX_HELPERS))
    if total == 1:
        return ThreadPlan(1, 1, exclusive=True)
    if total is None or total >= n_cores:
        return ThreadPlan(total, usable)
    helpers = min(max(1, total // 4), MAX_HELPERS)
    return ThreadPlan(total - helpers, helpers)


def plan_of_engine(threads: int | None) -> ThreadPlan:
    """Plan for many images with an engine opened with ``threads``, None for one per core: the same number of helpers,
    at most 16, which usually wait for the engine. With one thread engine and helper take turns."""
    usable = min(cores() if threads is None else threads, MAX_HELPERS)
    return ThreadPlan(threads, usable, exclusive=threads == 1)


def cores() -> int:
    """Number of cores this process may use: limited by its CPU affinity and by a container's quota."""
    is_linux = hasattr(os, "sched_getaffinity")  # batch systems often restrict a job to some cores
    available = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    quota = cpu_quota()
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPU time in cores that the control groups of this process grant, the smallest quota; None without a limit.

    Reads version 2 (cpu.max) and version 1 (cpu.cfs_quota_us) of the kernel's control groups. ``root``: their mount
    point; ``own``: the file that names this process's groups. Inside a container the quota is at the top level.
    """
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        mounted = root if not controllers else root / "cpu" if "cpu" in controllers.split(",") else None
        if mounted is not None:
            inner = mounted / path.strip("/")
            folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    quotas = [quota for folder in folders if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _quota_in(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if not words:
        words = [_text(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:  # "max", -1 or no such file
        return None
    return int(words[0]) / int(words[1])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):  # another system, or a kernel without control groups
        return ""


_opencv = threading.Lock()
_opencv_blocks: list[int] = []  # OpenCV's thread count at the start of each active block


@contextmanager
def single_threaded_libraries() -> Iterator[None]:
    """Run each OpenCV call in one thread during the block; the setting applies to the whole process.

    Blocks in several threads may overlap: the last to end restores the setting from before the first.
    """
    import cv2

    with _opencv:
        _opencv_blocks.append(cv2.getNumThreads())
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        with _opencv:
            former = _opencv_blocks[0]
            _opencv_blocks.pop()
            if not _opencv_blocks:
                cv2.setNumThreads(former)
