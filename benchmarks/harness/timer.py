"""The only timer of all benchmarks: warm-up, interleaved rounds, median and spread, ratios of paired rounds.

    warm-up     A first call, A again, B first call, B again, ...       how many calls make a turn
    round 1     A B C        a turn: n calls back to back, n chosen so that it takes ``min_seconds``
    round 2     A C B        the order changes, so that no entry always follows the same one
    round 3     C A B

If other work slows the machine for a minute, all entries of that minute are slowed, so a ratio is taken per round and
its median reported; timing one entry after the other would put that minute into the ratio. The timer does not know
what is timed: an entry is a ``Turn``, which may run in this process (``turn_of``) or in another one
(``worker.Worker.turn``). No other module of the benchmarks reads a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cellseg_benchmarks.harness.partial import Progress
from cellseg_deploy.errors import CellsegError, UsageError

Clock = Callable[[], float]
"""Seconds since an arbitrary moment, monotonic."""
Turn = Callable[[int], float]
"""Runs an entry the given number of times back to back and returns the total seconds, device synchronised."""

BOOTSTRAP_SAMPLES = 4000
CONFIDENCE = 0.95
_MAX_CALLS = 10_000


@dataclass(frozen=True)
class Plan:
    """Plan of a measurement.

    ``rounds``: turns of each entry; fewer if ``budget_seconds`` (None: no limit) run out first, but at least
    ``min_rounds``.
    ``min_seconds``: length of a turn, for entries too short for the clock or slow with cold caches.
    ``settle_seconds``: pause before each turn. OpenMP threads busy-wait for more work (up to 0.2 s
    with Intel's), and those of the previous entry would take the cores.
    """

    rounds: int = 10
    min_rounds: int = 3
    min_seconds: float = 0.2
    settle_seconds: float = 0.25
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.min_rounds < 1:
            raise UsageError(f"there must be at least 1 round, got {self.rounds} (at least {self.min_rounds})")
        for name in ("min_seconds", "settle_seconds", "budget_seconds"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class Times:
    """Raw times of an entry. ``seconds``: per call, one figure per round (the mean of the turn's ``calls``).
    ``first_seconds``: the very first call, which includes one-time work."""

    seconds: tuple[float, ...]
    calls: int
    first_seconds: float

    @property
    def median(self) -> float:
        """Median of ``seconds``."""
        return float(np.median(self.seconds))

    @property
    def iqr(self) -> float:
        """Interquartile range of ``seconds``: the width of the middle half."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low)

    @property
    def mad(self) -> float:
        """Median absolute deviation of ``seconds`` from their median."""
        return float(np.median(np.abs(np.asarray(self.seconds) - self.median)))


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios over ``rounds`` rounds, with the bootstrap interval of that median; the interval is None
    for a single round, which cannot be resampled."""

    median: float
    low: float | None
    high: float | None
    rounds: int

    def scaled(self, factor: float) -> Ratio:
        """The ratio in another unit."""
        low, high = (None if edge is None else edge * factor for edge in (self.low, self.high))
        return Ratio(self.median * factor, low, high, self.rounds)


@dataclass
class Measured:
    """Times of each entry, in the order passed, and the reason for each entry that failed, which has no times."""

    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def stopwatch(clock: Clock = time.perf_counter) -> Callable[[], float]:
    """Return a function that returns the seconds since this call."""
    start = clock()
    return lambda: clock() - start


def turn_of(
    call: Callable[[], object], *, sync: Callable[[], object] = lambda: None, clock: Clock = time.perf_counter
) -> Turn:
    """``call`` as a ``Turn`` in this process. ``sync``: waits until the device has finished, before the
    timer starts and before it stops."""

    def turn(calls: int) -> float:
        sync()
        start = clock()
        for _ in range(calls):
            call()
        sync()
        return clock() - start

    return turn


def order_of_round(names: Sequence[str], number: int) -> list[str]:
    """``names`` in the order of round ``number`` (from 0): each starts one further, every second one runs backwards."""
    shift = number % max(len(names), 1)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if number % 2 else turned


def interleave(
    entries: Mapping[str, Turn],
    plan: Plan,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    name: str = "rounds",
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Measured:
    """Time ``entries`` in turns. An entry that raises a ``CellsegError`` or ``MemoryError`` is left out from then on,
    with the reason, and the others continue.

    ``say`` is called for each round. The budget counts from the first round; warm-up is not included.
    ``progress`` keeps the times of whole rounds under ``name``; a signal ends the rounds, see ``Progress``.
    """
    progress = progress or Progress()
    measured = Measured()
    calls: dict[str, int] = {}
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {entry: [] for entry in entries}

    def attempt(entry: str, n: int) -> float | None:
        if plan.settle_seconds:
            sleep(plan.settle_seconds)
        try:
            return entries[entry](n)
        except (CellsegError, MemoryError) as error:
            measured.failed[entry] = str(error) or "out of memory"
            taken.pop(entry, None)
            return None

    done = 0
    with progress.stoppable(lambda: f"{name} {done + 1} to {plan.rounds}" if done < plan.rounds else ""):
        for entry in entries:
            cold = attempt(entry, 1)
            warm = None if cold is None else attempt(entry, 1)
            if cold is not None and warm is not None:
                first[entry], calls[entry] = cold, _calls_for(warm, plan.min_seconds)
        since = stopwatch(clock)
        budget = math.inf if plan.budget_seconds is None else plan.budget_seconds
        while done < plan.rounds and taken and (done < plan.min_rounds or since() < budget):
            of_round: dict[str, float] = {}
            for entry in order_of_round([entry for entry in entries if entry in taken], done):
                seconds = attempt(entry, calls[entry])
                if seconds is not None:
                    of_round[entry] = seconds / calls[entry]
            for entry, seconds in of_round.items():  # whole rounds only: entries are compared round by round
                taken[entry].append(seconds)
            done += 1
            progress.keep(name, {entry: Times(tuple(s), calls[entry], first[entry]) for entry, s in taken.items()})
            say(f"round {done} of {plan.rounds}, {since():.0f} s")
    whole = {entry: s[:done] for entry, s in taken.items()}
    measured.times = {entry: Times(tuple(s), calls[entry], first[entry]) for entry, s in whole.items() if s}
    measured.failed |= {entry: "stopped before its first round ended" for entry, s in whole.items() if not s}
    return measured


def ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Median over rounds of ``numerator[i] / denominator[i]``, with a percentile bootstrap interval (Efron 1979) of
    ``CONFIDENCE``. Raises ``UsageError`` unless both have the same number of rounds, at least one."""
    if len(numerator) != len(denominator) or len(numerator) == 0:
        raise UsageError(f"a ratio needs the same rounds of both entries, got {len(numerator)} and {len(denominator)}")
    paired = np.asarray(numerator, float) / np.asarray(denominator, float)
    median = float(np.median(paired))
    if len(paired) == 1:
        return Ratio(median, None, None, 1)
    drawn = np.random.default_rng(seed).integers(0, len(paired), (BOOTSTRAP_SAMPLES, len(paired)))
    edges = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    low, high = np.percentile(np.median(paired[drawn], axis=1), edges)
    return Ratio(median, float(low), float(high), len(paired))


def times_faster(slow: Times, fast: Times) -> Ratio:
    """How many times as fast ``fast`` is as ``slow``."""
    return ratio(slow.seconds, fast.seconds)


def _calls_for(seconds: float, min_seconds: float) -> int:
    """Calls of ``seconds`` each that fill a turn."""
    if seconds <= 0:
        return _MAX_CALLS if min_seconds > 0 else 1
    return min(_MAX_CALLS, max(1, math.ceil(min_seconds / seconds)))
