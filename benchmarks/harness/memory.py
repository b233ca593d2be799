"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from cellseg_deploy.errors import BackendUnavailableError

_STATUS = Path("/proc/self/status")
_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Most memory that this process held at a time, in bytes of resident pages; shared libraries count.

    On Linux ``VmHWM``, not ``ru_maxrss``: the latter survives ``exec``, so that a small process that a large one
    started would report the large one's peak.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    if sys.platform == "win32":
        raise BackendUnavailableError("peak memory is not known on Windows; measure on Linux or macOS")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_free_memory() -> None:
    """Have the allocator return what it holds in reserve, so that ``rss_bytes`` tells what is in use (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def rss_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not tell."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Let ``peak_rss_bytes`` start again from what is held now; whether that could be done (Linux only)."""
    try:
        _REFS.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory that could be had without swapping; None where the system does not tell."""
    return meminfo().get("MemAvailable")


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        return _kilobytes(Path("/proc/meminfo").read_text())
    except OSError:
        return {}


def _status(name: str) -> int | None:
    try:
        return _kilobytes(_STATUS.read_text()).get(name)
    except OSError:
        return None


def _kilobytes(text: str) -> dict[str, int]:
    """``Name:   123 kB`` lines as bytes; others are left out."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
