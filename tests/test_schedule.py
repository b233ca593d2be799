"""What is done next: admission, batches over several images, waiting, failures. No thread, no time."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cellseg_deploy.errors import DataError, ModelError, UsageError
from cellseg_deploy.schedule import Job, Look, Part, Schedule, Ticket


class Tiles:
    """A pass of so many tiles."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n


def make(sizes: list[int], *, batch: int = 4, nbytes: int = 1, **settings: Any) -> Schedule[Any]:
    """A schedule of jobs that would hold ``sizes`` tiles; the tests say when they come."""
    jobs = [Job(lambda: iter(()), lambda: nbytes) for _ in sizes]  # type: ignore[arg-type, return-value]
    return Schedule(jobs, batch=batch, **{"max_jobs": 100, "max_bytes": 100, **settings})


def admit(schedule: Schedule[Any], nbytes: int = 1) -> Ticket[Any] | None:
    """The next ticket, looking at its job first if that is asked for; None if none is let in."""
    task = schedule.next_task()
    if isinstance(task, Look):
        schedule.looked(nbytes)
        task = schedule.next_task()
    return None if isinstance(task, Look) else task


def shape(parts: list[Part[Any]]) -> list[tuple[int, int, int]]:
    return [(part.ticket.index, part.start, part.stop) for part in parts]


def finish(schedule: Schedule[Any], parts: list[Part[Any]]) -> None:
    schedule.computed()
    for part in parts:
        schedule.answered(part)


@pytest.mark.parametrize(
    ("sizes", "batch", "expected"),
    [
        ([1, 1, 1, 1], 4, [[(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1)]]),
        ([10], 4, [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 10)]]),
        ([3, 3, 1], 4, [[(0, 0, 3), (1, 0, 1)], [(1, 1, 3), (2, 0, 1)]]),
        ([2, 5], 1, [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)], [(1, 1, 2)], [(1, 2, 3)], [(1, 3, 4)], [(1, 4, 5)]]),
    ],
)
def test_batches_run_over_the_borders_of_images(
    sizes: list[int], batch: int, expected: list[list[tuple[int, int, int]]]
) -> None:
    schedule = make(sizes, batch=batch)
    tickets = [admit(schedule) for _ in sizes]
    for ticket, size in zip(tickets, sizes, strict=True):
        schedule.needs_network(ticket, Tiles(size))
    batches = []
    while parts := schedule.next_batch():
        batches.append(shape(parts))
        finish(schedule, parts)
    assert batches == expected
    assert [schedule.next_task() for _ in sizes] == tickets


def test_the_oldest_image_comes_first_whenever_it_arrives() -> None:
    schedule = make([3, 3, 3])
    first, second, third = (admit(schedule) for _ in range(3))
    schedule.needs_network(third, Tiles(3))
    schedule.needs_network(second, Tiles(3))
    schedule.needs_network(first, Tiles(3))
    assert shape(schedule.next_batch()) == [(0, 0, 3), (1, 0, 1)]


def test_while_the_engine_works_only_full_batches_are_made() -> None:
    schedule = make([9, 2])
    first, second = admit(schedule), admit(schedule)
    schedule.needs_network(first, Tiles(9))
    one, two = schedule.next_batch(), schedule.next_batch()
    assert schedule.next_batch() == []
    schedule.needs_network(second, Tiles(2))
    finish(schedule, one)
    assert schedule.next_batch() == []
    finish(schedule, two)
    assert shape(schedule.next_batch()) == [(0, 8, 9), (1, 0, 2)]


def test_a_fixed_batch_is_put_off_while_tiles_may_still_come() -> None:
    schedule = make([2, 2, 1], batch=4, step=4)
    first, second, third = (admit(schedule) for _ in range(3))
    schedule.needs_network(first, Tiles(2))
    assert schedule.should_wait()
    assert schedule.next_batch() == []
    assert shape(schedule.next_batch(patient=False)) == [(0, 0, 2)]
    schedule.computed()
    schedule.needs_network(second, Tiles(2))
    assert schedule.should_wait()
    schedule.ended(third)  # it failed: nothing will come of it
    assert not schedule.should_wait()
    assert shape(schedule.next_batch()) == [(1, 0, 2)]


def test_a_batch_is_whole_steps_where_it_can_be() -> None:
    schedule = make([7, 1], batch=8, step=3)
    assert schedule.batch == 9
    first, _ = admit(schedule), admit(schedule)
    schedule.needs_network(first, Tiles(7))
    parts = schedule.next_batch()
    assert shape(parts) == [(0, 0, 6)]
    finish(schedule, parts)
    assert schedule.should_wait()


def test_at_most_so_many_at_a_time_in_order_until_released() -> None:
    schedule = make([1] * 5, max_jobs=2)
    first, second = admit(schedule), admit(schedule)
    assert (first.index, second.index) == (0, 1)
    assert admit(schedule) is None
    schedule.ended(second)
    schedule.ended(first)
    assert admit(schedule) is None  # their results wait to be taken
    schedule.release(0)
    assert admit(schedule).index == 2
    assert schedule.peak.jobs == 2
    assert {ticket.index for ticket in schedule.unfinished()} == {1, 2}


def test_bytes_are_bounded_and_a_giant_goes_alone() -> None:
    schedule = make([1] * 4, max_bytes=100)
    assert admit(schedule, 60).index == 0
    assert admit(schedule, 500) is None
    schedule.release(0)
    assert admit(schedule).index == 1
    assert admit(schedule, 1) is None  # not beside the giant
    schedule.release(1)
    assert admit(schedule).index == 2
    assert admit(schedule, 99).index == 3
    assert schedule.peak.nbytes == 500


