"""The status in steps: what changes between two of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from postcopy_protocol import counters, stages
from postcopy_supervisor.clients.client import Client, Clients
from postcopy_supervisor.observe.status import AT_ONCE, Census, Steps, listed
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.waits import Waits

BLOCK = 1


def client(number: int, faults: int) -> Client:
    """One with so many faults of 5 us, each placed in as many."""
    made: Any = Client(number, None, 0, 100 + number, -1, SimpleNamespace(name="", kind="native"), 0.0)  # type: ignore[arg-type]
    made.figures = memoryview(bytearray(stages.END))
    made.counters = made.figures[: counters.PAGE_BYTES].cast("Q")
    made.counters[counters.PLAIN] = made.counters[counters.bucket(5000)] = faults
    made.stages(BLOCK)[counters.bucket(5000) + stages.PLACED] = faults
    made.regions = [SimpleNamespace(block=BLOCK, mode="private")]
    return made  # type: ignore[no-any-return]


class Bench:
    """Clients of 1, 2, 3 ... faults, and a census of them."""

    def __init__(self, count: int) -> None:
        self.clients = Clients((BLOCK,), cast(Any, SimpleNamespace(drop=lambda key: None)))
        self.clients.by_number |= {number: client(number, number) for number in range(1, count + 1)}
        pool: Any = SimpleNamespace(slots={}, pid=lambda number: None, restarts_of=lambda number: 0)
        block: Any = SimpleNamespace(number=BLOCK, name="ram0")
        waits = Waits({}, self.clients, Engine())
        self.census = Census(self.clients, pool, waits, [block], set())

    def leaves(self, number: int) -> None:
        self.clients.drop(self.clients.by_number[number])

    def rest(self, steps: Steps) -> list[int]:
        """Numbers of the clients in the list. No figure is lost or counted twice."""
        told, everything = json.loads(finished(steps)[0]), 1 + 2 + 3
        assert counters.faults(self.census.total) == counters.count(self.census.total) == everything
        assert sum(self.census.stages[BLOCK]) == everything
        return [one["id"] for one in told]


def finished(steps: Steps) -> tuple[str, int]:
    """What they make, and how many there were."""
    count = 0
    try:
        while True:
            next(steps)
            count += 1
    except StopIteration as done:
        return done.value, count


def test_a_client_that_leaves_before_its_turn_is_not_listed_and_counts() -> None:
    bench = Bench(3)
    steps = bench.census.take()
    next(steps)
    bench.leaves(2)
    assert bench.rest(steps) == [1, 3]


def test_a_client_that_leaves_after_its_turn_counts_once() -> None:
    bench = Bench(3)
    steps = bench.census.take()
    for _ in range(3):
        next(steps)
    bench.leaves(1)
    assert bench.rest(steps) == [1, 2, 3]


def test_a_client_that_comes_meanwhile_is_for_the_next_one() -> None:
    bench = Bench(3)
    steps = bench.census.take()
    next(steps)
    bench.clients.by_number[4] = client(4, 9)
    assert bench.rest(steps) == [1, 2, 3]


def test_a_list_is_made_some_items_at_a_time() -> None:
    items = [{"number": number} for number in range(2 * AT_ONCE + 1)]
    made, steps = finished(listed(items))
    assert json.loads(made) == items and steps == 3
    assert finished(listed([])) == ("[]", 0)
