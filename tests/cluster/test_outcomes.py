"""What is in flight when, with a client that does nothing but record: no cluster runs here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("distributed")

from distributed import KilledWorker

from cellseg_deploy.cluster import outcomes
from cellseg_deploy.cluster.outcomes import ClusterOutcomes, Workers
from cellseg_deploy.errors import BackendUnavailableError


class FakeFuture:
    """Ends when it is told so."""

    status = "finished"

    def __init__(self, key: str) -> None:
        self.key, self.error = key, False
        self._callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def end(self, *, killed: bool = False) -> None:
        self.error = killed
        for callback in self._callbacks:
            callback(self)

    def result(self, timeout: float) -> dict[str, Any]:
        if self.error:
            raise KilledWorker(self.key, "worker", 2)
        return {}


class FakeClient:
    """Calls ``on_submit`` with each future, and notes who is in flight then."""

    status = "running"

    def __init__(self, on_submit: Callable[[FakeFuture], None]) -> None:
        self.on_submit, self.keys, self.n_workers = on_submit, list[str](), 1

    def submit(self, *_: Any, key: str, pure: bool) -> FakeFuture:
        self.keys.append(key)
        future = FakeFuture(key)
        self.on_submit(future)
        return future

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(map(str, range(self.n_workers)), 2)

    def cancel(self, *_: Any, force: bool) -> None:
        pass


class Plain(ClusterOutcomes[str]):
    def _work(self, index: int) -> Any:
        return None, (index,)

    def _finished(self, answer: dict[str, Any]) -> str:
        return "done"


def made(workers: Workers, out: Path, name: str, beside: Any = None) -> Plain:
    found = Plain(workers, out, {}, [SimpleNamespace(nbytes=lambda: 0)], beside=beside)  # type: ignore[arg-type]
    found._prefix = name
    return found


def test_a_task_is_alone_only_when_those_beside_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph that is in flight may be what ends the workers of a band."""
    monkeypatch.setattr(outcomes, "_POLL_SECONDS", 0.001)
    photographs = dict[str, FakeFuture]()
    events = list[str]()

    def on_submit(future: FakeFuture) -> None:
        events.append(future.key)
        if future.key.startswith("photograph"):
            photographs[future.key] = future
        else:
            later.append(future)

    later = list[FakeFuture]()
    workers = Workers(FakeClient(on_submit), "x")
    polls = list[int]()
    look = workers.look

    def looking() -> None:
        polls.append(0)
        while later:
            future = later.pop()
            future.end(killed=not future.key.endswith("alone"))
        if len(polls) > 20 and photographs:
            events.append("photograph ends")
            photographs.popitem()[1].end()
        look()

    workers.look = looking  # type: ignore[method-assign]
    with made(workers, tmp_path, "photograph") as run:
        run.workers.look()
        run._begin_more()
        with made(workers, tmp_path, "band", beside=run) as bands:
            (outcome,) = bands
        assert outcome.value == "done"
    assert events == ["photograph-0", "band-0", "photograph ends", "band-0-alone"]


def test_time_in_which_nobody_looked_is_not_waiting_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(outcomes.time, "monotonic", lambda: now[0])
    client = FakeClient(lambda _: None)
    workers = Workers(client, "x")
    workers.look()
    client.n_workers = 0
    now[0] = 10_000.0  # labels of a large image
    workers.wait_from_now()
    workers.look()
    now[0] += outcomes.WAIT_SECONDS + 1
    with pytest.raises(BackendUnavailableError, match="no worker for 600 s"):
        workers.look()


def test_time_before_the_first_task_is_not_waiting_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the bands of a slide, this process reads the whole file."""
    now = [0.0]
    monkeypatch.setattr(outcomes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outcomes, "_POLL_SECONDS", 0.001)
    ended = list[FakeFuture]()
    client = FakeClient(ended.append)
    client.n_workers = 0
    workers = Workers(client, "x")
    look = workers.look

    def looking() -> None:
        look()
        client.n_workers = 1  # comes after the first look
        while ended:
            ended.pop().end()

    workers.look = looking  # type: ignore[method-assign]
    now[0] = outcomes.WAIT_SECONDS + 1
    with made(workers, tmp_path, "band") as bands:
        assert [outcome.value for outcome in bands] == ["done"]
