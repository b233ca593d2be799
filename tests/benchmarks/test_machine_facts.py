"""What a report says of the machine: parsed from what systems really say, and nothing that names a user or a place."""

from __future__ import annotations

import getpass
import json
import platform

import msgspec
import pytest
from benchmark_fakes import make_machine

from cellseg_benchmarks.harness import machine
from cellseg_benchmarks.harness.machine import Conditions, Load
from cellseg_deploy.errors import BackendUnavailableError

TWO_SOCKETS = "".join(
    f"processor\t: {p}\nphysical id\t: {p // 4}\ncore id\t\t: {p % 4 // 2}\nflags\t\t: fpu avx2\n\n" for p in range(8)
)


def test_cores() -> None:
    assert machine.physical_cores(TWO_SOCKETS) == 4
    assert machine.physical_cores("processor: 0\n") is None


def test_cache() -> None:
    assert machine.cache_bytes("266240K\n") == 266240 * 1024
    assert machine.cache_bytes("32M") == 2**25
    assert machine.cache_bytes("") is None


def test_busy() -> None:
    # user nice system idle iowait irq softirq steal guest: guest is part of user already
    before = machine.cpu_ticks("cpu  100 0 50 800 50 0 0 0 30 0\ncpu0 1 2 3 4\n")
    after = machine.cpu_ticks("cpu  160 0 60 820 60 0 0 0 90 0\n")
    assert before == (850, 1000)
    assert machine.busy_share(before, after) == 0.7  # 70 of 100 ticks
    assert machine.cpu_ticks("") is None
    assert machine.busy_share(None, after) is None
    assert machine.busy_share(after, after) is None


def test_this_machine_without_names_and_paths() -> None:
    found = machine.look()
    text = json.dumps(msgspec.to_builtins(found))
    assert found.cores is None or found.cores >= 1
    assert found.versions["numpy"]
    assert (found.gpu is None) == bool(found.no_gpu)
    assert platform.node() not in text or len(platform.node()) < 3
    assert "/home" not in text
    assert getpass.getuser() not in text.lower().split()
    assert machine.usable_cores() == found.cores


def test_load_is_looked_at_while_nothing_runs() -> None:
    naps: list[float] = []
    found = machine.load(sleep=naps.append)
    assert naps == [0.5]
    assert found.busy_share is None or 0 <= found.busy_share <= 1


def test_other_work_is_told() -> None:
    assert Conditions(make_machine(), Load(busy_share=0.02), Load()).remarks() == []
    remarks = Conditions(make_machine(), Load(busy_share=0.5), Load(busy_share=0.01)).remarks()
    assert remarks == ["other work kept 50% of the cores busy before the measurement"]


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellseg_deploy.backends import cuda_runtime

    def none(index: int) -> None:
        raise BackendUnavailableError("no NVIDIA GPU can be used here (why); what to do about it")

    monkeypatch.setattr(cuda_runtime, "Cuda", none)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine.look_for_gpu() == (None, "no NVIDIA GPU can be used here (why)")
