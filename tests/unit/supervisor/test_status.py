"""The status in steps: what changes between two of them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from postcopy_protocol import counters, stages
from postcopy_supervisor.clients.attach_server import Client
from postcopy_supervisor.observe.status import AT_ONCE, Census, Steps, listed

BLOCK = 1


def client(number: int, faults: int) -> Client:
    """One with so many faults of 5 us, each placed in as many."""
    made: Any = Client(number, None, 0, 100 + number, -1, SimpleNamespace(name="", kind="native"), 0.0)  # type: ignore[arg-type]
    made.figures = memoryview(bytearray(stages.END))
    made.words = made.figures[: counters.PAGE_BYTES].cast("Q")
    made.words[counters.PLAIN] = made.words[counters.bucket(5000)] = faults
    made.stages(BLOCK)[counters.bucket(5000) + stages.PLACED] = faults
    made.regions = [SimpleNamespace(block=BLOCK, mode="private")]
    return made  # type: ignore[no-any-return]


class Place:
    """A reception with clients of 1, 2, 3 ... faults, and a census of it."""

    def __init__(self, count: int) -> None:
        clients = {number: client(number, number) for number in range(1, count + 1)}
        past = {BLOCK: stages.scratch()}
        self.reception: Any = cast(Any, SimpleNamespace(clients=clients, past=counters.merge(()), past_stages=past))
        fleet: Any = SimpleNamespace(fleet=SimpleNamespace(slots={}), pid=lambda number: None)
        block: Any = SimpleNamespace(number=BLOCK, name="ram0")
        self.census = Census(self.reception, fleet, [block], set())

    def leaves(self, number: int) -> None:
        """As AttachServer does it."""
        gone, reception = self.reception.clients.pop(number), self.reception
        reception.past = counters.merge((reception.past, gone.words))
        reception.past_stages[BLOCK] = stages.merged((reception.past_stages[BLOCK], gone.stages(BLOCK)))

    def rest(self, steps: Steps) -> list[int]:
        """Numbers of the clients that are told of. Whatever happened meanwhile, nothing is lost or counted twice."""
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


def test_a_client_that_leaves_before_its_turn_is_not_told_of_and_counts() -> None:
    place = Place(3)
    steps = place.census.take()
    next(steps)
    place.leaves(2)
    assert place.rest(steps) == [1, 3]


def test_a_client_that_leaves_after_its_turn_counts_once() -> None:
    place = Place(3)
    steps = place.census.take()
    for _ in range(3):
        next(steps)
    place.leaves(1)
    assert place.rest(steps) == [1, 2, 3]


def test_a_client_that_comes_meanwhile_is_for_the_next_one() -> None:
    place = Place(3)
    steps = place.census.take()
    next(steps)
    place.reception.clients[4] = client(4, 9)
    assert place.rest(steps) == [1, 2, 3]


def test_a_list_is_made_some_items_at_a_time() -> None:
    items = [{"number": number} for number in range(2 * AT_ONCE + 1)]
    made, steps = finished(listed(items))
    assert json.loads(made) == items and steps == 3
    assert finished(listed([])) == ("[]", 0)
