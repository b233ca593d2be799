"""Many images through one network in parallel: workers that block, and one thread that batches.

    workers (many)       read, resize, cut --> hand over tiles, wait --> stitch, label, measure, encode
                                                     |         ^
    engine thread (one)                              `--> batch of tiles of several images --> network
    caller's thread      begins jobs, takes results in order

The work on an image is a plain function that receives a ``Network``: a callable that fills in the probabilities of
``ImageTiles`` and returns. ``alone`` makes a network for a single image; ``Overlapped`` runs many such functions in
parallel and lets their tiles share batches (Triton calls this a dynamic batcher).

All threads belong to one process: the heavy work is in libraries that release Python's lock, and a process forked
after OpenCV or an engine has started threads hangs. Which images share a batch depends on timing, but no result does:
each tile is computed independently, and each pixel belongs to one tile.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from cellseg_deploy.cells.image_tiles import ImageTiles, Probabilities, StageClock, Tiles
from cellseg_deploy.errors import UsageError, concerns_one_image
from cellseg_deploy.files.signals import deferred_signals

T = TypeVar("T")
Predict = Callable[[Tiles], Probabilities]
"""``Backend.predict``: tiles uint8 (N, S, S, 3) to probabilities float32 (N, K, S, S)."""

MAX_BYTES = 1 << 30
"""Limit for images in flight, by ``Job.nbytes``: some fifty smears of 1600 x 1200 px, or one larger image alone."""
_BATCHES_AHEAD = 2  # no image is started while more tiles wait: a decoded image is larger than its file
_POLL_SECONDS = 0.1  # a signal to another thread, or any signal on Windows, does not wake a waiting thread


Network = Callable[[ImageTiles], None]
"""Runs and stitches every tile, then returns. Raises what the network raises."""


def alone(predict: Predict, batch: int) -> Network:
    """Make a network for one image at a time, in the calling thread; ``batch`` tiles per call of ``predict``."""

    def network(tiles: ImageTiles) -> None:
        for start in range(0, len(tiles), batch):
            tiles_nhwc = tiles.cut(start, batch)
            with tiles.clock("network"):
                answers = predict(tiles_nhwc)
            tiles.stitch(start, answers)

    return network


# ------------------------------------------------------------------------------------------------- the engine's thread


@dataclass(eq=False)
class _Request:
    """Consecutive tiles of one image, which may be split over two batches."""

    tiles_nhwc: Tiles
    clock: StageClock
    answers: Future[Probabilities] = field(default_factory=Future)
    taken: int = 0
    answered: int = 0
    collected: Probabilities | None = None

    def answer(self, start: int, probabilities_nkhw: Probabilities) -> None:
        """Store the probabilities of the tiles from ``start`` on; complete the future once all have arrived."""
        n = len(self.tiles_nhwc)
        if len(probabilities_nkhw) == n:
            self.collected = probabilities_nkhw
        else:
            if self.collected is None:
                self.collected = np.empty((n, *probabilities_nkhw.shape[1:]), np.float32)
            self.collected[start : start + len(probabilities_nkhw)] = probabilities_nkhw
        self.answered += len(probabilities_nkhw)
        if self.answered == n and not self.answers.done():
            self.answers.set_result(self.collected)

    def fail(self, error: BaseException) -> None:
        """End the request with ``error``, unless it has already ended."""
        if not self.answers.done():
            self.answers.set_exception(error)


@dataclass(frozen=True)
class _Part:
    """The tiles from ``start`` to before ``stop`` of a request, in one batch."""

    request: _Request
    start: int
    stop: int

    @property
    def tiles_nhwc(self) -> Tiles:
        return self.request.tiles_nhwc[self.start : self.stop]


class BatchedNetwork:
    """Calls the network from one thread, with tiles from all threads that wait for it.

    When called with ``ImageTiles``, it blocks until they are stitched. If a batch of several images fails with an error
    of one image (``errors.concerns_one_image``), it is retried image by image. Any other error breaks the network: it
    is raised in all threads that wait, and in all later calls; unless ``passes`` says that it ends this batch only.

    A network may compute in steps of several tiles (a fixed batch, padded with black tiles). Fewer tiles than a step
    therefore wait for more, but no longer than the call would take.
    """

    def __init__(
        self, predict: Predict, *, batch: int, step: int = 1, passes: Callable[[BaseException], bool] = lambda _: False
    ) -> None:
        """``batch``: maximum tiles per call, rounded up to a multiple of ``step``. Raises ``UsageError`` below 1."""
        for name, value in (("batch", batch), ("step", step)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self.batch, self._step = -(-batch // step) * step, step
        self.seconds = 0.0
        self._predict, self._passes = predict, passes
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._n_waiting = 0  # tiles
        self._ended: BaseException | None = None  # why no more tiles are accepted
        self._last_seconds = self._step_seconds = 0.0  # of the last call, and per step of it

    def __call__(self, tiles: ImageTiles, away: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Run and stitch ``tiles``. While one batch is computed, the next is cut.

        ``away``: context entered while this thread waits for the network.
        """
        pending: deque[tuple[int, _Request]] = deque()

        def collect() -> None:
            start, request = pending.popleft()
            with away():
                answers = request.answers.result()
            tiles.stitch(start, answers)

        try:
            for start in range(0, len(tiles), self.batch):
                pending.append((start, self._submit(_Request(tiles.cut(start, self.batch), tiles.clock))))
                if len(pending) > 1:
                    collect()
            while pending:
                collect()
        finally:
            for _, request in pending:  # after an error
                self._withdraw(request)

    def predict(self, tiles_nhwc: Tiles) -> Probabilities:
        """Call the network once, timed."""
        start = time.perf_counter()
        try:
            return self._predict(tiles_nhwc)
        finally:
            self._last_seconds = time.perf_counter() - start
            self._step_seconds = self._last_seconds / -(-len(tiles_nhwc) // self._step)
            self.seconds += self._last_seconds

    def has_room(self) -> bool:
        """Whether few enough tiles wait to start another image."""
        return self._n_waiting <= _BATCHES_AHEAD * self.batch

    def wait_for_room(self) -> None:
        """Return once there is room, or once no more tiles are accepted."""
        with self._changed:
            while not self.has_room() and self._ended is None:
                self._changed.wait()

    def serve(self) -> None:
        """Run batches until ``end`` is called; body of the engine's thread."""
        try:
            while parts := self._next_batch():
                self._run(parts)
                del parts  # hold no tiles while waiting
        except BaseException as error:  # a bug in this class must not leave the workers waiting
            self.end(error)

    def end(self, why: BaseException) -> None:
        """Accept no more tiles; raise ``why`` in all waiting and all later calls. The first reason holds."""
        with self._changed:
            self._ended = self._ended or why
            for request in self._waiting:
                request.fail(self._ended)
            self._waiting.clear()
            self._n_waiting = 0
            self._changed.notify_all()

    def _submit(self, request: _Request) -> _Request:
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._waiting.append(request)
            self._n_waiting += len(request.tiles_nhwc)
            self._changed.notify_all()
        return request

    def _withdraw(self, request: _Request) -> None:
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
                self._n_waiting -= len(request.tiles_nhwc) - request.taken

    def _next_batch(self) -> list[_Part]:
        """Return the tiles to run, oldest first; empty once the network has ended."""
        deadline: float | None = None
        with self._changed:
            while self._ended is None:
                if self._n_waiting >= self._step:
                    return self._take(min(self._n_waiting - self._n_waiting % self._step, self.batch))
                if not self._n_waiting:
                    deadline = None
                    self._changed.wait()
                    continue
                now = time.perf_counter()
                deadline = now + self._step_seconds if deadline is None else deadline
                if now >= deadline:
                    return self._take(self._n_waiting)
                self._changed.wait(deadline - now)
        return []

    def _take(self, n_tiles: int) -> list[_Part]:
        self._n_waiting -= n_tiles
        self._changed.notify_all()  # there may be room now
        parts: list[_Part] = []
        while n_tiles:
            request = self._waiting[0]
            part = _Part(request, request.taken, min(request.taken + n_tiles, len(request.tiles_nhwc)))
            parts.append(part)
            n_tiles -= part.stop - part.start
            request.taken = part.stop
            if request.taken == len(request.tiles_nhwc):
                self._waiting.popleft()
        return parts

    def _run(self, parts: Sequence[_Part]) -> None:
        if self._ended is not None:
            for part in parts:
                part.request.fail(self._ended)
            return
        try:
            self._call(parts)
        except BaseException as error:  # of any kind: passed to the images that own these tiles
            if len(parts) > 1 and concerns_one_image(error):
                for part in parts:
                    self._run([part])
                return
            if not concerns_one_image(error) and not self._passes(error):
                self.end(error)
            for part in parts:
                part.request.fail(error)

    def _call(self, parts: Sequence[_Part]) -> None:
        whole = parts[0].tiles_nhwc if len(parts) == 1 else np.concatenate([part.tiles_nhwc for part in parts])
        answers = self.predict(whole)
        first = 0
        for part in parts:
            n = part.stop - part.start
            part.request.clock.add("network", self._last_seconds * n / len(whole))
            part.request.answer(part.start, answers[first : first + n])
            first += n


# ------------------------------------------------------------------------------------------------- the workers' threads


@contextmanager
def core_given_up(cores: threading.Semaphore) -> Iterator[None]:
    """Let another thread use this one's core of ``cores`` during the block."""
    cores.release()
    try:
        yield
    finally:
        cores.acquire()


@dataclass(frozen=True)
class Job(Generic[T]):
    """One image to process. ``work``: the function that does so with the network passed to it. ``nbytes``: estimate of
    the memory it takes; called once, in the caller's thread, before the work begins."""

    work: Callable[[Network], T]
    nbytes: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """Outcome of one job: a value, or the error that ended the job."""

    value: T | None = None
    error: BaseException | None = None

    def get(self) -> T:
        """Return the value, or raise the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where T allows it


class Overlapped(Generic[T]):
    """Runs jobs in parallel; iterating over it yields one ``Outcome`` per job, in the order of the jobs.

    >>> with Overlapped(jobs, backend.predict, batch=8) as outcomes:  # doctest: +SKIP
    ...     for outcome in outcomes:
    ...         keep(outcome.get())

    An error raised by a job is the outcome of that job only; an error that breaks the network is the outcome of every
    job that still needs the network. At most ``max_jobs`` jobs, together ``max_bytes``, are in flight: begun, with the
    result not yet taken. Leaving the block ends and joins all threads, after waiting for a running network call.
    """

    def __init__(
        self,
        jobs: Sequence[Job[T]],
        predict: Predict,
        *,
        batch: int,
        step: int = 1,
        helpers: int = 2,
        exclusive: bool = False,
        max_jobs: int | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """``predict``: the network, called from one thread. ``batch``, ``step``: see ``BatchedNetwork``. ``helpers``:
        number of jobs that compute at a time while others wait for the network. ``exclusive``: one job after the other
        in the caller's thread, for one core. ``max_jobs``: by default enough to fill all batches with one-tile images.

        Raises ``UsageError`` for anything below 1.
        """
        self._network = BatchedNetwork(predict, batch=batch, step=step)
        if max_jobs is None:
            max_jobs = (_BATCHES_AHEAD + 1) * self._network.batch + 2 * helpers
        for name, value in (("helpers", helpers), ("max_jobs", max_jobs), ("max_bytes", max_bytes)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self._jobs, self._exclusive, self._max_bytes = jobs, exclusive, max_bytes
        self._max_jobs = max_jobs
        self._next_nbytes: int | None = None
        self._begun: dict[int, int] = {}  # bytes of each job in flight: begun, its result not yet taken
        self._n_begun = 0
        self._cores = threading.Semaphore(helpers)
        self._next_in_line = threading.Lock()  # images are started in order, one worker at a time
        self._count = threading.Lock()
        self._n_busy = 0  # workers that have left that line
        self._stopping = False
        # Queues written in C: a signal may interrupt the caller's thread at any point, and must not leave a lock held
        # that other threads wait for.
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Outcome[T]]] = queue.SimpleQueue()
        # One-tile images fill the running batch and the next, while as many jobs as helpers compute. A worker is
        # started only when all others are busy: each worker keeps some memory, and large images need few workers.
        self._max_workers = min(max_jobs, len(jobs), helpers + _BATCHES_AHEAD * self._network.batch)
        self._threads: list[threading.Thread] = []

    @property
    def engine_seconds(self) -> float:
        """Total time during which a network call was running."""
        return self._network.seconds

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[Outcome[T]]:
        if self._exclusive:
            yield from self._one_after_the_other()
            return
        # Threads start only here, inside the block that ends them, in case a signal interrupts their start.
        with deferred_signals():
            self._start("engine", self._network.serve)
            self._start("worker", self._work)
        early: dict[int, Outcome[T]] = {}
        for index in range(len(self._jobs)):
            self._begin_more()
            while index not in early:
                try:
                    number, outcome = self._done.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                early[number] = outcome
            yield early.pop(index)
            del self._begun[index]

    def stop(self) -> None:
        """Begin no new jobs; does not wait for running jobs."""
        with deferred_signals():
            self._stopping = True
            self._network.end(RuntimeError("stopped before these tiles were run"))
            self._todo.put(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_POLL_SECONDS)

    def _begin_more(self) -> None:
        """Hand out jobs in order as long as they fit; a job larger than the limit runs alone."""
        while self._n_begun < len(self._jobs) and len(self._begun) < self._max_jobs:
            if self._next_nbytes is None:
                self._next_nbytes = self._jobs[self._n_begun].nbytes()
            if self._begun and sum(self._begun.values()) + self._next_nbytes > self._max_bytes:
                return
            self._begun[self._n_begun], self._next_nbytes = self._next_nbytes, None
            self._n_begun += 1
            self._todo.put(self._n_begun - 1)

    def _one_after_the_other(self) -> Iterator[Outcome[T]]:
        network = alone(self._network.predict, self._network.batch)
        for job in self._jobs:
            if self._stopping:
                return
            yield _outcome(job, network)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        # Python does not join daemons at exit; ``__exit__`` does, unless a second Ctrl-C interrupts it.
        thread = threading.Thread(target=target, name=f"cellseg-{name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)  # before it starts: the new thread reads the length
        try:
            thread.start()
        except BaseException:
            self._threads.remove(thread)
            raise

    def _work(self) -> None:
        while (index := self._take_turn()) is not None:
            try:
                outcome = _outcome(self._jobs[index], self._answer)
            finally:
                self._cores.release()
                with self._count:
                    self._n_busy -= 1
            self._done.put((index, outcome))
            del outcome

    def _take_turn(self) -> int | None:
        """Return the next job to begin, with a core to compute on; None at the end."""
        with self._next_in_line:
            index = self._todo.get()
            if index is None or self._stopping:
                self._todo.put(None)  # for the next in line
                return None
            self._take_core()
            with self._count:
                self._n_busy += 1
                none_is_left = self._n_busy == len(self._threads) - 1  # the engine's thread is not a worker
            if none_is_left and self._n_busy < self._max_workers:
                self._start_another()
        return index

    def _start_another(self) -> None:
        try:
            self._start("worker", self._work)
        except RuntimeError:  # the system has no more threads: the existing workers do the work
            self._max_workers = self._n_busy

    def _take_core(self) -> None:
        """Take a core once the network is short of tiles."""
        while True:
            self._network.wait_for_room()
            self._cores.acquire()
            if self._network.has_room():
                return
            self._cores.release()

    def _answer(self, tiles: ImageTiles) -> None:
        """Network for a worker: another worker uses its core while it waits."""
        self._network(tiles, partial(core_given_up, self._cores))


def _outcome(job: Job[T], network: Network) -> Outcome[T]:
    try:
        return Outcome(job.work(network))
    except BaseException as raised:  # of any kind: raised again where the outcome is taken
        if isinstance(raised, MemoryError):
            # Otherwise a large image that ran out of memory would stay in memory until its turn, and others would fail
            # because of it. Only for MemoryError: an error that ends the network is raised in many threads, and its
            # traceback has frames that these threads are just leaving.
            traceback.clear_frames(raised.__traceback__)
        return Outcome(error=raised)
