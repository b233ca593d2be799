"""How many threads do what: the one place that decides it.

========================  =======================================================================================
engine, on a CPU          as many as there are in all: with a network of any size it is most of the work, and its
                          threads share the cores with the helpers' by the operating system. Where fewer than the
                          cores were asked for, a quarter is the helpers', so that the number is kept.
engine, on a GPU          one: it waits for the GPU.
helpers                   one a core, at most 16: decoding, labelling, encoding of different images. They do what
                          the engine needs first and then wait, so more of them than needed cost nothing.
OpenCV inside a helper    one: images are what is shared among threads, not the rows of one image.
tifffile, inside          one (``maxworkers=1`` where it is called), imagecodecs and Pillow use one as they are.
BLAS, OpenMP of numpy     none of the stages calls BLAS, so its threads sleep; nothing to set.
========================  =======================================================================================

One thread in all (``exclusive``): helper and engine take turns.
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
    """``engine``: CPU threads of the engine, None for its own default. ``helpers``: threads for all the rest.
    ``exclusive``: engine and helpers take turns."""

    engine: int | None
    helpers: int
    exclusive: bool = False


def plan(total: int | None = None, *, device: str = "cpu") -> ThreadPlan:
    """Threads for a run of ``total`` in all, None for all cores; ``device``: what the network runs on.

    Raises ``UsageError`` if ``total`` is below 1.
    """
    return plan_for(cores(), total, on_gpu=device != "cpu")


def plan_for(n_cores: int, total: int | None, *, on_gpu: bool) -> ThreadPlan:
    """``plan`` on a machine of ``n_cores``; see the module."""
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
    """Threads for many images with an engine that was opened with ``threads``, None for one per core: as many helpers,
    which wait for the engine most of the time. With one thread they take turns."""
    usable = min(cores() if threads is None else threads, MAX_HELPERS)
    return ThreadPlan(threads, usable, exclusive=threads == 1)


def cores() -> int:
    """Processors that this process may use: those it may run on, and no more than a container's quota pays for."""
    is_linux = hasattr(os, "sched_getaffinity")  # where a batch system often leaves a job only some
    available = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    quota = cpu_quota()
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control groups of this process grant, the least of all; None without a limit.

    Version 2 (cpu.max) and version 1 (cpu.cfs_quota_us) of the kernel's control groups. ``root``: where they are
    mounted; ``own``: the file that names this process's groups. Inside a container both stand at the top.
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
_opencv_blocks: list[int] = []  # how many threads OpenCV had when each block that lasts began


@contextmanager
def single_threaded_libraries() -> Iterator[None]:
    """Each call of OpenCV in one thread while the block lasts; a setting of the whole process.

    Blocks of several threads may overlap: the last to end restores what was before the first.
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
