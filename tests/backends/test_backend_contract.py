"""What every inference engine keeps to: answers of its own for each thread, an end, and no life in a fork."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import DarknessBackend

from cellseg_deploy.backends import EngineOptions, open_backend
from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import CellsegError, UsageError
from cellseg_deploy.models import default_model_path

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
THREADS = 8


def onnxruntime() -> Backend:
    pytest.importorskip("onnxruntime")
    return open_backend(default_model_path(), EngineOptions(backend="onnxruntime", threads=1))


def openvino() -> Backend:
    pytest.importorskip("openvino")
    return open_backend(default_model_path(), EngineOptions(backend="openvino", threads=1))


def fake_tensorrt() -> Backend:
    """One set of buffers, as an engine on a GPU has: two calls at a time would mix their answers."""

    class OneBuffer(DarknessBackend):
        def __init__(self) -> None:
            super().__init__()
            self._tiles = np.zeros((0,), np.uint8)

        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            self._tiles = tiles_nhwc
            threading.Event().wait(0.002)
            return super()._predict(self._tiles)

    return OneBuffer()


ENGINES = [onnxruntime, openvino, fake_tensorrt]


@pytest.fixture(params=ENGINES, ids=lambda opens: opens.__name__)
def opens(request: pytest.FixtureRequest) -> Callable[[], Backend]:
    return request.param


def tiles_of(backend: Backend, seed: int) -> np.ndarray:
    size = backend.spec.tile_size
    return np.random.default_rng(seed).integers(0, 256, (1 + seed % 2, size, size, 3), np.uint8)


def test_each_of_many_threads_gets_its_own_answers(opens: Callable[[], Backend]) -> None:
    with opens() as backend:
        alone = [backend.predict(tiles_of(backend, seed)) for seed in range(THREADS)]
        together = threading.Barrier(THREADS)

        def answers(seed: int) -> list[np.ndarray]:
            together.wait()
            return [backend.predict(tiles_of(backend, seed)) for _ in range(2)]

        with ThreadPoolExecutor(THREADS) as pool:
            for seed, found in enumerate(pool.map(answers, range(THREADS))):
                for answer in found:
                    assert np.array_equal(answer, alone[seed])


def test_a_closed_engine_says_so(opens: Callable[[], Backend]) -> None:
    backend = opens()
    tiles = tiles_of(backend, 0)
    backend.close()
    backend.close()
    with pytest.raises(UsageError, match="was closed; open the model again"):
        backend.predict(tiles)


def test_an_engine_is_not_closed_under_a_call(opens: Callable[[], Backend]) -> None:
    backend = opens()
    expected = backend.predict(tiles_of(backend, 1))
    found: list[np.ndarray | CellsegError] = []

    def call() -> None:
        try:
            found.append(backend.predict(tiles_of(backend, 1)))
        except CellsegError as error:
            found.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    backend.close()
    for thread in threads:
        thread.join()
    for answer in found:
        assert isinstance(answer, UsageError) or np.array_equal(answer, expected)
    assert len(found) == 4


class Watched:
    """A lock that tells by ``event`` that somebody waits for it."""

    def __init__(self, event: threading.Event) -> None:
        self._lock, self._event = threading.Lock(), event

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._event.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_close_waits_for_the_call_that_runs() -> None:
    running, closing, may_end = (threading.Event() for _ in range(3))
    order: list[str] = []

    class Slow(DarknessBackend):
        def _predict(self, tiles_nhwc: np.ndarray) -> np.ndarray:
            running.set()
            assert may_end.wait(60)
            order.append("answered")
            return super()._predict(tiles_nhwc)

        def _close(self) -> None:
            order.append("closed")
            closing.set()

    backend = Slow()
    backend._one_call = Watched(closing)  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(backend.predict, tiles_of(backend, 1))
        assert running.wait(60)
        end = pool.submit(backend.close)
        assert closing.wait(60)
        may_end.set()
        end.result()
        call.result()
    assert order == ["answered", "closed"]


def in_child(backend: Backend, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        backend.predict(tiles_of(backend, 0))
        answers.put("an answer")
    except CellsegError as error:
        answers.put(str(error))
    backend.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_is_refused_and_does_not_hang(opens: Callable[[], Backend]) -> None:
    with opens() as backend:
        before = backend.predict(tiles_of(backend, 0))
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=in_child, args=(backend, answers))
        child.start()
        child.join(60)
        if child.is_alive():
            child.kill()
            pytest.fail("the forked process hangs")
        assert "used in its fork" in answers.get()
        assert np.array_equal(backend.predict(tiles_of(backend, 0)), before)
