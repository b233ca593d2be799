"""Jobs made for tests: small pictures, a network that gives back what it sees, and patience that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cellseg_deploy.batching import Job, Network, Outcome, Overlapped
from cellseg_deploy.cells.image_tiles import ImageTiles, StageClock

TILE = 8
PATIENCE_SECONDS = 30.0
SHAPES = [(1, 1), (5, 70), (8, 8), (9, 8), (40, 33), (3, 8), (64, 20)]


def our_threads() -> list[str]:
    """Names of the threads of ``Overlapped`` that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cellseg-")]


def within(function: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """What ``function`` gives or raises; the test fails, and does not hang, if it takes longer."""
    done: list[Outcome[Any]] = []

    def run() -> None:
        try:
            done.append(Outcome(function()))
        except BaseException as error:
            done.append(Outcome(error=error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, f"deadlock: not done within {seconds} s"
    return done[0].get()


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 200, (*SHAPES[seed % len(SHAPES)], 3)).astype(np.uint8)


def network(tiles_nhwc: np.ndarray) -> np.ndarray:
    """The red channel as a probability."""
    return tiles_nhwc[:, None, :, :, 0].astype(np.float32) / 255


def work(image_hwc: np.ndarray, network: Network, passes: int = 1) -> np.ndarray:
    """Sum of what the network says in each of ``passes``."""
    total = np.zeros(image_hwc.shape[:2], np.float32)
    for _ in range(passes):
        tiles = ImageTiles(image_hwc, tile_size=TILE, halo=2, n_channels=1, clock=StageClock())
        network(tiles)
        total += tiles.out_khw[0]
    return total


def jobs_of(pictures: list[np.ndarray], **settings: Any) -> list[Job[np.ndarray]]:
    return [Job(partial(work, image, **settings), partial(int, image.nbytes)) for image in pictures]


def run(jobs: list[Job[Any]], predict: Any = network, **settings: Any) -> list[Outcome[Any]]:
    def go() -> list[Outcome[Any]]:
        with Overlapped(jobs, predict, **{"batch": 4, **settings}) as outcomes:
            return list(outcomes)

    return within(go)
