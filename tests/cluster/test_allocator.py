"""Memory of workers that Dask starts: freed arrays are kept for the next image."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")

_FAULTS = """
import resource
import numpy as np
from cellseg_deploy.cluster.allocator import keep_freed_memory

if {keep}:
    keep_freed_memory()
def work():
    np.ones(1 << 20, np.uint8)  # less than a huge page of 2 MiB, whose faults are few
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(80):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*, keep: bool, threshold: str) -> int:
    """Page faults of 80 arrays of 1 MiB, one after the other, in a process that was started as Dask does."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": threshold}
    command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_a_worker_keeps_the_memory_of_the_last_image() -> None:
    without = _faults(keep=False, threshold="65536")
    assert without > 5_000, "Dask's setting no longer costs anything: cluster.allocator can go"
    assert _faults(keep=True, threshold="65536") < without / 10


def test_a_setting_of_the_user_stays() -> None:
    assert _faults(keep=True, threshold="65537") == pytest.approx(_faults(keep=False, threshold="65537"), rel=0.1)
