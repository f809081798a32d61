"""The whole service of a remote block, simulated: every program may die between any two calls, and no thread waits
for ever."""

from __future__ import annotations

import time

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_protocol.received_map import PLACING, RECEIVED
from postcopy_supervisor.events import Tick
from tests.simulated.effort import effort
from tests.simulated.supervisor import COUNT, Client, SimulatedService, content
from tests.simulated.wire import RIGHT

MOST_SLEEPERS = 5
which = st.integers(0, 7)
pages = st.integers(0, COUNT - 1)
moments = st.sampled_from(("before", "after"))


class History(RuleBasedStateMachine):
    """Clients, their workers, a custodian, a supervisor and a source."""

    service: SimulatedService

    @initialize(modes=st.lists(st.sampled_from(("private", "shared")), min_size=1, max_size=3), guarded=st.booleans())
    def serve(self, modes: list[str], guarded: bool) -> None:
        self.service = SimulatedService(modes, guarded=guarded)

    def _client(self, number: int) -> Client:
        return self.service.clients[number % len(self.service.clients)]

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(number=which, page=pages, write=st.booleans())
    def touch(self, number: int, page: int, write: bool) -> None:
        client = self._client(number)
        if client.space.alive and sum(thread.outcome is None for thread in client.threads) < MOST_SLEEPERS:
            self.service.touch(client, page, 7 if write else None)

    @rule(page=pages)
    def pollute(self, page: int) -> None:
        self.service.pollute(page)

    @precondition(lambda self: self.service.kernel.woken)
    @rule(number=which)
    def run_on(self, number: int) -> None:
        woken = self.service.kernel.woken
        self.service.kernel.run(woken[number % len(woken)])

    @precondition(lambda self: len(self.service.clients) > 1)
    @rule()
    def client_dies(self) -> None:
        client = self.service.clients[-1]
        if client.space.alive:
            self.service.kill_client(client)

    # --- programs -----------------------------------------------------------------------------------------------------

    @rule(number=which, calls=st.integers(1, 6))
    def work(self, number: int, calls: int) -> None:
        for _ in range(calls):
            life = self.service.busy(self._client(number))
            if life is not None:
                self.service.step(life)

    @rule(calls=st.integers(1, 8))
    def supervise(self, calls: int) -> None:
        for _ in range(calls):
            if self.service.supervisor is not None and self.service.supervisor.busy:
                self.service.step(self.service.supervisor.life)

    @rule(number=which, calls=st.integers(0, 4), when=moments, thread=st.integers(0, 1))
    def worker_dies(self, number: int, calls: int, when: str, thread: int) -> None:
        client = self._client(number)
        if client.served:
            self.work(number, max(1, calls))
            self.service.kill_worker(client, when, thread)

    @rule(number=which)
    def worker_succeeds(self, number: int) -> None:
        client = self._client(number)
        if client.space.alive and not client.served and self.service.custodian:
            self.service.start_worker(client)

    def _all_there(self) -> bool:
        """Any one of supervisor, custodian and source at a time."""
        return self.service.supervised and self.service.custodian and self.service.source.content is not None

    @precondition(lambda self: self._all_there())
    @rule(calls=st.integers(0, 6), when=moments, kept=st.integers(0, 3))
    def supervisor_dies(self, calls: int, when: str, kept: int) -> None:
        if calls:
            self.supervise(calls)
        self.service.kill_supervisor(when, kept)

    @precondition(lambda self: not self.service.supervised)
    @rule()
    def supervisor_recovers(self) -> None:
        self.service.start_supervisor()

    @precondition(lambda self: self._all_there())
    @rule()
    def custodian_dies(self) -> None:
        self.service.custodian = False

    @precondition(lambda self: self.service.supervised)
    @rule()
    def custodian_returns(self) -> None:
        self.service.custodian = True

    @precondition(lambda self: self._all_there())
    @rule(unread=st.booleans())
    def source_dies(self, unread: bool) -> None:
        self.service.source.stop()
        if unread:
            self.service.out.clear()

    @precondition(lambda self: self.service.source.content is None)
    @rule()
    def source_returns(self) -> None:
        self.service.source.start(RIGHT)

    @rule(room=st.sampled_from((0, 1, None)))
    def memory_is_short(self, room: int | None) -> None:
        self.service.memory.room = room

    # --- the wire, and time -------------------------------------------------------------------------------------------

    @rule(words=st.integers(1, 6), style=st.sampled_from(("whole", "whole", "pages", "first", "twice", "never")))
    def exchange(self, words: int, style: str) -> None:
        for _ in range(words):
            self.service.exchange(style)

    @precondition(lambda self: self.service.supervised)
    @rule(seconds=st.sampled_from((0.1, 0.3, 1.0)))
    def time_passes(self, seconds: float) -> None:
        self.service.skipped += seconds
        if self.service.supervisor is not None:
            self.service.supervisor.inbox.append(Tick(time.monotonic()))

    # --- invariants ---------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "service"):
            self.service.check()

    @rule()
    def rest(self) -> None:
        """Without a source threads wait, but never for a present page."""
        self.service.settle()
        self.service.check()
        self.service.check_rest()

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        try:
            self.service.custodian = True
            self.service.memory.room = None
            if not self.service.supervised:
                self.service.start_supervisor()
            if self.service.source.content is None:
                self.service.source.start(RIGHT)
            self.rest()
            assert not any(client.sleepers for client in self.service.clients)
        finally:
            self.service.end()


