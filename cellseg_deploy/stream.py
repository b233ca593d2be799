"""Many images at once through one network: decoding, inference, labelling and encoding overlap.

    helper threads    decode, resize, cut    label, measure, encode
                             |  TiledPass           ^
    engine threads           `---> batches of tiles of several images --> network --> stitch
    caller's thread                                                                    results, in order

Everything is threads of one process: the heavy work is in libraries that release Python's lock, and a process forked
after OpenCV or an engine has started threads of its own hangs. Two threads feed the engine: while one waits for its
answer, the other cuts the next batch or stitches the last one. At any time one call of the network runs, and batches
run in the order in which they were filled.

Which images share a batch depends on timing. No result does: each tile is answered for itself, and each pixel belongs
to one tile.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cellseg_deploy.errors import concerns_one_image
from cellseg_deploy.outputs.interrupts import deferred_signals
from cellseg_deploy.passes import Predict
from cellseg_deploy.schedule import Job, Look, Part, Peak, Schedule, Ticket

T = TypeVar("T")
MAX_BYTES = 1 << 30
"""Of images on their way, by ``Job.nbytes``: some fifty smears of 1600 x 1200 px, or one image that is larger alone."""
_ENGINE_THREADS = 2
_POLL_SECONDS = 0.1  # a signal that hits another thread, or any on Windows, does not wake the one that waits
_CRASH = -1


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of one job: a value, or the error that ended it."""

    value: T | None = None
    error: BaseException | None = None

    def get(self) -> T:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where T allows it


@dataclass(frozen=True)
class _Batch(Generic[T]):
    """``before``: set when it may run. ``after``: to be set when it has, for the batch behind it."""

    parts: Sequence[Part[T]]
    before: threading.Event
    after: threading.Event


