"""Half of the memory that is free: of the machine, or of the container that limits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_deploy.slides.memory import half_of_free_memory

GB = 1_000_000_000


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """16 GB free, no control group."""
    write(tmp_path / "proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable: 15625000 kB\n")
    return tmp_path


def half(machine: Path) -> int:
    return half_of_free_memory(machine / "proc", machine / "cgroup")


def test_of_a_machine_without_limits(machine: Path) -> None:
    assert half(machine) == 8 * GB
    write(machine / "proc/self/cgroup", "0::/user.slice\n")
    write(machine / "cgroup/user.slice/memory.max", "max\n")
    write(machine / "cgroup/user.slice/memory.current", "1000\n")
    assert half(machine) == 8 * GB


@pytest.mark.parametrize("path", ["/", "/a/b", "/not/visible/here"])
def test_of_a_container_version_2(machine: Path, path: str) -> None:
    write(machine / "proc/self/cgroup", f"0::{path}\n")
    write(machine / "cgroup/a/b/memory.max", "max\n")
    group = machine / "cgroup" / ("a" if path == "/a/b" else "")  # the limit of a group above holds too
    write(group / "memory.max", f"{4 * GB}\n")
    write(group / "memory.current", f"{3 * GB}\n")
    write(group / "memory.stat", f"anon {2 * GB}\ninactive_file {GB}\n")
    assert half(machine) == GB


def test_of_a_container_version_1(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "11:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    group = machine / "cgroup/memory"
    write(group / "memory.limit_in_bytes", f"{2 * GB}\n")
    write(group / "memory.usage_in_bytes", f"{GB}\n")
    assert half(machine) == GB // 2
    write(group / "memory.limit_in_bytes", "9223372036854771712\n")  # no limit
    assert half(machine) == 8 * GB


def test_a_group_above_its_limit_leaves_something(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/\n")
    write(machine / "cgroup/memory.max", "1000\n")
    write(machine / "cgroup/memory.current", "2000\n")
    assert half(machine) == 1


def test_here(tmp_path: Path) -> None:
    assert half_of_free_memory() > 0
    assert half_of_free_memory(tmp_path, tmp_path) > 0
