"""Many images through one network at once: order, batches and bounds, with networks that are slow or block."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from made_streams import PATIENCE_SECONDS, TILE, jobs_of, network, picture, run, steps, wait_until, within

from cellseg_deploy.passes import StageClock, Steps, TiledPass, run_alone
from cellseg_deploy.schedule import Job
from cellseg_deploy.stream import Outcome, Stream

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# --- results


@pytest.mark.parametrize("helpers", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_results_come_in_order_and_are_those_of_one_image_alone(batch: int, helpers: int) -> None:
    pictures = [picture(seed) for seed in range(30)]
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        return network(tiles)

    found = run(jobs_of(pictures, passes=2), predict, batch=batch, helpers=helpers)
    for image, outcome in zip(pictures, found, strict=True):
        assert np.array_equal(outcome.get(), 2 * (image[..., 0].astype(np.float32) / 255))
        assert np.array_equal(outcome.get(), run_alone(steps(image, 2), network, 3))
    assert max(calls) <= batch


def test_no_job_at_all() -> None:
    assert run([]) == []


def test_a_job_may_need_no_network() -> None:
    def nothing(value: int) -> Steps[int]:
        return value
        yield

    assert [outcome.get() for outcome in run([Job(partial(nothing, i)) for i in range(9)])] == list(range(9))


def test_small_images_share_batches() -> None:
    """Sixty images of one tile: nearly as few calls as for one image of sixty tiles."""
    calls: list[int] = []
    jobs = jobs_of([np.full((8, 8, 3), i + 1, np.uint8) for i in range(60)])

    def predict(tiles: np.ndarray) -> np.ndarray:
        if not calls:  # the engine is slow to start, so that helpers get ahead of it
            wait_until(lambda: stream.peak.tiles >= 8)
        calls.append(len(tiles))
        time.sleep(0.01)
        return network(tiles)

    stream = Stream(jobs, predict, batch=8)

    def go() -> list[Outcome[Any]]:
        with stream:
            return list(stream)

    assert [round(float(outcome.get()[0, 0]) * 255) for outcome in within(go)] == list(range(1, 61))
    assert sum(calls) == 60
    assert len(calls) <= 14, calls


def test_the_network_is_called_by_one_thread_at_a_time_and_its_time_is_kept() -> None:
    inside = threading.Semaphore(1)
    clock = StageClock()

    def predict(tiles: np.ndarray) -> np.ndarray:
        assert inside.acquire(blocking=False), "two calls at a time"
        time.sleep(0.005)
        inside.release()
        return network(tiles)

    def timed(image: np.ndarray) -> Steps[None]:
        yield TiledPass(image, tile_size=TILE, halo=2, n_channels=1, clock=clock)

    stream = Stream([Job(partial(timed, picture(seed))) for seed in range(20)], predict, batch=4, helpers=3)

    def go() -> None:
        with stream:
            for outcome in stream:
                outcome.get()

    within(go)
    assert clock.seconds["network"] == pytest.approx(stream.engine_seconds)
    assert stream.engine_seconds >= 0.005


def test_batches_run_in_the_order_in_which_they_were_filled() -> None:
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(int(tiles.max()))
        time.sleep(0.001)
        return network(tiles)

    run(jobs_of([np.full((8, 8, 3), i + 1, np.uint8) for i in range(150)]), predict, batch=1, helpers=1)
    assert calls == list(range(1, 151))


def test_exclusive_means_that_helpers_and_network_take_turns() -> None:
    inside = threading.Semaphore(1)

    def alone() -> None:
        assert inside.acquire(blocking=False), "two at a time"
        time.sleep(0.002)
        inside.release()

    def predict(tiles: np.ndarray) -> np.ndarray:
        alone()
        return network(tiles)

    def careful(image: np.ndarray) -> Steps[np.ndarray]:
        alone()
        result = yield from steps(image)
        alone()
        return result

    jobs = [Job(partial(careful, picture(seed))) for seed in range(12)]
    for outcome in run(jobs, predict, helpers=1, exclusive=True):
        outcome.get()


def test_tiles_are_not_put_off_for_long_while_another_image_is_decoded() -> None:
    """With a fixed batch of four: the single tile of the first image is run before the second has been read."""
    through = threading.Event()

    def first() -> Steps[int]:
        yield from steps(picture(2), passes=3)
        through.set()
        return 1

    def second() -> Steps[int]:
        assert through.wait(PATIENCE_SECONDS)
        yield from steps(picture(2))
        return 2

    assert [outcome.get() for outcome in run([Job(first), Job(second)], step=4)] == [1, 2]


# --- bounds


@pytest.mark.parametrize("slow", ["network", "caller", "first image"])
def test_what_is_on_its_way_is_bounded(slow: str) -> None:
    lock, held, most = threading.Lock(), [0, 0], [0, 0]
    sizes = [random.Random(5).choice([10, 30, 90]) for _ in range(40)]
    sizes[7] = 1000

    def count(jobs: int, nbytes: int) -> None:
        with lock:
            held[0], held[1] = held[0] + jobs, held[1] + nbytes
            most[0] = max(most[0], held[0])
            most[1] = max(most[1], held[1]) if held[0] > 1 else most[1]

    def heavy(index: int) -> Steps[int]:
        count(1, sizes[index])
        yield from steps(picture(index))
        if slow == "first image" and index == 0:
            time.sleep(0.2)
        return index

    def predict(tiles: np.ndarray) -> np.ndarray:
        time.sleep(0.004 if slow == "network" else 0)
        return network(tiles)

    jobs = [Job(partial(heavy, index), partial(int, size)) for index, size in enumerate(sizes)]
    stream: Stream[int] = Stream(jobs, predict, batch=4, helpers=4, max_jobs=5, max_bytes=200)

    def go() -> list[int]:
        found = []
        with stream:
            for outcome in stream:
                found.append(outcome.get())
                time.sleep(0.005 if slow == "caller" else 0)
                count(-1, -sizes[found[-1]])
        return found

    assert within(go) == list(range(40))
    assert 2 <= most[0] <= 5
    assert most[1] <= 200
    assert (stream.peak.jobs, stream.peak.nbytes) == (pytest.approx(most[0], abs=1), 1000)


def test_a_network_that_blocks_holds_up_a_bounded_number_and_then_goes_on() -> None:
    gate, started = threading.Event(), []

    def predict(tiles: np.ndarray) -> np.ndarray:
        gate.wait()
        return network(tiles)

    def noted(index: int) -> Steps[int]:
        started.append(index)
        yield from steps(picture(2))
        return index

    stream: Stream[int] = Stream(
        [Job(partial(noted, index)) for index in range(50)], predict, batch=2, helpers=2, max_jobs=7
    )

    def go() -> list[int]:
        with stream:
            return [outcome.get() for outcome in stream]

    timer = threading.Timer(0.3, gate.set)
    timer.start()
    try:
        assert within(go) == list(range(50))
    finally:
        timer.join()
    assert stream.peak.jobs <= 7
    assert sorted(started[:7]) == list(range(7))
