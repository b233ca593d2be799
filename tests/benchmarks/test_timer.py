"""The one stopwatch: order of rounds, length of turns, medians, ratios of paired rounds; and that there is no other."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cellseg_benchmarks.harness.timer import (
    Plan,
    Times,
    interleave,
    order_of_round,
    ratio,
    stopwatch,
    times_faster,
    turn_of,
)
from cellseg_deploy.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]
PLAN = Plan(rounds=4, min_seconds=0.0, settle_seconds=0.0)


class FakeClock:
    """A clock that work and pauses move on; nothing else does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def work(self, seconds: float | Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds() if callable(seconds) else seconds

        return call


def test_a_turn_is_timed_from_an_idle_device_to_an_idle_device() -> None:
    clock, log = FakeClock(), list[str]()

    def sync() -> None:
        log.append("sync")
        clock.now += (
            10 if len(log) > 1 else 100
        )  # what is left of earlier work does not count, what is left of ours does

    def call() -> None:
        log.append("call")
        clock.now += 1

    assert turn_of(call, sync=sync, clock=clock)(3) == 3 + 10
    assert log == ["sync", "call", "call", "call", "sync"]


def test_stopwatch() -> None:
    clock = FakeClock()
    clock.now = 5
    seconds = stopwatch(clock)
    clock.now = 7.5
    assert seconds() == 2.5
    clock.now = 8
    assert seconds() == 3


def test_no_entry_always_follows_the_same_one() -> None:
    names = ["a", "b", "c"]
    orders = [order_of_round(names, number) for number in range(6)]
    assert orders[:3] == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]
    assert all(sorted(order) == names for order in orders)
    followers = {(x, y) for order in orders for x, y in itertools.pairwise(order)}
    assert len(followers) == 6  # every ordered pair occurs
    assert order_of_round([], 3) == []


def test_rounds_are_interleaved_and_raw_times_are_kept() -> None:
    clock, log = FakeClock(), list[str]()

    def entry(name: str, seconds: float) -> Callable[[int], float]:
        def turn(calls: int) -> float:
            log.append(name)
            clock.now += calls * seconds
            return calls * seconds

        return turn

    told: list[str] = []
    measured = interleave(
        {"a": entry("a", 1.0), "b": entry("b", 2.0)}, PLAN, say=told.append, clock=clock, sleep=clock.sleep
    )
    assert "".join(log) == "aabb" + "ab" + "ab" + "ab" + "ab"  # first call and warm-up of each, then 4 rounds
    assert measured.times["a"] == Times((1.0,) * 4, 1, 1.0)
    assert measured.times["b"].seconds == (2.0,) * 4
    assert told[-1] == "round 4 of 4, 12 s"
    assert clock.pauses == []


def test_three_entries_take_turns_in_every_order() -> None:
    log: list[str] = []

    def entry(name: str) -> Callable[[int], float]:
        return lambda calls: log.append(name) or 1.0  # type: ignore[func-returns-value]

    interleave({name: entry(name) for name in "abc"}, PLAN, clock=FakeClock())
    assert "".join(log[6:]) == "abc" + "acb" + "cab" + "cba"


def test_short_calls_are_repeated_and_the_first_call_is_apart() -> None:
    clock = FakeClock()
    durations = iter([5.0, 0.03])  # the first call compiles
    turn = turn_of(clock.work(lambda: next(durations, 0.02)), clock=clock)
    measured = interleave(
        {"a": turn}, Plan(rounds=2, min_seconds=0.1, settle_seconds=0.25), clock=clock, sleep=clock.sleep
    )
    times = measured.times["a"]
    assert times.first_seconds == 5.0
    assert times.calls == 4  # ceil(0.1 / 0.03), from the warm-up
    assert times.seconds == pytest.approx((0.02, 0.02))
    assert clock.pauses == [0.25] * 4  # two for the warm-up, one a round


def test_a_clock_too_coarse_for_one_call() -> None:
    measured = interleave({"a": lambda calls: 0.0}, Plan(rounds=1, settle_seconds=0), clock=FakeClock())
    assert measured.times["a"].calls == 10_000


