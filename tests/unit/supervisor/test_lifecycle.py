"""The fleet's law: one life at a time, nobody forgotten, crashes forgiven up to a limit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postcopy_supervisor.pool.lifecycle import Effect, Fork, Gone, Kill, Lifecycle, Quarantine, Ready, RestartPolicy
from tests.simulated.effort import effort

POLICY = RestartPolicy(limit=3, interval=60.0, backoff=0.1, stable=10.0, start_deadline=20.0, longest_backoff=1.0)
which = st.integers(0, 99)


@dataclass
class Process:
    """A life as the machine knows it: its exit is told only when somebody says so."""

    worker: int
    incarnation: int
    stray: bool = False
    killed: bool = False


@dataclass
class Wanted:
    """What was asked of the fleet about one worker."""

    leaving: bool = False
    gone: bool = False
    ready: int = 0
    restarts: int = 0
    kills: int = 0
    lives: list[int] = field(default_factory=list)


class Workers(RuleBasedStateMachine):
    """The fleet beside a custodian, processes and a clock of its own."""

    policy = POLICY

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Lifecycle(self.policy)
        self.now = 100.0
        self.orders: list[Fork] = []
        self.alive: list[Process] = []
        self.wanted: dict[int, Wanted] = {}

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            wanted = self.wanted[effect.worker]
            match effect:
                case Fork(_, incarnation):
                    assert not wanted.gone
                    assert incarnation not in wanted.lives, "every life has a number of its own"
                    wanted.lives.append(incarnation)
                    rivals = [one for one in self.alive if one.worker == effect.worker]
                    assert all(one.stray and one.killed for one in rivals), "a successor beside its predecessor"
                    self.orders.append(effect)
                case Kill(worker, incarnation):
                    for one in self.alive:
                        if (one.worker, one.incarnation) == (worker, incarnation):
                            one.killed = True
                case Ready():
                    wanted.ready += 1
                case Gone():
                    assert wanted.leaving and not wanted.gone
                    assert all(one.stray for one in self.alive if one.worker == effect.worker)
                    wanted.gone = True
                case Quarantine():
                    assert wanted.restarts > POLICY.limit

    # --- wishes -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.wanted) < 3)
    @rule()
    def start(self) -> None:
        number = len(self.wanted)
        self.wanted[number] = Wanted()
        self._do(self.fleet.start(number, self.now))

    def _pick(self, number: int) -> int | None:
        here = [worker for worker, wanted in self.wanted.items() if not wanted.leaving]
        return here[number % len(here)] if here else None

    @rule(number=which)
    def renew(self, number: int) -> None:
        worker = self._pick(number)
        if worker is not None:
            self._do(self.fleet.renew(worker, self.now))

    @rule(number=which)
    def resume(self, number: int) -> None:
        worker = self._pick(number)
        if worker is not None and self.fleet.slots[worker].quarantined:
            self._do(self.fleet.resume(worker, self.now))
            assert not self.fleet.slots[worker].quarantined and not self.fleet.slots[worker].crashes

    @rule(number=which)
    def leave(self, number: int) -> None:
        worker = self._pick(number)
        if worker is not None:
            self.wanted[worker].leaving = True
            self._do(self.fleet.leave(worker, self.now))

    # --- news ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.orders)
    @rule(number=which)
    def fork(self, number: int) -> None:
        order = self.orders.pop(number % len(self.orders))
        slot = self.fleet.slots.get(order.worker)
        stray = slot is None or slot.incarnation != order.incarnation
        self.alive.append(Process(order.worker, order.incarnation, stray))
        self._do(self.fleet.forked(order.worker, order.incarnation, self.now))
        if stray:
            assert self.alive[-1].killed, "a stray lives on"

    @precondition(lambda self: self.orders)
    @rule(number=which)
    def fork_fails(self, number: int) -> None:
        order = self.orders.pop(number % len(self.orders))
        self._do(self.fleet.fork_failed(order.worker, order.incarnation, self.now))

    @precondition(lambda self: self.alive)
    @rule(number=which)
    def hello(self, number: int) -> None:
        one = self.alive[number % len(self.alive)]
        slot, wanted = self.fleet.slots.get(one.worker), self.wanted[one.worker]
        before = wanted.ready
        expected = slot is not None and slot.incarnation == one.incarnation and slot.state == "starting"
        self._do(self.fleet.hello(one.worker, one.incarnation, self.now))
        assert wanted.ready == before + expected, "a late word of an old life"

    @precondition(lambda self: self.alive)
    @rule(number=which)
    def exit(self, number: int) -> None:
        one = self.alive.pop(number % len(self.alive))
        self._crash(one.worker, one.incarnation)
        slot = self.fleet.slots.get(one.worker)
        others = slot is not None and one.stray and slot.state in ("starting", "running") and slot.incarnation
        self._do(self.fleet.exited(one.worker, one.incarnation, self.now))
        if others and slot is not None:
            # The stray may have read messages of the userfaultfd: whoever serves now must make room for another.
            assert slot.state == "ending", "a stray was there, and nobody wakes what it had read"

    def _crash(self, worker: int, incarnation: int) -> None:
        slot = self.fleet.slots.get(worker)
        if slot is not None and slot.incarnation == incarnation and slot.state != "ending":
            self.wanted[worker].restarts += 1

    @rule()
    def custodian_dies(self) -> None:
        self.orders.clear()
        self._do(self.fleet.custodian_lost(self.now))

    @rule(seconds=st.sampled_from((0.01, 0.5, 11.0, 21.0, 61.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._do(self.fleet.tick(self.now))

    # --- the law ------------------------------------------------------------------------------------------------------

    @invariant()
    def one_life_at_a_time(self) -> None:
        for worker in self.wanted:
            lives = [one for one in self.alive if one.worker == worker and not one.killed]
            assert len(lives) <= 1, f"{lives} read one userfaultfd"

    @invariant()
    def slots_are_those_that_are_wanted(self) -> None:
        assert set(self.fleet.slots) == {worker for worker, wanted in self.wanted.items() if not wanted.gone}
        assert self.fleet.restarts == sum(wanted.restarts for wanted in self.wanted.values())

    @invariant()
    def who_rests_is_quarantined(self) -> None:
        for slot in self.fleet.slots.values():
            assert slot.state != "resting" or (slot.quarantined and not self.policy.poison)

    def teardown(self) -> None:
        """After the dust settles every wanted worker runs, and no other; whoever rests is resumed first."""
        for _ in range(200):
            for slot in list(self.fleet.slots.values()):
                if slot.state == "resting":
                    self._do(self.fleet.resume(slot.worker, self.now))
            while self.orders:
                self.fork(0)
            for one in list(self.alive):
                if one.killed:
                    self.exit(self.alive.index(one))
            for at in range(len(self.alive)):
                self.hello(at)
            self.now += 0.5
            self._do(self.fleet.tick(self.now))
            settled = all(slot.state == "running" and slot.forked for slot in self.fleet.slots.values())
            if settled and not self.orders and not any(one.killed for one in self.alive):
                break
        assert all(slot.state == "running" and slot.forked for slot in self.fleet.slots.values())
        running = sorted((one.worker, one.incarnation) for one in self.alive)
        assert running == sorted((slot.worker, slot.incarnation) for slot in self.fleet.slots.values())
        assert set(self.fleet.slots) == {worker for worker, wanted in self.wanted.items() if not wanted.leaving}


class Resting(Workers):
    """Quarantine lets missing pages wait: no worker at all."""

    policy = replace(POLICY, poison=False)


TestWorkers = Workers.TestCase
TestWorkers.settings = effort(200, 50)
TestResting = Resting.TestCase
TestResting.settings = effort(100, 50)


def crash(fleet: Lifecycle, now: float, *, lived: float = 0.0) -> list[Effect]:
    """Fork, hello and exit of the worker 1 that is ordered now."""
    number = fleet.slots[1].incarnation
    fleet.forked(1, number, now)
    assert fleet.hello(1, number, now) == [Ready(1)]
    return fleet.exited(1, number, now + lived)


def test_the_first_crash_costs_no_time_and_the_next_ever_more() -> None:
    fleet = Lifecycle(POLICY)
    assert fleet.start(1, 0.0) == [Fork(1, 1)]
    assert fleet.next_due() is None
    assert crash(fleet, 0.0) == [Fork(1, 2)]
    waits = []
    for number in range(3, 7):
        assert Fork(1, number) not in crash(fleet, 1.0)
        due = fleet.next_due()
        assert due is not None
        waits.append(round(due - 1.0, 3))
        assert fleet.tick(due - 0.001) == []
        assert fleet.tick(due) == [Fork(1, number)]
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert crash(fleet, 1.0) == []
    assert fleet.next_due() == 1.0 + POLICY.longest_backoff


def test_a_long_life_forgives_what_was_before() -> None:
    fleet = Lifecycle(POLICY)
    fleet.start(1, 0.0)
    for _ in range(9):
        assert crash(fleet, 0.0, lived=POLICY.stable) == [Fork(1, fleet.slots[1].incarnation)]
    assert not fleet.slots[1].quarantined


def test_too_many_crashes_are_a_quarantine_told_once() -> None:
    fleet = Lifecycle(POLICY)
    fleet.start(1, 0.0)
    told = []
    for _ in range(POLICY.limit + 3):
        told.append(Quarantine(1) in crash(fleet, 0.0))
        fleet.tick(5.0)
    assert told == [False] * POLICY.limit + [True, False, False]
    assert fleet.slots[1].shown_state == "quarantined"


def test_a_late_fork_is_a_stray_and_its_end_renews() -> None:
    fleet = Lifecycle(POLICY)
    fleet.start(1, 0.0)
    assert fleet.tick(POLICY.start_deadline + 1) == [Fork(1, 2)]
    assert fleet.forked(1, 1, 22.0) == [Kill(1, 1)]
    assert fleet.hello(1, 1, 22.0) == []
    fleet.forked(1, 2, 22.0)
    assert fleet.hello(1, 2, 22.0) == [Ready(1)]
    assert fleet.exited(1, 1, 23.0) == [Kill(1, 2)]
    assert fleet.exited(1, 2, 23.0) == [Fork(1, 3)]
    assert fleet.slots[1].strays == 0


def test_a_crowd_waits_for_its_custodian_not_for_a_deadline() -> None:
    fleet = Lifecycle(POLICY)
    for worker in range(1, 100):
        fleet.start(worker, 0.0)
    for worker in range(1, 90):  # one after another, the last long after the deadline of its order
        assert fleet.forked(worker, 1, float(worker)) == []
        assert fleet.tick(float(worker)) == [], "neither ordered twice nor killed at birth"
        assert fleet.hello(worker, 1, float(worker)) == [Ready(worker)]
    silence = 89.0 + POLICY.start_deadline
    assert fleet.tick(silence) == []
    assert fleet.tick(silence + 1) == [Fork(worker, 2) for worker in range(90, 100)]


def test_how_long_the_custodian_has_answered_nothing() -> None:
    fleet = Lifecycle(POLICY)
    assert fleet.unanswered(5.0) == 0.0
    fleet.start(1, 5.0)
    fleet.start(2, 6.0)
    assert fleet.unanswered(8.0) == 3.0
    fleet.forked(1, 1, 8.0)
    assert fleet.unanswered(8.5) == 0.5
    fleet.fork_failed(2, 1, 9.0)
    assert fleet.unanswered(20.0) == 0.0


def test_a_worker_that_says_nothing_is_killed_and_tried_again() -> None:
    fleet = Lifecycle(POLICY)
    fleet.start(1, 0.0)
    fleet.forked(1, 1, 0.0)
    assert fleet.tick(POLICY.start_deadline + 1) == [Kill(1, 1)]
    assert fleet.exited(1, 1, 22.0) == [Fork(1, 2)]


@pytest.mark.parametrize("wish", ["renew", "leave"])
def test_what_is_ordered_but_not_yet_forked_ends_when_it_comes(wish: str) -> None:
    fleet = Lifecycle(POLICY)
    fleet.start(1, 0.0)
    assert getattr(fleet, wish)(1, 0.0) == []
    assert fleet.hello(1, 1, 0.0) == []
    assert fleet.forked(1, 1, 0.0) == [Kill(1, 1)]
    assert fleet.exited(1, 1, 0.0) == ([Fork(1, 2)] if wish == "renew" else [Gone(1)])


def test_a_quarantine_that_waits_runs_nothing_until_it_is_resumed() -> None:
    fleet = Lifecycle(replace(POLICY, poison=False))
    effects, now = fleet.start(1, 0.0), 0.0
    while not fleet.slots[1].quarantined:
        effects, now = crash(fleet, now), now + 0.1
        effects += fleet.tick(now + POLICY.longest_backoff)
    assert effects == [Quarantine(1), Ready(1)], "whoever waits to be attached is answered"
    assert fleet.tick(now + 1000) == [] and fleet.next_due() is None
    assert fleet.renew(1, now) == [Ready(1)]
    number = fleet.slots[1].incarnation
    assert fleet.resume(1, now) == [Fork(1, number + 1)]
    assert fleet.slots[1].shown_state == "restarting"
    fleet.forked(1, number + 1, now)
    assert fleet.hello(1, number + 1, now) == [Ready(1)] and fleet.slots[1].shown_state == "running"
    assert fleet.exited(1, number + 1, now) == [Fork(1, number + 2)], "its crashes are forgiven"


def test_who_rests_may_leave() -> None:
    fleet = Lifecycle(RestartPolicy(limit=0, poison=False))
    fleet.start(1, 0.0)
    fleet.forked(1, 1, 0.0)
    assert fleet.exited(1, 1, 0.0) == [Quarantine(1), Ready(1)]
    assert fleet.leave(1, 0.0) == [Gone(1)] and not fleet.slots


def test_a_machine_that_cannot_fork_is_waited_for_and_nobody_is_quarantined() -> None:
    fleet = Lifecycle(POLICY)
    effects, now = fleet.start(1, 0.0), 0.0
    waits = []
    for number in range(1, 40):
        assert effects == [Fork(1, number)]
        assert fleet.fork_failed(1, number, now) == []
        due = fleet.next_due()
        assert due is not None and fleet.tick(due - 0.001) == []
        waits.append(due - now)
        now = due
        effects = fleet.tick(now)
    assert waits == sorted(waits) and waits[-1] == POLICY.longest_backoff
    assert not fleet.slots[1].quarantined and fleet.restarts == 0
    fleet.forked(1, 40, now)
    assert fleet.hello(1, 40, now) == [Ready(1)]
    assert fleet.fork_failed(1, 40, now) == [], "it is there: a word of the past"
