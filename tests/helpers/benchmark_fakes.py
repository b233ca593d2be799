"""Workers that only say how long things took, and a machine to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from cellseg_benchmarks.harness.machine import Conditions, Load, Machine
from cellseg_benchmarks.harness.timer import Turn
from cellseg_benchmarks.harness.worker import Peak, WorkerError


def make_machine(**changes: Any) -> Machine:
    """A machine without a GPU."""
    values: dict[str, Any] = {
        "system": "Linux 6",
        "processor": "Xeon Q",
        "device_class": "cpu-x86_64-avx512_bf16",
        "instructions": ("avx2", "amx_bf16"),
        "logical_cores": 8,
        "physical_cores": 4,
        "cores": 2,
        "cpu_quota": None,
        "last_level_cache_bytes": 2**25,
        "memory_bytes": 24 * 2**30,
        "gpu": None,
        "no_gpu": "no NVIDIA GPU can be used here",
        "threads": {},
        "python": "3.12.0",
        "versions": {"numpy": "2.4"},
    }
    return Machine(**(values | changes))


def make_conditions(busy: float = 0.0) -> Conditions:
    """That machine, as busy with other work as ``busy``."""
    return Conditions(make_machine(), Load(busy_share=busy), Load(busy_share=busy))


class FakeWorker:
    """Stands in for ``worker.Worker``. ``seconds``: of one call, by its name. ``answer``: to every question."""

    def __init__(
        self,
        seconds: Mapping[str, float],
        facts: Mapping[str, Any] | None = None,
        answer: Callable[..., Any] | None = None,
        peak: int = 100_000_000,
    ) -> None:
        self.names = list(seconds)
        self.facts = dict(facts or {})
        self.closed = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._seconds, self._answer, self._peak = seconds, answer, peak

    def turn(self, name: str) -> Turn:
        return lambda calls: calls * self._seconds[name]

    def ask(self, question: str, **arguments: Any) -> Any:
        self.asked.append((question, arguments))
        return None if self._answer is None else self._answer(**arguments)

    def peak(self) -> Peak:
        return Peak(self._peak, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def refusing(reason: str) -> Callable[..., FakeWorker]:
    """A start that never succeeds."""

    def start(*_: Any, **__: Any) -> FakeWorker:
        raise WorkerError(reason)

    return start
