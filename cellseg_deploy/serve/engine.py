"""One network for all requests: a thread that batches their tiles, and helper threads that do the rest of the work.

The same shape as ``batching.Overlapped``, for work that arrives at any time and never ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.batching import BatchedNetwork, Network, core_given_up
from cellseg_deploy.cells.image_tiles import ImageTiles, Probabilities, StageClock, Tiles
from cellseg_deploy.cells.notes import first_warnings
from cellseg_deploy.errors import BackendUnavailableError, concerns_one_image
from cellseg_deploy.images.decode import declared_pixels_in, decode_bytes
from cellseg_deploy.images.read import as_rgb
from cellseg_deploy.outputs.segmentation import Segmentation
from cellseg_deploy.segmenter import Segmenter, as_read
from cellseg_deploy.serve.limits import Held
from cellseg_deploy.serve.metrics import Metrics
from cellseg_deploy.serve.outputs import Output
from cellseg_deploy.serve.settings import Settings
from cellseg_deploy.threads import ThreadPlan, single_threaded_libraries

_log = logging.getLogger(__name__)


class TaskCancelledError(Exception):
    """Nobody waits for this image: its request was abandoned."""


@dataclass(frozen=True)
class Answer:
    """``body``: the encoded result. ``found``: number of cells; ``counted``: those that count; ``warnings``: kinds."""

    output: Output
    body: bytes
    found: int
    counted: int
    warnings: tuple[str, ...]


@dataclass(eq=False)
class Task:
    """One image to segment. ``name``: of the image, in messages and results. ``data``: the file's bytes, which count in
    ``held`` until they are dropped.

    ``tiles``, ``tiles_done``: progress through the network, at the present scale; where the scale is measured, there
    are several passes. ``seconds``: that the work took, None until it has ended.
    """

    name: str
    data: bytes
    settings: Settings
    output: Output
    held: Held | None = None
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.perf_counter)
    tiles: int = 0
    tiles_done: int = 0
    is_running: bool = False
    seconds: float | None = None

    def check(self) -> None:
        """Raise ``TaskCancelledError`` if nobody waits for it."""
        if self.is_cancelled.is_set():
            raise TaskCancelledError

    def file(self) -> bytes:
        """Return the file's bytes. Raises ``TaskCancelledError`` if nobody waits for it."""
        data = self.data
        self.check()  # afterwards: ``cancel`` drops them in another thread
        return data

    def cancel(self) -> None:
        """Nobody waits for it any more. It may still lie in a queue, without its bytes."""
        self.is_cancelled.set()
        self.drop()

    def drop(self) -> None:
        """Forget the file's bytes."""
        self.data = b""
        if self.held is not None:
            self.held.give_back()


class _Watched(ImageTiles):
    """Tiles of a task, which record its progress and end when it is cancelled."""

    def __init__(self, tiles: ImageTiles, task: Task) -> None:
        self.clock, self._tiles, self._task = tiles.clock, tiles, task
        task.tiles, task.tiles_done = len(tiles), 0

    def __len__(self) -> int:
        return len(self._tiles)

    def cut(self, start: int, most: int) -> Tiles:
        self._task.check()
        return self._tiles.cut(start, most)

    def stitch(self, start: int, probabilities_nkhw: Probabilities) -> None:
        self._tiles.stitch(start, probabilities_nkhw)
        self._task.tiles_done = start + len(probabilities_nkhw)


