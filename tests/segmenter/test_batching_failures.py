"""Many images through one network at once: what fails, whom it concerns, and how it ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from made_jobs import PATIENCE_SECONDS, jobs_of, network, picture, run, wait_until, within, work

from cellseg_deploy.batching import Job, Network, Outcome, Overlapped
from cellseg_deploy.errors import DataError, ModelError

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


OWN_PROCESS = "CELLSEG_TEST_IN_ITS_OWN_PROCESS"


def in_a_process_of_its_own(test: Callable[[], None]) -> Callable[[], None]:
    """A signal is the whole process's, and other tests have loaded engines with threads and handlers of their own."""

    @functools.wraps(test)
    def wrapper() -> None:
        if os.environ.get(OWN_PROCESS):
            test()
            return
        one = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{test.__name__}"]
        done = subprocess.run(
            one, env=os.environ | {OWN_PROCESS: "1"}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return wrapper


# --- failures


class Marked:
    """A network that fails for a batch with a tile of the value ``mark``."""

    def __init__(self, mark: int, error: BaseException | None) -> None:
        self.mark, self.error = mark, error

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        if (tiles == self.mark).all(axis=(1, 2, 3)).any():
            if self.error is None:
                raise DataError("network answered with NaN")  # as Backend.predict does for the whole batch
            raise self.error
        return network(tiles)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("error", [None, MemoryError("full"), ZeroDivisionError("oh")])
def test_an_error_of_one_image_is_no_other_ones(error: BaseException | None, batch: int) -> None:
    """One tile an image, so that a batch that fails is full of others: each call waits until there are so many."""
    pictures = [np.full((8, 8, 3), i + 1, np.uint8) for i in range(40)]
    calls: list[int] = []
    marked = Marked(20, error)

    def predict(tiles: np.ndarray) -> np.ndarray:
        seen.update(tiles.max(axis=(1, 2, 3)).tolist())
        wait_until(lambda: (n := outcomes._network._n_waiting) >= batch - 1 or len(seen) + n >= 40)
        calls.append(len(tiles))
        return marked(tiles)

    seen: set[int] = set()
    outcomes = Overlapped(jobs_of(pictures), predict, batch=batch, helpers=3, max_jobs=40)

    def go() -> list[Outcome[Any]]:
        with outcomes:
            return list(outcomes)

    for index, outcome in enumerate(within(go)):
        if index == 19:
            with pytest.raises(DataError if error is None else type(error)):
                outcome.get()
        else:
            assert np.array_equal(outcome.get(), network(pictures[index][None])[0, 0])
    assert sum(calls) >= 40 + (batch > 1)  # the batch that failed was run again


@pytest.mark.parametrize("where", ["first step", "last step"])
def test_an_error_in_the_work_is_that_images(where: str) -> None:
    def failing(index: int, network: Network) -> int:
        if where == "first step" and index % 3 == 1:
            raise DataError(f"no {index}")
        work(picture(index), network)
        if where == "last step" and index % 3 == 1:
            raise DataError(f"no {index}")
        return index

    for index, outcome in enumerate(run([Job(partial(failing, index)) for index in range(12)], helpers=3)):
        if index % 3 == 1:
            with pytest.raises(DataError, match=f"no {index}"):
                outcome.get()
        else:
            assert outcome.get() == index


@pytest.mark.parametrize("error", [ModelError("gone"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_of_the_engine_ends_all_that_need_it_but_not_what_is_through(error: BaseException) -> None:
    pictures = [np.full((8, 8, 3), i + 1, np.uint8) for i in range(30)]
    calls: list[int] = []
    marked = Marked(8, error)

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(int(tiles.max()))
        return marked(tiles)

    found = run(jobs_of(pictures), predict, batch=1, helpers=1, max_jobs=1)
    assert calls == list(range(1, 9))  # and never again
    for index, outcome in enumerate(found):
        if index < 7:
            assert outcome.get().shape == (8, 8)
        else:
            with pytest.raises(type(error)):
                outcome.get()


def test_an_answer_of_the_wrong_shape_stops_the_run() -> None:
    found = run(jobs_of([picture(4)] * 3), lambda tiles: network(tiles)[:, :, 1:])
    for outcome in found:
        with pytest.raises(Exception, match="do not fit"):
            outcome.get()


def test_a_fault_of_the_machinery_itself_is_raised_and_does_not_hang() -> None:
    def broken() -> int:
        raise RuntimeError("asking for the size failed")

    with pytest.raises(RuntimeError, match="asking"):
        run([Job(partial(work, picture(0))), Job(partial(work, picture(1)), broken)])


def test_an_engine_that_fails_every_time_fails_every_image() -> None:
    def predict(_: np.ndarray) -> np.ndarray:
        raise DataError("never")

    found = run(jobs_of([picture(seed) for seed in range(15)]), predict, batch=8)
    assert [type(outcome.error) for outcome in found] == [DataError] * 15


# --- ending early


def test_leaving_the_block_ends_threads_and_work() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def endless(index: int, network: Network) -> int:
        begun.append(index)
        try:
            work(picture(index), network)
            return index
        finally:
            ended.append(index)

    def predict(tiles: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return network(tiles)

    outcomes: Overlapped[int] = Overlapped([Job(partial(endless, i)) for i in range(200)], predict, batch=2)

    def go() -> None:
        with outcomes:
            for outcome in outcomes:
                if outcome.get() == 2:
                    break

    within(go)
    assert sorted(ended) == sorted(begun)
    assert 3 <= len(begun) < 50


@in_a_process_of_its_own
def test_an_interrupt_is_raised_at_once_where_the_caller_waits() -> None:
    """In the main thread, which Python hands signals to; the call of the network that is under way is waited for."""
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return network(tiles)

    def go() -> None:
        with Overlapped(jobs_of([picture(4)] * 40), predict, batch=2) as outcomes:
            for outcome in outcomes:
                outcome.get()

    with pytest.raises(KeyboardInterrupt):
        go()
    assert len(calls) <= 4  # of hundreds


def test_stop_does_not_wait() -> None:
    gate = threading.Event()
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        gate.wait(PATIENCE_SECONDS)
        return network(tiles)

    def nothing(_: Network) -> None:
        return

    def go() -> float:
        with Overlapped([Job(nothing), *jobs_of([picture(4)] * 4)], predict, batch=2) as outcomes:
            next(iter(outcomes)).get()
            wait_until(lambda: bool(calls))
            start = time.monotonic()
            outcomes.stop()
            seconds = time.monotonic() - start
            gate.set()
        return seconds

    assert within(go) < 5
    assert len(calls) == 1  # the batch that waited behind it was not run


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_threads_that_were_started_before_an_error_are_ended(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    started: list[threading.Thread] = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if len(started) == at:
            raise error
        started.append(thread)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(type(error)), Overlapped(jobs_of([picture(0)] * 5), network, batch=1) as outcomes:
        list(outcomes)
    assert len(started) == at


def test_workers_that_cannot_be_started_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with Overlapped(jobs_of([picture(0)] * 5), network, batch=4) as outcomes:
        assert [outcome.error for outcome in outcomes] == [None] * 5
    assert len(started) == 3


@in_a_process_of_its_own
def test_a_signal_while_threads_start_ends_them() -> None:
    """It waits until they are all there, and is raised within the block."""

    def first(network: Network) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        work(picture(0), network)

    jobs = [Job(first), *jobs_of([picture(0)] * 9)]
    with pytest.raises(KeyboardInterrupt), Overlapped(jobs, network, batch=1) as outcomes:
        list(outcomes)


def test_memory_of_an_image_that_had_too_little_is_free_before_its_turn_comes() -> None:
    """The first image waits for the second's array to be gone; a traceback would keep it."""
    gone = threading.Event()

    def first(_: Network) -> None:
        assert gone.wait(PATIENCE_SECONDS)

    def second(_: Network) -> None:
        large = np.zeros(10)
        weakref.finalize(large, gone.set)
        raise MemoryError("no")

    done = run([Job(first), Job(second)])
    assert done[0].error is None
    assert isinstance(done[1].error, MemoryError)


def test_an_interrupted_retry_does_not_run_on() -> None:
    """A batch of many images fails for one; while they are run again one by one, the run is stopped."""
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        if len(calls) == 1:
            wait_until(lambda: outcomes._network._n_waiting >= 8)
        elif len(tiles) > 1:
            raise DataError("one of them")
        elif len(calls) > 2:
            outcomes._network.end(ModelError("gone"))
        return network(tiles)

    outcomes = Overlapped(jobs_of([picture(2)] * 30), predict, batch=8)

    def go() -> list[Outcome[Any]]:
        with outcomes:
            return list(outcomes)

    within(go)
    assert len(calls) == 3
