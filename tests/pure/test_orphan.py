"""The law of a custodian without a supervisor, with simulated time."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postcopy_workers.orphan import (
    FIRST_WAIT,
    LONGEST_WAIT,
    STABLE_SECONDS,
    Drop,
    Fork,
    Kill,
    Orphan,
    Say,
    State,
)


def house(*clients: int, remote: bool = False, timeout: float = 60.0, poison: bool = False) -> Orphan:
    """Clients with a worker each, and worker zero, all in their first life."""
    law = Orphan()
    law.told(timeout, poison)
    law.ordered(0, 1, remote=False)
    law.forked(0, 1, 0.0)
    for client in clients:
        law.kept(client, wanted=True)
        law.ordered(client, 1, remote)
        law.forked(client, 1, 0.0)
    return law


def is_in(law: Orphan, state: State) -> bool:
    return law.state is state


def test_with_a_supervisor_it_does_nothing() -> None:
    law = house(1)
    assert law.exited(1, 1, False, 5.0) == []
    assert law.tick(1e6) == [] and law.next_due() is None


def test_worker_zero_ends_and_the_others_go_on() -> None:
    law = house(1, 2)
    assert law.lost(10.0) == [Kill(0)]
    assert law.exited(0, 1, False, 10.1) == []
    assert law.tick(10.2) == []
    assert law.next_due() == 70.0


def test_a_dead_worker_is_replaced_after_a_moment() -> None:
    law = house(1, 2)
    law.lost(10.0)
    assert law.exited(2, 1, False, 11.0) == []
    assert law.next_due() == 11.0 + FIRST_WAIT
    assert law.tick(11.0) == []
    assert law.tick(11.0 + FIRST_WAIT) == [Fork(2, 2, poison=False)]
    assert law.tick(11.1) == [], "once"


def test_one_that_dies_again_and_again_waits_ever_longer() -> None:
    law, now, waits = house(1), 10.0, []
    law.lost(now)
    for incarnation in range(1, 10):
        law.exited(1, incarnation, False, now)
        due = law.next_due()
        assert due is not None
        waits.append(round(due - now, 6))
        assert law.tick(due) == [Fork(1, incarnation + 1, poison=False)]
        law.forked(1, incarnation + 1, due)
        now = due
    assert waits[:4] == [0.02, 0.04, 0.08, 0.16] and waits[-1] == LONGEST_WAIT
    later = now + STABLE_SECONDS + 1
    law.exited(1, 10, False, later)
    assert law.next_due() == later + FIRST_WAIT


def test_one_that_died_before_the_supervisor_did_is_replaced() -> None:
    law = house(1)
    law.exited(1, 1, False, 9.0)
    law.lost(10.0)
    assert law.tick(10.0 + FIRST_WAIT) == [Fork(1, 2, poison=False)]


def test_a_client_without_regions_needs_no_worker() -> None:
    law = house(1)
    law.kept(1, wanted=False)
    law.exited(1, 1, False, 9.0)
    law.lost(10.0)
    assert law.tick(20.0) == []


def test_two_lives_of_one_worker_end_both_before_there_is_a_third() -> None:
    law = house(1)
    law.ordered(1, 2, remote=False)
    law.forked(1, 2, 9.0)
    assert Kill(1) in law.lost(10.0)
    law.exited(1, 1, False, 10.1)
    assert law.tick(12.0) == [], "the other lives"
    law.exited(1, 2, False, 12.0)
    assert law.tick(13.0) == [Fork(1, 3, poison=False)]


@pytest.mark.parametrize("how", ["pidfd", "worker"])
def test_a_client_that_ends_is_dropped_and_not_given_a_worker(how: str) -> None:
    law = house(1, 2)
    law.lost(10.0)
    effects = law.client_ended(1) if how == "pidfd" else law.exited(1, 1, True, 11.0)
    assert effects == [Drop(1)]
    assert law.client_ended(1) == [], "once"
    if how == "pidfd":
        assert law.exited(1, 1, False, 11.0) == []
    assert law.tick(20.0) == []


def test_it_waits_for_a_successor_though_nobody_is_left() -> None:
    law = house(1)
    law.lost(10.0)
    law.client_ended(1)
    law.tick(69.9)
    assert is_in(law, State.ORPHANED)
    assert law.tick(70.0) == [Kill(0), Kill(1)], "whoever of them still lives"
    assert is_in(law, State.DISMISSED)


def test_it_ends_with_the_last_client_when_the_time_is_over() -> None:
    law = house(1, 2, timeout=0.0)
    law.lost(10.0)
    law.tick(10.0)
    law.client_ended(1)
    law.tick(500.0)
    assert is_in(law, State.ORPHANED)
    law.client_ended(2)
    law.tick(500.0)
    assert is_in(law, State.DISMISSED)


def test_remote_pages_wait_on() -> None:
    law = house(1, remote=True)
    law.lost(10.0)
    (said,) = law.tick(70.0)
    assert isinstance(said, Say) and "wait on in 1 clients" in said.text and "60 s" in said.text
    assert law.tick(80.0) == [] and law.next_due() is None
    law.exited(1, 1, False, 90.0)
    assert law.tick(91.0) == [Fork(1, 2, poison=False)]


def test_or_are_poisoned_by_a_successor_of_each_worker_that_asks_for_them() -> None:
    law = house(1, remote=True, poison=True)
    law.kept(2, wanted=True)
    law.ordered(2, 1, remote=False)
    law.forked(2, 1, 0.0)
    law.lost(10.0)
    said, kill = law.tick(70.0)
    assert isinstance(said, Say) and kill == Kill(1)
    assert law.tick(70.0) == []
    law.exited(1, 1, False, 70.1)
    assert law.tick(70.1 + FIRST_WAIT) == [Fork(1, 2, poison=True)]
    law.exited(2, 1, False, 71.0)
    assert law.tick(72.0) == [Fork(2, 2, poison=False)], "all its pages are here"


def test_whoever_takes_over_finds_no_worker_that_poisons() -> None:
    law = house(1, 2, remote=True, poison=True)
    law.lost(10.0)
    law.tick(70.0)
    law.exited(1, 1, False, 70.1)
    law.tick(71.0)
    law.forked(1, 2, 71.0)
    assert law.taken() == [Kill(1)]
    law.heard()
    law.ordered(1, 3, remote=True)
    law.exited(1, 2, False, 72.0)
    law.forked(1, 3, 72.0)
    law.lost(80.0)
    assert law.next_due() == 140.0, "the time begins anew"


def test_half_a_take_over_changes_nothing() -> None:
    law = house(1)
    law.lost(10.0)
    law.exited(1, 1, False, 20.0)
    law.taken()
    assert law.tick(30.0) == [], "the supervisor's business"
    law.lost(31.0)
    assert law.tick(31.0 + FIRST_WAIT) == [Fork(1, 2, poison=False)]
    law.forked(1, 2, 31.1)
    assert law.next_due() == 70.0, "the time since the loss goes on"


def test_dismissed_it_replaces_nobody() -> None:
    law = house(1)
    law.dismissed()
    assert law.lost(10.0) == []
    assert law.exited(1, 1, False, 11.0) == [] and law.tick(100.0) == []


class Deputies(RuleBasedStateMachine):
    """Supervisors that come and go at any moment, workers and clients that die: what the effects add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.law = Orphan()
        self.now = 0.0
        self.lives: dict[int, set[int]] = {}
        self.clients: set[int] = set()
        self.next = 1

    def do(self, effects: list[object]) -> None:
        for effect in effects:
            match effect:
                case Fork(worker, incarnation):
                    assert worker in self.clients, "for nobody"
                    assert not self.lives[worker], "two lives would read one userfaultfd"
                    self.born(worker, incarnation)
                case Kill(worker):
                    for incarnation in sorted(self.lives[worker]):
                        self.dies(worker, incarnation, False)
                case Drop(worker):
                    self.clients.discard(worker)

    def born(self, worker: int, incarnation: int) -> None:
        assert incarnation not in self.lives[worker]
        self.lives[worker].add(incarnation)
        self.law.forked(worker, incarnation, self.now)

    def dies(self, worker: int, incarnation: int, client_gone: bool) -> None:
        self.lives[worker].discard(incarnation)
        self.do([*self.law.exited(worker, incarnation, client_gone, self.now)])

    @rule(remote=st.booleans())
    @precondition(lambda self: self.law.state is State.SERVED)
    def comes(self, remote: bool) -> None:
        worker, self.next = self.next, self.next + 1
        self.clients.add(worker)
        self.lives[worker] = set()
        self.law.heard()
        self.law.kept(worker, wanted=True)
        self.law.ordered(worker, 1, remote)
        self.born(worker, 1)

    @rule(data=st.data(), gone=st.booleans())
    @precondition(lambda self: any(self.lives.values()))
    def worker_dies(self, data: st.DataObject, gone: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(w for w, lives in self.lives.items() if lives)))
        self.dies(worker, max(self.lives[worker]), gone)

    @rule(data=st.data())
    @precondition(lambda self: self.law.state is State.ORPHANED and self.clients)
    def client_dies(self, data: st.DataObject) -> None:
        self.do([*self.law.client_ended(data.draw(st.sampled_from(sorted(self.clients))))])

    @rule()
    @precondition(lambda self: self.law.state is State.SERVED)
    def supervisor_dies(self) -> None:
        self.do([*self.law.lost(self.now)])

    @rule(whole=st.booleans())
    @precondition(lambda self: self.law.state is State.ORPHANED)
    def another_comes(self, whole: bool) -> None:
        self.do([*self.law.taken()])
        if whole:
            self.law.heard()

    @rule(timeout=st.sampled_from([0.0, 1.0, 60.0]), poison=st.booleans())
    @precondition(lambda self: self.law.state is State.SERVED)
    def told(self, timeout: float, poison: bool) -> None:
        self.law.heard()
        self.law.told(timeout, poison)

    @rule(seconds=st.sampled_from([0.001, 0.05, 2.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do([*self.law.tick(self.now)])

    @invariant()
    def nobody_is_forgotten(self) -> None:
        """Orphaned, whoever lives has a worker, or will have one in a second at most."""
        if self.law.state is not State.ORPHANED:
            return
        due = self.law.next_due()
        for client in self.clients:
            assert self.lives[client] or (due is not None and due <= self.now + LONGEST_WAIT), client


TestDeputies = Deputies.TestCase