def test_one_look_at_a_time() -> None:
    schedule = make([1, 1])
    assert isinstance(schedule.next_task(), Look)
    assert schedule.next_task() is None
    schedule.looked(1)
    assert isinstance(schedule.next_task(), Ticket)


def test_nothing_is_decoded_far_ahead_of_the_engine() -> None:
    schedule = make([100, 1], batch=4)
    first = admit(schedule)
    schedule.needs_network(first, Tiles(100))
    assert admit(schedule) is None
    while schedule.peak.tiles and shape(parts := schedule.next_batch())[0][2] < 92:
        finish(schedule, parts)
    assert admit(schedule).index == 1


def test_helpers_feed_a_hungry_engine_first_but_clear_a_backlog() -> None:
    schedule = make([1] * 6, batch=4, helpers=2)
    tickets = [admit(schedule) for _ in range(2)]
    schedule.needs_network(tickets[0], Tiles(1))
    finish(schedule, schedule.next_batch())
    assert admit(schedule).index == 2  # the engine has nothing: before the first one is labelled
    schedule.needs_network(tickets[1], Tiles(1))
    finish(schedule, schedule.next_batch())
    assert schedule.next_task() is tickets[0]  # two wait for two helpers


def test_an_error_of_an_image_frees_what_it_still_wanted() -> None:
    schedule = make([6, 2], batch=4)
    first, second = admit(schedule), admit(schedule)
    schedule.needs_network(first, Tiles(6))
    schedule.needs_network(second, Tiles(2))
    parts = schedule.next_batch()
    error = DataError("NaN")
    schedule.computed()
    schedule.failed(parts[0], error)
    assert shape(schedule.next_batch()) == [(1, 0, 2)]
    assert schedule.next_task() is first
    assert first.error is error
    assert second.error is None


def test_an_image_with_tiles_in_two_batches_is_not_resumed_twice() -> None:
    schedule = make([8], batch=4)
    ticket = admit(schedule)
    schedule.needs_network(ticket, Tiles(8))
    one, two = schedule.next_batch(), schedule.next_batch()
    schedule.failed(two[0], DataError("no"))
    assert schedule.next_task() is None
    schedule.answered(one[0])
    assert schedule.next_task() is ticket
    assert schedule.next_task() is None


def test_a_broken_engine_ends_all_that_need_it() -> None:
    schedule = make([6, 3, 1, 1], batch=4)
    tickets = [admit(schedule) for _ in range(3)]
    for ticket, size in zip(tickets, (6, 3), strict=False):
        schedule.needs_network(ticket, Tiles(size))
    parts = schedule.next_batch()
    error = ModelError("gone")
    schedule.breaks(error)
    schedule.failed(parts[0], error)
    schedule.computed()
    assert schedule.next_batch() == []
    schedule.needs_network(tickets[2], Tiles(1))
    resumed = [schedule.next_task() for _ in range(3)]
    assert resumed == tickets
    assert all(ticket.error is error for ticket in tickets)


@pytest.mark.parametrize("setting", ["batch", "step", "helpers", "max_jobs", "max_bytes"])
def test_settings_below_one_cannot_be_meant(setting: str) -> None:
    with pytest.raises(UsageError, match=setting):
        make([1], **{setting: 0})


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events_answers_every_tile_once(seed: int) -> None:
    """A random walk through the state machine: nothing is lost, doubled, or stuck."""
    chance = random.Random(seed)
    sizes = [chance.choice([1, 1, 2, 5, 17]) for _ in range(12)]
    limits = {"max_jobs": chance.randint(1, 6), "max_bytes": chance.randint(1, 9)}
    schedule = make(sizes, batch=chance.choice([1, 3, 4]), step=chance.choice([1, 2, 4]), helpers=2, **limits)
    seen = {index: [0] * size for index, size in enumerate(sizes)}
    working: list[Ticket[Any]] = []
    running: list[list[Part[Any]]] = []
    passes, ended = dict.fromkeys(seen, 0), set()
    for _ in range(10_000):
        if len(ended) == len(sizes):
            break
        moves = ["task"] * (len(working) < 2) + ["step"] * bool(working) + ["batch"] * (len(running) < 2)
        move = chance.choice(moves + ["answer"] * bool(running))
        if move == "task":
            task = schedule.next_task()
            if isinstance(task, Look):
                schedule.looked(chance.randint(0, 12))
            elif task is not None:
                working.append(task)
        elif move == "step":
            ticket = working.pop(chance.randrange(len(working)))
            if passes[ticket.index] < 2:  # two passes each
                passes[ticket.index] += 1
                schedule.needs_network(ticket, Tiles(sizes[ticket.index]))
            else:
                schedule.ended(ticket)
                schedule.release(ticket.index)
                ended.add(ticket.index)
        elif move == "batch":
            parts = schedule.next_batch(patient=chance.random() < 0.5)
            assert sum(map(len, parts)) <= schedule.batch
            running += [parts] if parts else []
        else:
            parts = running.pop(chance.randrange(len(running)))
            for part in parts:
                for tile in range(part.start, part.stop):
                    seen[part.ticket.index][tile] += 1
            finish(schedule, parts)
    assert ended == set(seen)
    assert all(count == 2 for counts in seen.values() for count in counts)
    assert schedule.peak.jobs <= limits["max_jobs"]
