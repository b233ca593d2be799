"""What to do next when many images are on their way at once: bookkeeping only, no thread, no clock, no network.

    jobs in order --look--> size known --admit--> first step --> TiledPass --> batches --> answered --> next step ...
                                 ^ at most ``max_jobs`` and ``max_bytes`` on the way            --> ended, released

*Admission* is in the order of the jobs and bounded twice: by number, and by bytes, except that a job too large for the
bound goes alone. A job counts until its result was taken (``release``), and results are taken in order; as the oldest
job is always let in first, there is always one that can go on. Nothing is admitted while more than two batches of tiles
wait: a decoded image is larger than its file.

*Batches* take tiles of the oldest passes first, of as many as it takes to fill them. What a network computes may come
in steps of several tiles (a fixed batch, filled up with black tiles); a batch that is no multiple of the step is
therefore put off while an image is being decoded, but no longer than the call would take: waiting then costs at most as
much as the black tiles it may save.

An error of one image is handed to that image. One of the engine (``broken``) ends every job that still needs it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cellseg_deploy.errors import UsageError
from cellseg_deploy.passes import Steps, TiledPass

T = TypeVar("T")
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Job(Generic[T]):
    """One image to do. ``nbytes``: of memory, roughly, from first step to last; asked once and before the first step,
    by another thread. ``steps``: begins them; nothing is done before."""

    steps: Callable[[], Steps[T]]
    nbytes: Callable[[], int] = lambda: 0


@dataclass(eq=False)
class Ticket(Generic[T]):
    """A job that was admitted. ``work``: its pass that waits for answers; ``taken``, ``answered``: tiles of that pass.
    ``error``: to be raised at its next step."""

    index: int
    steps: Steps[T]
    nbytes: int
    work: TiledPass | None = None
    taken: int = 0
    answered: int = 0
    error: BaseException | None = None

    def __lt__(self, other: Ticket[T]) -> bool:
        return self.index < other.index


@dataclass(frozen=True)
class Part(Generic[T]):
    """Tiles ``start`` to ``stop`` of the pass of a ticket, in one batch."""

    ticket: Ticket[T]
    work: TiledPass
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Look(Generic[T]):
    """To do: ask ``job`` how large it is."""

    job: Job[T]


@dataclass
class Peak:
    """Most there ever was at a time: jobs on their way, their bytes, tiles waiting."""

    jobs: int = 0
    nbytes: int = 0
    tiles: int = 0


class Schedule(Generic[T]):
    """See the module. Not for several threads at once: who uses it from some holds a lock."""

    def __init__(
        self, jobs: Sequence[Job[T]], *, batch: int, step: int = 1, helpers: int = 1, max_jobs: int, max_bytes: int
    ) -> None:
        """``batch``: tiles a batch, rounded up to a multiple of ``step``, of which fewer would cost as much.
        ``helpers``: threads that do the tasks. Raises ``UsageError`` for anything below 1."""
        for name, value in (
            *(("batch", batch), ("step", step), ("helpers", helpers)),
            *(("max_jobs", max_jobs), ("max_bytes", max_bytes)),
        ):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self.batch, self.step = -(-batch // step) * step, step
        self.peak = Peak()
        self.broken: BaseException | None = None
        self._jobs, self._helpers = jobs, helpers
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._next = 0  # the job to be admitted next, and how large it is
        self._next_nbytes: int | None = None
        self._looking = False
        self._on_the_way: dict[int, Ticket[T]] = {}
        self._bytes = 0
        self._starting: set[int] = set()  # in their first step: tiles will come of it
        self._resumable: list[Ticket[T]] = []  # both are heaps, the oldest job first
        self._waiting: list[Ticket[T]] = []
        self._waiting_tiles = 0
        self._batches = 0  # that the engine has

    # ----------------------------------------------------------------------------------------- tasks for the helpers

    def next_task(self) -> Ticket[T] | Look[T] | None:
        """A ticket to take a step with, a job to look at, or None if there is nothing to do now."""
        # Feed the engine first; but not where finished passes pile up, for then the helpers are what all wait for.
        hungry = self._waiting_tiles < self.batch and len(self._resumable) < self._helpers
        if not hungry and self._resumable:
            return heapq.heappop(self._resumable)
        if self._admissible():
            return self._admit()
        if self._next < len(self._jobs) and self._next_nbytes is None and not self._looking:
            self._looking = True
            return Look(self._jobs[self._next])
        return heapq.heappop(self._resumable) if self._resumable else None

    def looked(self, nbytes: int) -> None:
        """The answer to a ``Look``."""
        self._looking, self._next_nbytes = False, nbytes

    def _admissible(self) -> bool:
        if self._next_nbytes is None or self._waiting_tiles > _BATCHES_AHEAD * self.batch:
            return False
        fits = len(self._on_the_way) < self._max_jobs and self._bytes + self._next_nbytes <= self._max_bytes
        return fits or not self._on_the_way

    def _admit(self) -> Ticket[T]:
        ticket = Ticket(self._next, self._jobs[self._next].steps(), self._next_nbytes or 0)
        self._on_the_way[ticket.index] = ticket
        self._starting.add(ticket.index)
        self._bytes += ticket.nbytes
        self.peak.jobs = max(self.peak.jobs, len(self._on_the_way))
        self.peak.nbytes = max(self.peak.nbytes, self._bytes)
        self._next, self._next_nbytes = self._next + 1, None
        return ticket

    # ------------------------------------------------------------------------------------------- what a step gave

    def needs_network(self, ticket: Ticket[T], work: TiledPass) -> None:
        """The step of ``ticket`` ended with a pass."""
        self._starting.discard(ticket.index)
        if self.broken is not None:
            self._resume(ticket, self.broken)
            return
        ticket.work, ticket.taken, ticket.answered = work, 0, 0
        heapq.heappush(self._waiting, ticket)
        self._waiting_tiles += len(work)
        self.peak.tiles = max(self.peak.tiles, self._waiting_tiles)

    def ended(self, ticket: Ticket[T]) -> None:
        """The step of ``ticket`` was its last, or failed."""
        self._starting.discard(ticket.index)

    def release(self, index: int) -> None:
        """The result of job ``index`` was taken; there is room for another one."""
        self._bytes -= self._on_the_way.pop(index).nbytes

    def unfinished(self) -> Iterator[Ticket[T]]:
        """Tickets that were not released."""
        yield from self._on_the_way.values()

    # --------------------------------------------------------------------------------------- batches for the engine

    def should_wait(self) -> bool:
        """Whether tiles wait, the engine has nothing to do, and still they are better put off, see the module."""
        return 0 < self._waiting_tiles < self.step and self._batches == 0 and bool(self._starting)

    def next_batch(self, *, patient: bool = True) -> list[Part[T]]:
        """Tiles to run, none if there are too few for now. ``patient``: False once waiting has lasted long enough.

        While the engine is busy only a full batch is given: what comes meanwhile is then in the same one.
        """
        if self._waiting_tiles >= self.batch:
            return self._take(self.batch)
        if self._batches or not self._waiting_tiles or (patient and self.should_wait()):
            return []
        whole_steps = self._waiting_tiles - self._waiting_tiles % self.step
        return self._take(whole_steps or self._waiting_tiles)

    def _take(self, n_tiles: int) -> list[Part[T]]:
        self._batches += 1
        self._waiting_tiles -= n_tiles
        parts: list[Part[T]] = []
        while n_tiles:
            ticket = self._waiting[0]
            assert ticket.work is not None  # it is in the queue because it has one
            part = Part(ticket, ticket.work, ticket.taken, min(ticket.taken + n_tiles, len(ticket.work)))
            parts.append(part)
            ticket.taken = part.stop
            n_tiles -= len(part)
            if ticket.taken == len(ticket.work):
                heapq.heappop(self._waiting)
        return parts

    def computed(self) -> None:
        """The engine is done with a batch, well or not."""
        self._batches -= 1

    def answered(self, part: Part[T]) -> None:
        """The answers for ``part`` are in their place."""
        self._count(part)

    def failed(self, part: Part[T], error: BaseException) -> None:
        """The engine has no answers for ``part``, whose image is not to blame the others for it."""
        ticket = part.ticket
        ticket.error = ticket.error or error
        if ticket in self._waiting:  # what is left of the pass is not worth computing
            self._waiting.remove(ticket)
            heapq.heapify(self._waiting)
            self._waiting_tiles -= len(part.work) - ticket.taken
            ticket.answered += len(part.work) - ticket.taken
        self._count(part)

    def breaks(self, error: BaseException) -> None:
        """The engine cannot go on: so ends every job that waits for it now or comes to need it."""
        self.broken = self.broken or error
        for ticket in self._waiting:
            ticket.error = ticket.error or error
            ticket.answered += len(ticket.work or ()) - ticket.taken
            if ticket.answered == len(ticket.work or ()):
                self._resume(ticket, ticket.error)
        self._waiting.clear()
        self._waiting_tiles = 0

    def _count(self, part: Part[T]) -> None:
        part.ticket.answered += len(part)
        if part.ticket.answered == len(part.work):
            self._resume(part.ticket, part.ticket.error)

    def _resume(self, ticket: Ticket[T], error: BaseException | None) -> None:
        ticket.work, ticket.error = None, error
        heapq.heappush(self._resumable, ticket)
