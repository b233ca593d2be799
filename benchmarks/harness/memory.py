"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from cellseg_deploy.errors import BackendUnavailableError

_STATUS = Path("/proc/self/status")
_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Peak memory of this process, in bytes of resident pages; shared libraries count.

    On Linux ``VmHWM``, not ``ru_maxrss``: the latter survives ``exec``, so that a small process started by a large one
    would report the large one's peak.
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
    """Make the allocator return its reserve, so that ``rss_bytes`` reports the memory in use (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def rss_bytes() -> int | None:
    """Current memory of this process; None if the system does not report it."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Restart ``peak_rss_bytes`` from the current memory; return whether that was possible (Linux only)."""
    try:
        _REFS.write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """Memory available without swapping; None if the system does not report it."""
    return meminfo().get("MemAvailable")


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty if it does not exist."""
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
    """``Name:   123 kB`` lines as bytes; other lines are skipped."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