def test_the_budget_ends_the_rounds_but_not_before_the_least() -> None:
    clock = FakeClock()
    plan = Plan(rounds=10, min_rounds=3, min_seconds=0, settle_seconds=0, budget_seconds=4.5)
    slow = interleave({"a": turn_of(clock.work(2.0), clock=clock)}, plan, clock=clock)
    assert len(slow.times["a"].seconds) == 3
    fast = interleave({"a": turn_of(clock.work(1.0), clock=clock)}, plan, clock=clock)
    assert len(fast.times["a"].seconds) == 5
    assert len(interleave({"a": turn_of(clock.work(0.1), clock=clock)}, plan, clock=clock).times["a"].seconds) == 10


def test_an_entry_that_fails_is_left_out_and_the_others_go_on() -> None:
    count = {"late": 0}

    def late(calls: int) -> float:
        count["late"] += 1
        if count["late"] == 4:
            raise DataError("the network answered with NaN")
        return 1.0

    def never(calls: int) -> float:
        raise MemoryError

    measured = interleave({"late": late, "never": never, "good": lambda calls: 3.0}, PLAN, clock=FakeClock())
    assert list(measured.times) == ["good"]
    assert measured.times["good"].seconds == (3.0,) * 4
    assert measured.failed == {"never": "out of memory", "late": "the network answered with NaN"}
    assert count["late"] == 4


def test_an_error_of_ours_is_not_a_row() -> None:
    def broken(calls: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"a": broken}, PLAN, clock=FakeClock())


def test_median_and_spread() -> None:
    times = Times((1.0, 2.0, 3.0, 4.0, 100.0), 1, 9.0)
    assert times.median == 3
    assert times.iqr == 2  # 4 - 2
    assert times.mad == 1  # of 2, 1, 0, 1, 97


def test_a_ratio_is_of_paired_rounds() -> None:
    """A machine that is slower by half from round to round: the ratio is 2 in each, and so is the median."""
    fast = np.array([1.0, 1.5, 2.25, 3.4, 5.1])
    found = ratio(2 * fast, fast)
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 5)
    # Unpaired medians would give 3 / 2, and the mean of the ratios 2.01.
    mixed = ratio([1.0, 3.0, 9.0], [1.0, 2.0, 3.0])
    assert mixed.median == 1.5
    assert (mixed.low, mixed.high) == (1.0, 3.0)
    assert times_faster(Times((4.0, 4.0), 1, 4.0), Times((2.0, 1.0), 1, 2.0)).median == 3.0
    assert found.scaled(0.5).median == 1.0
    assert found.scaled(0.5).high == 1.0


def test_the_interval_narrows_with_rounds_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(3)
    noisy = 2 * rng.lognormal(0, 0.1, 200)
    few, many = ratio(noisy[:10], np.ones(10)), ratio(noisy, np.ones(200))
    assert few.low is not None
    assert few.high is not None
    assert many.low is not None
    assert many.high is not None
    assert few.low < few.median < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert many.low < 2 < many.high
    assert ratio(noisy[:10], np.ones(10)) == few


def test_what_cannot_be_a_ratio() -> None:
    alone = ratio([3.0], [2.0])
    assert (alone.median, alone.low, alone.high) == (1.5, None, None)
    assert alone.scaled(2) == type(alone)(3.0, None, None, 1)
    for a, b in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(UsageError, match="needs the same rounds of both"):
            ratio(a, b)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "at least 1 round"),
        ({"min_rounds": 0}, "at least 1 round"),
        ({"min_seconds": -1.0}, "min_seconds must not be negative"),
        ({"settle_seconds": math.nan}, "settle_seconds must not be negative"),
    ],
)
def test_plans_that_cannot_be_meant(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Plan(**settings)  # type: ignore[arg-type]


def test_no_other_module_of_the_benchmarks_reads_a_clock() -> None:
    clocks = {"perf_counter", "monotonic", "process_time", "thread_time", "perf_counter_ns", "time_ns"}
    found = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in clocks and path.name != "timer.py":
                found.append(f"{path.name}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found