TestHistory = History.TestCase
TestHistory.settings = effort(60, 40)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_page_comes_from_the_source(mode: str) -> None:
    service = SimulatedService([mode])
    try:
        thread = service.touch(service.clients[0], 3)
        service.settle()
        service.check_rest()
        assert thread.outcome == content(3) and service.map[3] == RECEIVED
    finally:
        service.end()


def test_a_supervisor_that_dies_between_copy_and_mark() -> None:
    """The page was placed by this service, and the next supervisor gives it to its waiters."""
    service = SimulatedService(["private", "shared"])
    try:
        thread = service.touch(service.clients[0], 3)
        assert service.supervisor is not None
        for _ in range(400):
            if service.supervisor.life.at == "copy":
                break
            service._round()
        service.kill_supervisor("after", 0)
        assert bytes(service.map[3:4]) == bytes((PLACING,)) and 3 in service.memory.pages
        service.settle()
        assert not service.supervised and service.clients[0].sleepers == [3], "no supervisor is there to wake it"
        service.start_supervisor()
        service.settle()
        service.check_rest()
        assert thread.outcome == content(3)
        other = service.touch(service.clients[1], 3)
        service.settle()
        assert other.outcome == content(3)
    finally:
        service.end()


@pytest.mark.parametrize("style", ["whole", "pages"])
@pytest.mark.parametrize("room", [0, 1])
def test_no_memory_is_waited_for_by_its_waiter_alone(room: int, style: str) -> None:
    """The answer takes the fast or the slow path, alone or with its window; the supervisor handles other messages
    meanwhile."""
    service = SimulatedService(["private", "shared"])
    first, second = service.clients
    try:
        assert service.supervisor is not None
        done = service.touch(first, 0)
        service.settle()
        service.memory.room = room
        short = [service.touch(first, 3), service.touch(second, 3), service.touch(second, 4)]
        while service.busy(first) or service.busy(second) or service.supervisor.busy or service.exchange(style):
            service._round()
        service.settle()
        service.check()
        service.check_rest()
        assert len(service.memory.pages) == 1 + room and len(first.sleepers + second.sleepers) == 3 - (2 if room else 0)
        assert PLACING not in service.map[:COUNT], "what is not there is missing"
        again = service.touch(second, 0)
        service.settle()
        assert again.outcome == done.outcome == content(0)
        assert service.events.count("no-memory") == 1
        service.memory.room = None
        service.settle()
        service.check_rest()
        assert [thread.outcome for thread in short] == [content(3), content(3), content(4)]
        assert service.supervisor.paging.engine.idle and not service.supervisor.link.flow.waiting
    finally:
        service.end()


def test_the_successor_has_the_requests_of_waiters_for_a_lost_source() -> None:
    service = SimulatedService(["private", "shared"])
    try:
        service.settle()
        service.source.stop()
        threads = [service.touch(client, 5) for client in service.clients]
        service.settle()
        service.check_rest()
        service.kill_supervisor("before", 0)
        service.start_supervisor()
        service.settle()
        service.check_rest()
        assert service.supervisor is not None and service.supervisor.paging.engine.waiters_of(1, 5) == [1, 2]
        service.source.start(RIGHT)
        service.settle()
        assert [thread.outcome for thread in threads] == [content(5)] * 2
    finally:
        service.end()
