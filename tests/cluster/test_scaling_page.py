"""docs/scaling.md: its SLURM example makes the job script that it should."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT


@pytest.fixture
def dask_jobqueue() -> Iterator[Any]:
    """The package; importing it replaces the handler of SIGINT (0.9), which other tests rely on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield pytest.importorskip("dask_jobqueue")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_slurm_example_submits_one_encrypted_worker_per_gpu(
    dask_jobqueue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed.security import Security

    made: dict[str, Any] = {}

    class Recorded:
        scheduler_address = "tls://node1:8786"

        def __init__(self, **settings: Any) -> None:
            made.update(settings)

        def scale(self, jobs: int) -> None:
            made["jobs"] = jobs

    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/scaling.md").read_text(), re.MULTILINE | re.DOTALL)
    with monkeypatch.context() as patch:
        patch.setattr(dask_jobqueue, "SLURMCluster", Recorded)
        exec(example, {})
    assert made.pop("jobs") == 16
    security = made["security"]
    assert isinstance(security, Security)
    assert security.require_encryption
    script = dask_jobqueue.slurm.SLURMJob("tls://node1:8786", name="worker", **made).job_script()
    for directive in ("-p gpu", "--cpus-per-task=8", "--mem=30G", "-t 04:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {directive}\n" in script, script
    assert "distributed.cli.dask_worker tls://node1:8786" in script
    for option in ("--nthreads 8", "--tls-ca-file /home/me/tls/ca.pem", "--tls-cert /home/me/tls/me.pem"):
        assert option in script, script
