"""Many images through one network at once: order, batches and bounds, with networks that are slow or block."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from made_jobs import PATIENCE_SECONDS, TILE, jobs_of, network, picture, run, wait_until, within, work

from cellseg_deploy.batching import BatchedNetwork, Job, Network, Outcome, Overlapped, alone
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock
from cellseg_deploy.errors import UsageError

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
        assert np.array_equal(outcome.get(), work(image, alone(network, 3), passes=2))
    assert max(calls) <= batch


def test_one_after_the_other_gives_the_same() -> None:
    pictures = [picture(seed) for seed in range(12)]
    side_by_side, in_turn = (run(jobs_of(pictures), exclusive=exclusive) for exclusive in (False, True))
    for one, other in zip(side_by_side, in_turn, strict=True):
        assert np.array_equal(one.get(), other.get())


def test_no_job_at_all() -> None:
    assert run([]) == []


def test_a_job_may_need_no_network() -> None:
    def nothing(value: int, _: Network) -> int:
        return value

    assert [outcome.get() for outcome in run([Job(partial(nothing, i)) for i in range(9)])] == list(range(9))


def test_small_images_share_batches() -> None:
    """Sixty images of one tile: nearly as few calls as for one image of sixty tiles."""
    calls: list[int] = []
    jobs = jobs_of([np.full((8, 8, 3), i + 1, np.uint8) for i in range(60)])

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        wait_until(lambda: (n := outcomes._network._n_waiting) >= 8 or sum(calls) + n == 60)  # workers get ahead
        return network(tiles)

    outcomes = Overlapped(jobs, predict, batch=8, max_jobs=60)

    def go() -> list[Outcome[Any]]:
        with outcomes:
            return list(outcomes)

    assert [round(float(outcome.get()[0, 0]) * 255) for outcome in within(go)] == list(range(1, 61))
    assert sum(calls) == 60
    assert len(calls) <= 10, calls


def test_an_image_that_is_spread_over_two_batches_is_put_together() -> None:
    pictures = [picture(1) + np.uint8(i) for i in range(3)]
    each = len(ImageTiles(pictures[0], tile_size=TILE, halo=2, n_channels=1, clock=StageClock()))
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        return network(tiles)

    shared = BatchedNetwork(predict, batch=each + 2)
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda i=i, image=image: found.update({i: work(image, shared)}))
        for i, image in enumerate(pictures)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: shared._n_waiting == 3 * each)
    engine = threading.Thread(target=shared.serve)
    engine.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    shared.end(RuntimeError("done"))
    engine.join(PATIENCE_SECONDS)
    assert calls == [each + 2, each + 2, each - 4]
    for i, image in enumerate(pictures):
        assert np.array_equal(found[i], image[..., 0].astype(np.float32) / 255)


def test_the_network_is_called_by_one_thread_at_a_time_and_its_time_is_kept() -> None:
    inside = threading.Semaphore(1)
    clock = StageClock()

    def predict(tiles: np.ndarray) -> np.ndarray:
        assert inside.acquire(blocking=False), "two calls at a time"
        time.sleep(0.005)
        inside.release()
        return network(tiles)

    def timed(image: np.ndarray, network: Network) -> None:
        network(ImageTiles(image, tile_size=TILE, halo=2, n_channels=1, clock=clock))

    outcomes = Overlapped([Job(partial(timed, picture(seed))) for seed in range(20)], predict, batch=4, helpers=3)

    def go() -> None:
        with outcomes:
            for outcome in outcomes:
                outcome.get()

    within(go)
    assert clock.seconds["network"] == pytest.approx(outcomes.engine_seconds)
    assert outcomes.engine_seconds >= 0.005


def test_tiles_run_in_the_order_in_which_they_came() -> None:
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(int(tiles.max()))
        time.sleep(0.001)
        return network(tiles)

    pictures = [np.full((8, 8, 3), i + 1, np.uint8) for i in range(100)]
    run(jobs_of(pictures), predict, batch=1, helpers=1, max_jobs=1)
    assert calls == list(range(1, 101))


@pytest.mark.parametrize("helpers", [1, 2])
def test_only_so_many_jobs_compute_at_a_time(helpers: int) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def computing() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.002)
        with lock:
            now[0] -= 1

    def careful(image: np.ndarray, network: Network) -> np.ndarray:
        computing()
        result = work(image, network)
        computing()
        return result

    for outcome in run([Job(partial(careful, picture(seed))) for seed in range(12)], helpers=helpers):
        outcome.get()
    assert most[0] <= helpers


def test_exclusive_means_one_thread() -> None:
    threads: set[int] = set()

    def noted(image: np.ndarray, network: Network) -> np.ndarray:
        threads.add(threading.get_ident())
        return work(image, network)

    def predict(tiles: np.ndarray) -> np.ndarray:
        threads.add(threading.get_ident())
        return network(tiles)

    jobs = [Job(partial(noted, picture(seed))) for seed in range(12)]
    with Overlapped(jobs, predict, batch=4, exclusive=True) as outcomes:
        for outcome in outcomes:
            outcome.get()
    assert threads == {threading.get_ident()}
    assert outcomes.engine_seconds > 0


def test_tiles_do_not_wait_long_for_those_of_another_image() -> None:
    """With a fixed batch of four: the single tile of the first image is run before the second has been read."""
    through = threading.Event()

    def first(network: Network) -> int:
        work(picture(2), network, passes=3)
        through.set()
        return 1

    def second(network: Network) -> int:
        assert through.wait(PATIENCE_SECONDS)
        work(picture(2), network)
        return 2

    assert [outcome.get() for outcome in run([Job(first), Job(second)], step=4)] == [1, 2]


def test_fewer_tiles_than_a_step_wait_for_others_as_long_as_a_step_takes() -> None:
    """One tile of each image, in a network that computes four at a time: the second image's tile comes along."""
    calls: list[int] = []

    def predict(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        time.sleep(0.2 if len(calls) == 1 else 0)
        return network(tiles)

    first = threading.Event()

    def late(network: Network) -> None:
        first.wait(PATIENCE_SECONDS)
        time.sleep(0.02)
        work(picture(2), network)

    def early(network: Network) -> None:
        work(picture(2), network)  # teaches how long a step takes
        first.set()
        work(picture(2), network)

    for outcome in run([Job(early), Job(late)], predict, step=4):
        outcome.get()
    assert calls == [1, 2]


# --- bounds


@pytest.mark.parametrize("slow", ["network", "caller", "first image"])
def test_what_is_in_flight_is_bounded(slow: str) -> None:
    lock, held, most = threading.Lock(), [0, 0], [0, 0]
    sizes = [random.Random(5).choice([10, 30, 90]) for _ in range(40)]
    sizes[7] = 1000

    def count(jobs: int, nbytes: int) -> None:
        with lock:
            held[0], held[1] = held[0] + jobs, held[1] + nbytes
            most[0] = max(most[0], held[0])
            most[1] = max(most[1], held[1]) if held[0] > 1 else most[1]

    def heavy(index: int, network: Network) -> int:
        count(1, sizes[index])
        work(picture(index), network)
        if slow == "first image" and index == 0:
            time.sleep(0.2)
        return index

    def predict(tiles: np.ndarray) -> np.ndarray:
        time.sleep(0.004 if slow == "network" else 0)
        return network(tiles)

    jobs = [Job(partial(heavy, index), partial(int, size)) for index, size in enumerate(sizes)]
    outcomes: Overlapped[int] = Overlapped(jobs, predict, batch=4, helpers=4, max_jobs=5, max_bytes=200)

    def go() -> list[int]:
        found = []
        with outcomes:
            for outcome in outcomes:
                found.append(outcome.get())
                time.sleep(0.005 if slow == "caller" else 0)
                count(-1, -sizes[found[-1]])
        return found

    assert within(go) == list(range(40))
    assert 2 <= most[0] <= 5
    assert most[1] <= 200


def test_no_image_is_begun_while_more_than_two_batches_wait() -> None:
    gate, started = threading.Event(), []

    def predict(tiles: np.ndarray) -> np.ndarray:
        gate.wait()
        return network(tiles)

    def noted(index: int, network: Network) -> int:
        started.append(index)
        work(picture(2), network)  # of one tile
        return index

    outcomes: Overlapped[int] = Overlapped(
        [Job(partial(noted, index)) for index in range(50)], predict, batch=2, helpers=2, max_jobs=50
    )

    def go() -> list[int]:
        with outcomes:
            return [outcome.get() for outcome in outcomes]

    timer = threading.Timer(0.3, lambda: (most.append(len(started)), gate.set()))
    most: list[int] = []
    timer.start()
    try:
        assert within(go) == list(range(50))
    finally:
        timer.join()
    # One batch that runs, five tiles that wait, and those that were begun at the same time.
    assert most[0] <= 2 + 5 + 2
    assert max(started[: most[0]]) < most[0] + 2  # in order, but for workers that wait side by side


@pytest.mark.parametrize("setting", ["batch", "step", "helpers", "max_jobs", "max_bytes"])
def test_settings_below_one_are_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting} must be at least 1, got 0"):
        Overlapped([], network, **{"batch": 4, setting: 0})


# --- the engine's thread alone


@pytest.mark.parametrize(("batch", "step", "expected"), [(4, 1, 4), (4, 3, 6), (1, 4, 4), (8, 4, 8)])
def test_a_batch_is_whole_steps(batch: int, step: int, expected: int) -> None:
    assert BatchedNetwork(network, batch=batch, step=step).batch == expected


def test_any_number_of_threads_get_their_own_answers() -> None:
    shared = BatchedNetwork(network, batch=5)
    engine = threading.Thread(target=shared.serve)
    engine.start()
    wrong: list[int] = []

    def check(seed: int) -> None:
        for _ in range(20):
            image = picture(seed)
            if not np.array_equal(work(image, shared), image[..., 0].astype(np.float32) / 255):
                wrong.append(seed)

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    shared.end(RuntimeError("done"))
    engine.join(PATIENCE_SECONDS)
    assert wrong == []
    assert not engine.is_alive()
    with pytest.raises(RuntimeError, match="done"):
        work(picture(0), shared)