class _Memory:
    """Decoded images in flight, at most ``most`` bytes together; a larger image waits until it is alone."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, nbytes: int, turn: threading.Lock) -> Iterator[None]:
        """Hold ``nbytes`` for the block; ``turn`` is held while waiting, so that small images do not overtake a large
        one for ever."""
        with turn, self._changed:
            while self._used and self._used + nbytes > self._most:
                self._changed.wait()
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class Engine:
    """``backend``: the open network, closed by the caller after ``close``. ``plan``: threads. ``metrics``: told of each
    stage and batch.

    >>> with Engine(backend, batch=8, plan=plan(1), metrics=NoMetrics()) as engine:  # doctest: +SKIP
    ...     engine.submit(Task("a.png", data, Settings(), named("json"))).result().found
    """

    def __init__(
        self, backend: Backend, *, batch: int, plan: ThreadPlan, metrics: Metrics, in_flight_bytes: int = 1 << 30
    ) -> None:
        self.backend, self.metrics = backend, metrics
        self._network = BatchedNetwork(self._predict, batch=batch, step=backend.batch_step, passes=self._passes)
        self._memory, self._turn = _Memory(in_flight_bytes), threading.Lock()
        self._cores = threading.Semaphore(plan.helpers)
        # One-tile images fill the running batch and the next, while as many images as helpers compute.
        self._workers = ThreadPoolExecutor(plan.helpers + 2 * self._network.batch, "cellseg-worker")
        self._thread = threading.Thread(target=self._network.serve, name="cellseg-engine", daemon=True)
        self._stack = ExitStack()
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(single_threaded_libraries())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was submitted, and end the threads."""
        self._workers.shutdown(wait=True)
        self._network.end(RuntimeError("the service has ended"))
        self._thread.join()
        self._stack.close()

    @property
    def is_well(self) -> bool:
        """Whether tiles are run: False once the network has failed for good, which only a restart mends."""
        return self._thread.is_alive()

    def submit(self, task: Task) -> Future[Answer]:
        """Segment ``task`` in a helper thread; cancelling the future has no effect once it runs."""
        return self._workers.submit(self.run, task)

    def run(self, task: Task) -> Answer:
        """Segment and encode ``task`` in the calling thread, and raise what that raises: ``DataError`` for its image,
        ``TaskCancelledError``, ``BackendUnavailableError`` once the network has failed."""
        try:
            return self._run(task)
        finally:
            task.drop()

    def _run(self, task: Task) -> Answer:
        clock = StageClock()
        clock.add("queue", time.perf_counter() - task.submitted)
        segmenter = task.settings.segmenter(self.backend)
        nbytes = segmenter.bytes_in_flight(declared_pixels_in(Path(task.name), task.file()))
        self._network.wait_for_room()
        with self._memory(nbytes, self._turn):
            task.check()
            start = time.perf_counter()
            task.is_running = True
            try:
                with self._cores:
                    return self._answer(task, segmenter, clock)
            finally:
                task.seconds = time.perf_counter() - start
                task.is_running = False
                self.metrics.stages(clock.seconds)

    def _answer(self, task: Task, segmenter: Segmenter, clock: StageClock) -> Answer:
        settings, path = task.settings, Path(task.name)
        with clock("read"):
            loaded = as_rgb(path, decode_bytes(path, task.file(), settings.max_pixels), settings.reading)
        task.drop()
        found = segmenter.segment(loaded.pixels_hwc, self._network_for(task), clock, field=settings.field)
        found = as_read(found, loaded, name=task.name, count_rule=settings.count_rule)
        task.check()
        with clock("encode"):
            body = task.output.encode(found)
        return Answer(task.output, body, found.count, int(found.counted().sum()), _warnings(found))

    def _network_for(self, task: Task) -> Network:
        def network(tiles: ImageTiles) -> None:
            try:
                self._network(_Watched(tiles, task), partial(core_given_up, self._cores))
            except BaseException as error:
                if error is self.failure:
                    raise BackendUnavailableError(
                        f"the network has failed ({type(error).__name__}: {error}); restart the service"
                    ) from error
                raise

        return network

    def _passes(self, error: BaseException) -> bool:
        """Whether ``error`` ends the requests of a batch only: the server of a remote engine may come back."""
        return self.backend.is_remote and isinstance(error, BackendUnavailableError)

    def _predict(self, tiles_nhwc: Tiles) -> Probabilities:
        start = time.perf_counter()
        try:
            return self.backend.predict(tiles_nhwc)
        except BaseException as error:
            if self._passes(error):
                _log.error("%s", error)
            elif not concerns_one_image(error):
                _log.critical("the network has failed; the service answers 503 until it is restarted", exc_info=error)
                self.failure = error
            raise
        finally:
            self.metrics.batch(len(tiles_nhwc), self._network.batch, time.perf_counter() - start)


def _warnings(found: Segmentation) -> tuple[str, ...]:
    return tuple(first_warnings(found.notes))
