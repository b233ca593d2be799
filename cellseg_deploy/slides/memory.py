"""Memory that this process may still take: of the machine, and of the control groups that a container limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def half_of_free_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Half of the bytes that are free now: on the machine, and in each control group of this process (versions 1, 2).

    ``proc``, ``cgroups``: where the kernel's file systems are mounted.
    """
    return max(1, min([_of_machine(proc), *_of_groups(proc, cgroups)]) // 2)


def _of_machine(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no Linux: half, as a guess


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Free bytes below each limit; the file cache that the kernel drops first counts as free."""
    for line in _lines(proc / "self" / "cgroup"):  # 0::/path of version 2, N:memory,...:/path of version 1
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount, names, cache = cgroups, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        # A limit of a group holds for the groups in it. In a container the path may be one of the host, which is not
        # visible: then the mount itself is the container's group.
        place = Path(path.strip().lstrip("/"))
        for group in (mount / place, *(mount / parent for parent in place.parents), mount):
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                stat = dict(line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2)
                yield max(0, limit - used + int(stat.get(cache, 0)))


def _number(path: Path) -> int | None:
    """The number in a file; None for ``max`` (no limit), or no file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
