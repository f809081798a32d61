"""The whole house of a remote block, simulated: everybody may die between any two calls, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_protocol.received import PLACING, RECEIVED
from tests.simulated.effort import effort
from tests.simulated.house import COUNT, Client, SimulatedHouse, content
from tests.simulated.wire import RIGHT

MOST_SLEEPERS = 5
which = st.integers(0, 7)
pages = st.integers(0, COUNT - 1)
moments = st.sampled_from(("before", "after"))


class History(RuleBasedStateMachine):
    """Clients, their workers, a custodian, a supervisor and a source."""

    house: SimulatedHouse

    @initialize(
        modes=st.lists(st.tuples(st.sampled_from(("private", "shared")), st.booleans()), min_size=1, max_size=3)
    )
    def serve(self, modes: list[tuple[str, bool]]) -> None:
        self.house = SimulatedHouse(modes)

    def _client(self, number: int) -> Client:
        return self.house.clients[number % len(self.house.clients)]

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(number=which, page=pages, write=st.booleans())
    def touch(self, number: int, page: int, write: bool) -> None:
        client = self._client(number)
        if client.space.alive and sum(thread.outcome is None for thread in client.threads) < MOST_SLEEPERS:
            self.house.touch(client, page, 7 if write else None)

    @precondition(lambda self: self.house.kernel.woken)
    @rule(number=which)
    def run_on(self, number: int) -> None:
        woken = self.house.kernel.woken
        self.house.kernel.run(woken[number % len(woken)])

    @precondition(lambda self: len(self.house.clients) > 1)
    @rule()
    def client_dies(self) -> None:
        client = self.house.clients[-1]
        if client.space.alive:
            self.house.kill_client(client)

    # --- programs -----------------------------------------------------------------------------------------------------

    @rule(number=which, calls=st.integers(1, 6))
    def work(self, number: int, calls: int) -> None:
        for _ in range(calls):
            life = self.house.busy(self._client(number))
            if life is not None:
                self.house.step(life)

    @rule(calls=st.integers(1, 8))
    def supervise(self, calls: int) -> None:
        for _ in range(calls):
            if self.house.supervisor is not None and self.house.supervisor.busy:
                self.house.step(self.house.supervisor.life)

    @rule(number=which, calls=st.integers(0, 4), when=moments, thread=st.integers(0, 1))
    def worker_dies(self, number: int, calls: int, when: str, thread: int) -> None:
        client = self._client(number)
        if client.served:
            self.work(number, max(1, calls))
            self.house.kill_worker(client, when, thread)

    @rule(number=which)
    def worker_succeeds(self, number: int) -> None:
        client = self._client(number)
        if client.space.alive and not client.served and self.house.custodian:
            self.house.start_worker(client)

    def _all_there(self) -> bool:
        """Any one of supervisor, custodian and source at a time."""
        return self.house.supervised and self.house.custodian and self.house.source.content is not None

    @precondition(lambda self: self._all_there())
    @rule(calls=st.integers(0, 6), when=moments, kept=st.integers(0, 3))
    def supervisor_dies(self, calls: int, when: str, kept: int) -> None:
        if calls:
            self.supervise(calls)
        self.house.kill_supervisor(when, kept)

    @precondition(lambda self: not self.house.supervised)
    @rule()
    def supervisor_recovers(self) -> None:
        self.house.start_supervisor()

    @precondition(lambda self: self._all_there())
    @rule()
    def custodian_dies(self) -> None:
        self.house.custodian = False

    @precondition(lambda self: self.house.supervised)
    @rule()
    def custodian_returns(self) -> None:
        self.house.custodian = True

    @precondition(lambda self: self._all_there())
    @rule(unread=st.booleans())
    def source_dies(self, unread: bool) -> None:
        self.house.source.stop()
        if unread:
            self.house.out.clear()

    @precondition(lambda self: self.house.source.content is None)
    @rule()
    def source_returns(self) -> None:
        self.house.source.start(RIGHT)

    @rule(room=st.sampled_from((0, 1, None)))
    def memory_is_short(self, room: int | None) -> None:
        self.house.memory.room = room

    # --- the wire, and time -------------------------------------------------------------------------------------------

    @rule(words=st.integers(1, 6), style=st.sampled_from(("whole", "whole", "pages", "first", "twice", "never")))
    def exchange(self, words: int, style: str) -> None:
        for _ in range(words):
            self.house.exchange(style)

    @precondition(lambda self: self.house.supervised)
    @rule(seconds=st.sampled_from((0.1, 0.3, 1.0)))
    def time_passes(self, seconds: float) -> None:
        self.house.skipped += seconds
        if self.house.supervisor is not None:
            self.house.supervisor.box.append(("tick", None))

    # --- the law ------------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "house"):
            self.house.check()

    @rule()
    def rest(self) -> None:
        """As things are: without a source people wait, but never for a page that is there."""
        self.house.settle()
        self.house.check()
        self.house.check_rest()

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        try:
            self.house.custodian = True
            self.house.memory.room = None
            if not self.house.supervised:
                self.house.start_supervisor()
            if self.house.source.content is None:
                self.house.source.start(RIGHT)
            self.rest()
            assert not any(client.sleepers for client in self.house.clients)
        finally:
            self.house.end()


TestHistory = History.TestCase
TestHistory.settings = effort(60, 40)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_page_comes_from_the_source(mode: str) -> None:
    house = SimulatedHouse([(mode, False)])
    try:
        thread = house.touch(house.clients[0], 3)
        house.settle()
        house.check_rest()
        assert thread.outcome == content(3) and house.map[3] == RECEIVED
    finally:
        house.end()


def test_a_supervisor_that_dies_between_copy_and_mark() -> None:
    """The page is ours, and whoever waits for it gets it from the next one."""
    house = SimulatedHouse([("private", False), ("shared", True)])
    try:
        thread = house.touch(house.clients[0], 3)
        assert house.supervisor is not None
        for _ in range(400):
            if house.supervisor.life.at == "copy":
                break
            house._round()
        house.kill_supervisor("after", 0)
        assert bytes(house.map[3:4]) == bytes((PLACING,)) and 3 in house.memory.pages
        house.settle()
        assert not house.supervised and house.clients[0].sleepers == [3], "nobody is there who could tell"
        house.start_supervisor()
        house.settle()
        house.check_rest()
        assert thread.outcome == content(3)
        other = house.touch(house.clients[1], 3)
        house.settle()
        assert other.outcome == content(3)
    finally:
        house.end()


@pytest.mark.parametrize("style", ["whole", "pages"])
@pytest.mark.parametrize("room", [0, 1])
def test_no_memory_is_waited_for_by_its_waiter_alone(room: int, style: str) -> None:
    """The answer comes by either road, alone or with its window; the supervisor hears everything else meanwhile."""
    house = SimulatedHouse([("private", False), ("shared", False)])
    first, second = house.clients
    try:
        assert house.supervisor is not None
        done = house.touch(first, 0)
        house.settle()
        house.memory.room = room
        short = [house.touch(first, 3), house.touch(second, 3), house.touch(second, 4)]
        while house.busy(first) or house.busy(second) or house.supervisor.busy or house.exchange(style):
            house._round()
        house.settle()
        house.check()
        house.check_rest()
        assert len(house.memory.pages) == 1 + room and len(first.sleepers + second.sleepers) == 3 - (2 if room else 0)
        assert PLACING not in house.map[:COUNT], "what is not there is missing"
        again = house.touch(second, 0)
        house.settle()
        assert again.outcome == done.outcome == content(0)
        assert house.events.count("no-memory") == 1
        house.memory.room = None
        house.settle()
        house.check_rest()
        assert [thread.outcome for thread in short] == [content(3), content(3), content(4)]
        assert house.supervisor.paging.engine.idle and not house.supervisor.link.flow.waiting
    finally:
        house.end()


def test_who_waits_for_a_source_stands_in_the_successors_book() -> None:
    house = SimulatedHouse([("private", False), ("shared", False)])
    try:
        house.settle()
        house.source.stop()
        threads = [house.touch(client, 5) for client in house.clients]
        house.settle()
        house.check_rest()
        house.kill_supervisor("before", 0)
        house.start_supervisor()
        house.settle()
        house.check_rest()
        assert house.supervisor is not None and house.supervisor.paging.engine.standing(1, 5) == [1, 2]
        house.source.start(RIGHT)
        house.settle()
        assert [thread.outcome for thread in threads] == [content(5)] * 2
    finally:
        house.end()
