"""The policy of a custodian without a supervisor, with simulated time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Assignment, BlockGrant, ClientNote, RegionGrant
from postcopy_workers.standby import (
    FIRST_WAIT,
    LONGEST_WAIT,
    STABLE_SECONDS,
    Drop,
    Effect,
    Fork,
    Kill,
    Log,
    StandbyPolicy,
    asks_remote,
    client_of,
    wants_worker,
    without_remote,
)


def service(*clients: int, remote: bool = False, timeout: float = 60.0, poison: bool = False) -> StandbyPolicy:
    """Clients with a worker each, and worker zero, all in their first life; the supervisor is lost at 10 s."""
    policy = StandbyPolicy(10.0, timeout, poison)
    for client in clients:
        policy.add_client(client, 1, wanted=True, remote=remote)
        policy.add_life(client, 1, 0.0, poisoned=False)
    policy.add_life(0, 1, 0.0, poisoned=False)
    assert policy.begin(10.0) == [Kill(0)]
    return policy


def test_worker_zero_ends_and_the_others_go_on() -> None:
    policy = service(1, 2)
    assert policy.exited(0, 1, False, 10.1) == []
    assert policy.tick(10.2) == []
    assert policy.next_due() == 70.0


def test_a_dead_worker_is_replaced_after_a_moment() -> None:
    policy = service(1, 2)
    assert policy.exited(2, 1, False, 11.0) == []
    assert policy.next_due() == 11.0 + FIRST_WAIT
    assert policy.tick(11.0) == []
    assert policy.tick(11.0 + FIRST_WAIT) == [Fork(2, 2, poison=False)]
    assert policy.tick(11.1) == [], "once"
    policy.fork_failed(2, 11.1)
    assert policy.tick(12.0) == [Fork(2, 3, poison=False)], "until it is done"


def test_one_that_dies_again_and_again_waits_ever_longer() -> None:
    policy, now, waits = service(1), 10.0, []
    for incarnation in range(1, 10):
        policy.exited(1, incarnation, False, now)
        due = policy.next_due()
        assert due is not None
        waits.append(round(due - now, 6))
        assert policy.tick(due) == [Fork(1, incarnation + 1, poison=False)]
        policy.forked(1, incarnation + 1, due)
        now = due
    assert waits[:4] == [0.02, 0.04, 0.08, 0.16] and waits[-1] == LONGEST_WAIT
    later = now + STABLE_SECONDS + 1
    policy.exited(1, 10, False, later)
    assert policy.next_due() == later + FIRST_WAIT


def test_one_that_died_before_the_supervisor_did_is_replaced() -> None:
    policy = StandbyPolicy(10.0, 60.0, poison=False)
    policy.add_client(1, 4, wanted=True, remote=False)
    policy.add_client(2, 1, wanted=False, remote=False)  # it has no regions
    assert policy.begin(10.0) == []
    assert policy.tick(10.0 + FIRST_WAIT) == [Fork(1, 5, poison=False)]


def test_two_lives_of_one_worker_end_both_before_there_is_a_third() -> None:
    policy = StandbyPolicy(10.0, 60.0, poison=False)
    policy.add_client(1, 1, wanted=True, remote=False)
    policy.add_life(1, 1, 0.0, poisoned=False)
    policy.add_life(1, 2, 9.0, poisoned=False)
    assert policy.begin(10.0) == [Kill(1)]
    policy.exited(1, 1, False, 10.1)
    assert policy.tick(12.0) == [], "the other lives"
    policy.exited(1, 2, False, 12.0)
    assert policy.tick(13.0) == [Fork(1, 3, poison=False)]


@pytest.mark.parametrize("how", ["pidfd", "worker"])
def test_a_client_that_ends_is_dropped_and_not_given_a_worker(how: str) -> None:
    policy = service(1, 2)
    effects = policy.client_ended(1) if how == "pidfd" else policy.exited(1, 1, True, 11.0)
    assert effects == [Drop(1)]
    assert policy.client_ended(1) == [], "once"
    if how == "pidfd":
        assert policy.exited(1, 1, False, 11.0) == []
    assert policy.tick(20.0) == []


def test_it_waits_for_a_successor_though_nobody_is_left() -> None:
    policy = service(1)
    policy.client_ended(1)
    assert policy.tick(69.9) == []
    assert not policy.ended
    assert policy.tick(70.0) == [Kill(1)], "if it still lives"
    assert policy.ended


def test_it_ends_with_the_last_client_when_the_time_is_over() -> None:
    policy = service(1, 2, timeout=0.0)
    for client in (1, 2):
        policy.tick(10.0)
        assert not policy.ended
        policy.client_ended(client)
    policy.tick(10.0)
    assert policy.ended


def test_remote_pages_wait_on() -> None:
    policy = service(1, remote=True)
    (said,) = policy.tick(70.0)
    assert isinstance(said, Log) and "wait on in 1 clients" in said.text and "60 s" in said.text
    assert policy.tick(80.0) == [] and policy.next_due() is None
    policy.exited(1, 1, False, 90.0)
    assert policy.tick(91.0) == [Fork(1, 2, poison=False)]


def test_or_are_poisoned_by_a_successor_of_each_worker_that_asks_for_them() -> None:
    policy = StandbyPolicy(10.0, 60.0, poison=True)
    for client in (1, 2):
        policy.add_client(client, 1, wanted=True, remote=client == 1)
        policy.add_life(client, 1, 0.0, poisoned=False)
    policy.begin(10.0)
    said, kill = policy.tick(70.0)
    assert isinstance(said, Log) and kill == Kill(1)
    assert policy.tick(70.0) == []
    policy.exited(1, 1, False, 70.1)
    assert policy.tick(70.1 + FIRST_WAIT) == [Fork(1, 2, poison=True)]
    policy.exited(2, 1, False, 71.0)
    assert policy.tick(72.0) == [Fork(2, 2, poison=False)], "all its pages are here"
    policy.forked(1, 2, 72.0)
    assert policy.taken() == [Kill(1)], "a supervisor finds no worker that poisons"


def test_after_half_a_take_over_workers_that_poison_go_on() -> None:
    policy = StandbyPolicy(10.0, 60.0, poison=True)
    policy.add_client(1, 3, wanted=True, remote=True)
    policy.add_life(1, 3, 71.0, poisoned=True)
    policy.begin(80.0)
    assert [type(effect) for effect in policy.tick(80.0)] == [Log]
    policy.exited(1, 3, False, 81.0)
    assert policy.tick(82.0) == [Fork(1, 4, poison=True)]


# --- what a custodian understands -------------------------------------------------------------------------------------

GRANT = BlockGrant(1, "ram0", 4096, 4096, 1, "remote", "", 4096, b"", 6, 7, -1)
REGION = RegionGrant(1, "private", 4096, 4096, 0)


def assignment(*kinds: str) -> Assignment:
    blocks = tuple(replace(GRANT, kind=kind) for kind in kinds)
    return Assignment(
        1, 1, "x", "ipc://x", 3, 4, 0, 5, 1, 2, 4096, False, "/", "off", -1, blocks, (REGION,), "native", -1
    )


def note(*, quarantined: bool = False, regions: tuple[RegionGrant, ...] = (REGION,)) -> bytes:
    return encode(ClientNote(1, "x", "native", 0, 5, quarantined, False, regions, ()))


def test_who_wants_a_worker() -> None:
    assert wants_worker(note(), assignment("file"))
    assert wants_worker(b"unreadable", assignment("file"))
    assert not wants_worker(note(regions=()), assignment("file"))
    assert not wants_worker(note(quarantined=True), assignment("file")), "it waits until an operator resumes it"
    assert wants_worker(note(quarantined=True), assignment("quarantined")), "one that poisons"


def test_without_remote_sources() -> None:
    told = assignment("file", "remote")
    assert asks_remote(told)
    poor = without_remote(told)
    assert [grant.kind for grant in poor.blocks] == ["file", "orphaned"] and not asks_remote(poor)


@pytest.mark.parametrize(
    ("key", "number"), [("client/7", 7), ("client/0", 0), ("client/", 0), ("house", 0), ("block/3", 0), ("client/x", 0)]
)
def test_whose_key_it_is(key: str, number: int) -> None:
    assert client_of(key) == number


class Deputy(RuleBasedStateMachine):
    """Workers and clients that die at any moment: what the effects add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 10.0
        self.lives: dict[int, set[int]] = {}
        self.clients: set[int] = set()

    @initialize(
        timeout=st.sampled_from([0.0, 1.0, 60.0]),
        poison=st.booleans(),
        wards=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=4),
    )
    def lost(self, timeout: float, poison: bool, wards: list[tuple[int, bool]]) -> None:
        self.policy = StandbyPolicy(self.now, timeout, poison)
        for client, (lives, remote) in enumerate(wards, 1):
            self.clients.add(client)
            self.lives[client] = set(range(1, lives + 1))
            self.policy.add_client(client, max(1, lives), wanted=True, remote=remote)
            for incarnation in self.lives[client]:
                self.policy.add_life(client, incarnation, 0.0, poisoned=False)
        self.do(self.policy.begin(self.now))

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Fork(worker, incarnation):
                    assert worker in self.clients, "for nobody"
                    assert not self.lives[worker], "two lives would read one userfaultfd"
                    self.lives[worker].add(incarnation)
                    self.policy.forked(worker, incarnation, self.now)
                case Kill(worker):
                    for incarnation in sorted(self.lives[worker]):
                        self.dies(worker, incarnation, False)
                case Drop(worker):
                    self.clients.remove(worker)

    def dies(self, worker: int, incarnation: int, client_gone: bool) -> None:
        self.lives[worker].discard(incarnation)
        self.do(self.policy.exited(worker, incarnation, client_gone, self.now))

    @rule(data=st.data(), gone=st.booleans())
    @precondition(lambda self: any(self.lives.values()))
    def worker_dies(self, data: st.DataObject, gone: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(w for w, lives in self.lives.items() if lives)))
        self.dies(worker, max(self.lives[worker]), gone)

    @rule(data=st.data())
    @precondition(lambda self: self.clients)
    def client_dies(self, data: st.DataObject) -> None:
        self.do(self.policy.client_ended(data.draw(st.sampled_from(sorted(self.clients)))))

    @rule(seconds=st.sampled_from([0.001, 0.05, 2.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.policy.tick(self.now))

    @invariant()
    def nobody_is_forgotten(self) -> None:
        """Whoever lives has a worker, or will have one in a second at most."""
        for client in self.clients:
            due = self.policy.next_due()
            assert self.lives[client] or (due is not None and due <= self.now + LONGEST_WAIT), client
        assert not (self.policy.ended and self.clients)


TestDeputy = Deputy.TestCase