class Stream(Generic[T]):
    """Runs jobs; iterating over it gives an ``Outcome`` each, in the order of the jobs.

    >>> with Stream(jobs, backend.predict, batch=8) as stream:  # doctest: +SKIP
    ...     for outcome in stream:
    ...         keep(outcome.get())

    An error that a job raises is its own outcome and no other's. So is one of the network that concerns one image only
    (``errors.concerns_one_image``): a batch of several images that fails is run again image by image. Any other error
    of the network is the outcome of every job that still needs it. Leaving the block ends and joins all threads; a call
    of the network that is under way cannot be cut short and is waited for.
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
        """``predict``: the network, called by one thread at a time. ``batch``: most tiles a call; ``step``: tiles that
        cost as much as one. ``helpers``: threads for all but the network. ``exclusive``: helpers and network take
        turns, for one core. ``max_jobs``, ``max_bytes``: bounds of what is on its way; by default as many images as it
        takes to fill all batches with images of one tile.

        Raises ``UsageError`` for anything below 1.
        """
        if max_jobs is None:
            max_jobs = (_ENGINE_THREADS + 1) * max(batch, step) + 2 * helpers
        self._n_jobs = len(jobs)
        self._schedule = Schedule(jobs, batch=batch, step=step, helpers=helpers, max_jobs=max_jobs, max_bytes=max_bytes)
        self._predict = predict
        self._core: AbstractContextManager[object] = threading.Lock() if exclusive else nullcontext()
        self._changed = threading.Condition()
        self._last_turn = threading.Event()  # of the batch that was filled last: set when it has run
        self._last_turn.set()
        self._stopping = False
        self._broken: BaseException | None = None
        self._step_seconds = 0.0
        self.engine_seconds = 0.0
        # The caller's thread waits on a queue written in C: a signal may interrupt it at any point, and must not leave
        # a lock behind that the other threads wait for.
        self._done: queue.SimpleQueue[tuple[int, Outcome[T]]] = queue.SimpleQueue()
        # Daemons are not waited for when the program ends; they are joined here, unless a second Ctrl-C forbids it.
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"cellseg-{name}-{i}", daemon=True)
            for name, loop, count in (("engine", self._feed, _ENGINE_THREADS), ("helper", self._help, helpers))
            for i in range(count)
        ]

    @property
    def peak(self) -> Peak:
        """Most there ever was on its way."""
        return self._schedule.peak

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[Outcome[T]]:
        # Not sooner: a signal that ends the start of threads is then within the block that ends them.
        with deferred_signals():
            for thread in self._threads:
                thread.start()
        early: dict[int, Outcome[T]] = {}
        for index in range(self._n_jobs):
            while index not in early:
                try:
                    number, outcome = self._done.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if number == _CRASH:
                    outcome.get()
                early[number] = outcome
            yield early.pop(index)
            with deferred_signals(), self._changed:
                self._schedule.release(index)
                self._changed.notify_all()

    def stop(self) -> None:
        """Begin nothing new; does not wait for what is under way."""
        with deferred_signals(), self._changed:
            self._stopping = True
            self._changed.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
        for ticket in self._schedule.unfinished():
            ticket.steps.close()

    def _guarded(self, loop: Callable[[], None]) -> None:
        """A thread that ends by an error of ours must not leave the caller waiting."""
        try:
            loop()
        except BaseException as error:
            self._done.put((_CRASH, Outcome(error=error)))

    # --------------------------------------------------------------------------------------------------- the helpers

    def _help(self) -> None:
        while (task := self._next_task()) is not None:
            if isinstance(task, Look):
                nbytes = task.job.nbytes()
                with self._changed:
                    self._schedule.looked(nbytes)
                    self._changed.notify_all()
            else:
                self._take_step(task)

    def _next_task(self) -> Ticket[T] | Look[T] | None:
        with self._changed:
            while not self._stopping:
                task = self._schedule.next_task()
                if task is not None:
                    return task
                self._changed.wait()
        return None

    def _take_step(self, ticket: Ticket[T]) -> None:
        try:
            with self._core:
                error, ticket.error = ticket.error, None
                work = next(ticket.steps) if error is None else ticket.steps.throw(error)
        except StopIteration as end:
            outcome: Outcome[T] = Outcome(value=end.value)
        except BaseException as raised:  # of any kind: it is raised again where the outcome is taken
            _forget_arrays(raised)
            outcome = Outcome(error=raised)
        else:
            with self._changed:
                self._schedule.needs_network(ticket, work)
                self._changed.notify_all()
            return
        with self._changed:
            self._schedule.ended(ticket)
            self._changed.notify_all()
        self._done.put((ticket.index, outcome))

    # ---------------------------------------------------------------------------------------------------- the engine

    def _feed(self) -> None:
        while self._feed_once():
            pass

    def _feed_once(self) -> bool:
        """One batch; False once there is to be none any more. A function, so that nothing is kept while waiting."""
        batch = self._next_batch()
        if batch is None:
            return False
        try:
            answers = self._answers(batch, batch.parts)
        finally:
            batch.after.set()
        with self._changed:
            self._schedule.computed()
            self._changed.notify_all()
        for part, answer in zip(batch.parts, answers, strict=True):
            self._deliver(part, answer)
        return True

    def _next_batch(self) -> _Batch[T] | None:
        since: float | None = None
        with self._changed:
            while not self._stopping:
                left: float | None = None
                if self._schedule.should_wait():
                    now = time.perf_counter()
                    since = now if since is None else since
                    left = since + self._step_seconds - now
                else:
                    since = None
                parts = self._schedule.next_batch(patient=left is None or left > 0)
                if parts:
                    before, self._last_turn = self._last_turn, threading.Event()
                    return _Batch(parts, before, self._last_turn)
                self._changed.wait(left)
        return None

    def _answers(self, batch: _Batch[T], parts: Sequence[Part[T]]) -> list[npt.NDArray[np.float32] | BaseException]:
        """Probabilities (n, K, S, S) of each part, or the error in their place."""
        try:
            return self._run(batch, parts)
        except BaseException as error:  # of any kind: handed to the images whose tiles these are
            if len(parts) > 1 and concerns_one_image(error) and not self._stopping:
                return [answer for part in parts for answer in self._answers(batch, [part])]
            return [error] * len(parts)

    def _run(self, batch: _Batch[T], parts: Sequence[Part[T]]) -> list[npt.NDArray[np.float32] | BaseException]:
        ends = np.cumsum([len(part) for part in parts]).tolist()
        tiles_nhwc = np.empty((ends[-1], *parts[0].work.tile_shape), np.uint8)
        for part, end in zip(parts, ends, strict=True):
            part.work.cut_into(tiles_nhwc[end - len(part) : end], part.start)
        batch.before.wait()
        with self._core:
            if self._broken is not None or self._stopping:  # while this batch waited for its turn
                raise self._broken or RuntimeError("stopped before these tiles were run")
            start = time.perf_counter()
            try:
                answers = self._predict(tiles_nhwc)
            except BaseException as error:
                self._broken = None if concerns_one_image(error) else error
                raise
            finally:
                seconds = time.perf_counter() - start
                self.engine_seconds += seconds
                self._step_seconds = seconds / -(-ends[-1] // self._schedule.step)
        for part in parts:
            part.work.clock.add("network", seconds * len(part) / ends[-1])
        return [answers[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]

    def _deliver(self, part: Part[T], answer: npt.NDArray[np.float32] | BaseException) -> None:
        if not isinstance(answer, BaseException):
            try:
                part.work.stitch(part.start, answer)
            except BaseException as error:  # as in _answers
                answer = error
        with self._changed:
            if not isinstance(answer, BaseException):
                self._schedule.answered(part)
            else:
                self._schedule.failed(part, answer)
                if not concerns_one_image(answer):
                    self._schedule.breaks(answer)
            self._changed.notify_all()


def _forget_arrays(error: BaseException) -> None:
    """Let go of what the functions that ``error`` left still hold; the lines of its traceback stay.

    A large image for which memory was short would stay in memory until its turn comes, and others would fail for it.
    """
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
