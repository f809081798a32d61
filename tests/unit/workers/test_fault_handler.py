"""The real fault handler on the simulated kernel: whole histories, and what each answer of the kernel leads to."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_protocol import counters
from postcopy_protocol.received_map import LEASED, LOST, MISSING, PLACING, RECEIVED, TRUST, WATCHED
from postcopy_workers.client_ufd import ClientGone
from postcopy_workers.fault_handler import CannotContinue
from postcopy_workers.fault_loop import TIMED
from postcopy_workers.placing import Calls
from tests.simulated.effort import effort
from tests.simulated.kernel import POISON, SIGBUS, failure
from tests.simulated.world import EVENT, Client, Kind, World

PAGES = 12
MOST_SLEEPERS = 6  # more than BATCH threads asleep would keep an event unread for ever: the kernel gives faults first
pages = st.integers(0, PAGES - 1)
which = st.integers(0, 7)


def kinds(*modes: str) -> st.SearchStrategy[list[Kind]]:
    kind = st.builds(
        Kind,
        mode=st.sampled_from(modes),
        first=st.sampled_from((0, 0, 3)),
        end=st.sampled_from((0, 0, 9)),
        largest=st.sampled_from((8, 4, 1)),
        adaptive=st.booleans(),
    )
    return st.lists(kind, min_size=1, max_size=3)


class History(RuleBasedStateMachine):
    """Several clients and their workers; everything that may happen to them, between any two system calls."""

    world: World

    @initialize(
        kinds=st.one_of(kinds("private"), kinds("private", "shared")),
        kind=st.sampled_from(("file", "file", "handler")),
        short=st.sampled_from((0, 1000)),
        guarded=st.booleans(),
    )
    def serve(self, kinds: list[Kind], kind: str, short: int, guarded: bool) -> None:
        self.world = World([replace(kind, guarded=guarded) for kind in kinds], PAGES, kind=kind, short=short)
        for client in self.world.clients:
            self.world.live(client)

    def _client(self, number: int) -> Client:
        return self.world.clients[number % len(self.world.clients)]

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(number=which, page=pages, write=st.booleans(), token=st.integers(1, 127))
    def touch(self, number: int, page: int, write: bool, token: int) -> None:
        client = self._client(number)
        if self._may_touch(client):
            mine = client.pages
            self.world.touch(client, mine[page % len(mine)], token if write else None)

    @rule(number=which, page=pages, count=st.integers(2, 6))
    def read_in_order(self, number: int, page: int, count: int) -> None:
        client = self._client(number)
        for at in range(page, page + count):
            if self._may_touch(client) and at in client.pages:
                self.world.touch(client, at)
                self._settle_a_little(client)

    def _may_touch(self, client: Client) -> bool:
        going = sum(thread.outcome is None for thread in client.threads)
        return client.space.alive and going < MOST_SLEEPERS

    def _settle_a_little(self, client: Client) -> None:
        for _ in range(40):
            for thread in list(self.world.kernel.woken):
                self.world.kernel.run(thread)
            if not self.world.busy(client):
                return
            self.world.step(client)

    @precondition(lambda self: self.world.kernel.woken)
    @rule(number=which)
    def run_on(self, number: int) -> None:
        woken = self.world.kernel.woken
        self.world.kernel.run(woken[number % len(woken)])

    @rule(number=which)
    def signal(self, number: int) -> None:
        sleepers = self._client(number).sleepers
        if sleepers:
            self.world.kernel.signal(sleepers[0])

    @rule(number=which, page=pages)
    def split_a_mapping(self, number: int, page: int) -> None:
        client = self._client(number)
        if client.space.alive and page in client.pages:
            client.space.split(client.address(page))

    @rule(number=which)
    def event(self, number: int) -> None:
        client = self._client(number)
        if client.space.alive:
            client.userfaultfd.events.append(EVENT)

    @precondition(lambda self: len(self.world.clients) > 1)
    @rule()
    def die(self) -> None:
        self.world.kernel.die(self.world.clients[-1].space)

    # --- workers ------------------------------------------------------------------------------------------------------

    @rule(number=which, calls=st.integers(1, 6))
    def work(self, number: int, calls: int) -> None:
        client = self._client(number)
        for _ in range(calls):
            if self.world.busy(client):
                self.world.step(client)

    @rule(number=which, calls=st.integers(0, 4), when=st.sampled_from(("before", "after")))
    def kill(self, number: int, calls: int, when: str) -> None:
        client = self._client(number)
        if client.life is not None and not client.life.over:
            self.work(number, calls)
            self.world.kill(client, when)

    @rule(number=which)
    def succeed(self, number: int) -> None:
        client = self._client(number)
        if client.space.alive and client.life is not None and client.life.over:
            self.world.live(client)

    @rule(number=which, ends=st.booleans())
    def quarantine(self, number: int, ends: bool) -> None:
        """The next lives of a client's worker have no source; or have one again, and heal what was denied."""
        client, number = self._client(number), number % len(self.world.clients)
        if client.life is not None and not client.life.over:
            self.world.kill(client, "before")
        self.world.quarantined.discard(number) if ends else self.world.quarantined.add(number)

    # --- the service and strangers ------------------------------------------------------------------------------------

    @rule(page=pages)
    def punch(self, page: int) -> None:
        self.world.punch(page)

    @rule(page=pages)
    def pollute(self, page: int) -> None:
        self.world.pollute(page)

    @rule(room=st.sampled_from((0, 1, None)))
    def room(self, room: int | None) -> None:
        self.world.memory.room = room

    @rule(limit=st.sampled_from((0, 4096, 3 * 4096, 1 << 30)))
    def limit_windows(self, limit: int) -> None:
        self.world.service[0] = limit

    @precondition(lambda self: self.world.map[PAGES + TRUST] == LEASED)
    @rule()
    def give_up_the_lease(self) -> None:
        self.world.map[PAGES + TRUST] = WATCHED

    @rule(page=pages, how=st.sampled_from(("lost", "failing", "mended")))
    def trouble_in_the_function(self, page: int, how: str) -> None:
        function = self.world.function
        function.lost.discard(page)
        function.failing.discard(page)
        if how != "mended":
            (function.lost if how == "lost" else function.failing).add(page)
            self.world.hopeless.add(page)

    @precondition(lambda self: self.world.grant.kind == "file" and not self.world.source.changed)
    @rule(size=st.integers(1, PAGES * 4096), rewritten=st.booleans(), noticed=st.booleans(), rare=st.integers(0, 3))
    def change_the_file(self, size: int, rewritten: bool, noticed: bool, rare: int) -> None:
        """Between two faults: what a worker looks at and what it copies are two calls, and no law can join them."""
        if rare or any(self.world.busy(client) for client in self.world.clients):
            return
        # What was written to without a change of size is seen by the next look at its time, within a second.
        cut_to = None if rewritten else min(size, self.world.source.file.size - 1)
        self.world.change_the_file(cut_to, noticed=noticed or rewritten)

    # --- the law ------------------------------------------------------------------------------------------------------

    @rule()
    def rest(self) -> None:
        self.world.memory.room = None
        self.world.settle()
        self.world.check_rest()
        self.world.check_healed()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.rest()
                self.world.check()
            finally:
                self.world.end()


TestHistory = History.TestCase
TestHistory.settings = effort(150)


# --- single answers ---------------------------------------------------------------------------------------------------

EACH = [Kind("private"), Kind("shared"), Kind("private", guarded=True), Kind("shared", guarded=True)]
Make = Callable[..., World]


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(*kinds, ...)``: a world whose workers have started and idle."""
    worlds: list[World] = []

    def made(*kinds: Kind, pages: int = PAGES, kind: str = "file") -> World:
        worlds.append(World(list(kinds), pages, kind=kind))
        worlds[-1].settle()
        return worlds[-1]

    yield made
    for world in worlds:
        world.end()


def touched(world: World, client: Client, page: int, write: int | None = None) -> bytes | str | None:
    """The outcome of a touch once everybody has run; None: it still waits."""
    thread = world.touch(client, page, write)
    world.settle()
    return thread.outcome


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_a_page_comes_whole_and_the_next_client_needs_no_fault(make: Make, kind: Kind) -> None:
    world = make(kind, kind)
    assert touched(world, world.clients[0], 4) == world.source.page(4)
    assert world.map[4] == RECEIVED
    thread = world.touch(world.clients[1], 4)
    assert (thread.faults, thread.flags) == ((1, 4) if kind.guarded else (0, 0))
    world.settle()
    assert thread.outcome == world.source.page(4)


def test_several_threads_on_one_page_are_woken_by_one_answer(make: Make) -> None:
    world = make(Kind("private"))
    client = world.clients[0]
    threads = [world.touch(client, 2, write) for write in (None, 7, None)]
    world.settle()
    assert all(thread.outcome for thread in threads)
    assert client.words[counters.DEDUPLICATED] == 2
    assert counters.placed(client.words) == 1


def test_in_order_is_placed_in_windows_that_skip_what_is_there_and_end_with_the_region(make: Make) -> None:
    world = make(Kind("private", end=10, largest=8))
    client = world.clients[0]
    assert touched(world, client, 6)
    for page in range(4):
        assert touched(world, client, page) == world.source.page(page)
    faults = sum(thread.faults for thread in client.threads)
    assert faults == 4, "6, 0 and 1 are faults, 2 comes with 1, 3 is a fault and brings more"
    assert touched(world, client, 7) and touched(world, client, 8)
    assert [page for page in range(PAGES) if page in world.memory.pages] == list(range(10))
    assert bytes(world.map[10:12]) == bytes((MISSING, MISSING))


def test_no_more_of_the_windows_is_used_than_was_placed(make: Make) -> None:
    world = make(Kind("private"), Kind("private"))
    for page in (9, 8, 6, 5, 4, 2):  # so that there is little left to place in the other's windows
        assert touched(world, world.clients[0], page)
    for page in range(PAGES):
        assert touched(world, world.clients[1], page)
    words = world.clients[1].words
    assert 0 < words[counters.AROUND_USED] <= words[counters.AROUND]


def test_a_window_over_a_split_mapping_is_placed_through_the_own_mapping(make: Make) -> None:
    world = make(Kind("shared", adaptive=False))
    client = world.clients[0]
    client.space.split(client.address(3))
    assert touched(world, client, 0)
    assert set(range(8)) <= set(world.memory.pages)


def test_no_window_where_memory_is_scarce(make: Make) -> None:
    world = make(Kind("private", adaptive=False))
    world.service[counters.WINDOW_LIMIT] = 0
    assert touched(world, world.clients[0], 0)
    assert set(world.memory.pages) == {0}


def test_what_a_dead_worker_had_read_is_found_by_its_successor(make: Make) -> None:
    world = make(Kind("private"))
    client = world.clients[0]
    thread = world.touch(client, 1)
    world.kill(client, "after")  # it had just read the message
    assert client.userfaultfd.read == [thread]
    world.settle()
    assert thread.outcome == world.source.page(1)
    assert thread.faults == 2


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_an_event_that_comes_between_a_fault_and_its_answer_delays_it_only(make: Make, kind: Kind) -> None:
    world = make(kind)
    client = world.clients[0]
    thread = world.touch(client, 1)
    world.step(client)  # the fault is read, the event is not
    client.userfaultfd.events.append(EVENT)
    world.settle()
    assert thread.outcome == world.source.page(1)
    assert [kind for kind, *_ in world.reports] == ["foreign-event"]


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_an_event_that_ends_where_a_page_begins_does_not_hide_its_fault(make: Make, kind: Kind) -> None:
    """REMOVE has the end of its range where a fault has its address; both may come in one read."""
    world = make(kind)
    client = world.clients[0]
    thread = world.touch(client, 1)
    [(event, flags, address)] = world.kernel.messages(client.descriptor, 16)
    words = memoryview(bytearray(64)).cast("Q")
    words[0], words[1], words[2] = EVENT[0], address - 4096, address
    words[4], words[5], words[6] = event, flags, address
    kernel = world.kernel
    calls = Calls(kernel.ioctl, kernel.lseek, kernel.pread, kernel.pwrite, lockf=lambda *_: None)
    world.fault_handler(client, calls).messages(words, 2)
    world.settle()
    assert thread.outcome == world.source.page(1)


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_a_placed_page_without_its_mark_is_ours(make: Make, kind: Kind) -> None:
    world = make(kind)
    client = world.clients[0]
    thread = world.touch(client, 1)
    assert client.life is not None
    while client.life.at != "copy":
        world.step(client)
    world.kill(client, "after")
    assert world.map[1] == PLACING and 1 in world.memory.pages
    world.settle()
    assert thread.outcome == world.source.page(1)
    assert world.reported("polluted") == []


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_common_faults_are_counted_each_and_timed_now_and_then(make: Make, mode: str) -> None:
    """Never more latencies than faults; a successor goes on in the count of its predecessor."""
    count = 2 * TIMED + 3
    world = make(Kind(mode), pages=count)
    client = world.clients[0]
    for done, page in enumerate(reversed(range(count)), 1):  # backwards: nothing comes with a window
        assert touched(world, client, page)
        assert client.words[counters.PLAIN] == counters.faults(client.words) == done
        assert counters.count(client.words) == 1 + (done - 1) // TIMED * TIMED
        if done == TIMED // 2:
            world.kill(client, "before")
            world.settle()


def test_who_is_timed_does_not_fall_in_with_a_loop_over_a_few_arrays() -> None:
    assert all({at * TIMED % arrays for at in range(arrays)} == set(range(arrays)) for arrays in range(2, TIMED))


def test_a_punched_page_is_withdrawn_and_placed_anew(make: Make) -> None:
    world = make(Kind("private"), Kind("shared"))
    for client in world.clients:
        touched(world, client, 3)
        world.punch(3)
        assert touched(world, client, 3) == world.source.page(3)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_page_without_source_is_sigbus_never_zeros(make: Make, mode: str) -> None:
    world = make(Kind(mode), Kind("private"))
    world.change_the_file(5 * 4096 + 100)
    for client in world.clients:
        assert touched(world, client, 5) == SIGBUS
    assert world.map[5] == LOST and 5 not in world.memory.pages
    assert world.reported("source-changed") == [5]  # the second client's worker knew


def test_a_source_that_cannot_be_read_loses_that_page_only(make: Make) -> None:
    world = make(Kind("shared"))
    world.source.unreadable.add(2)
    assert touched(world, world.clients[0], 2) == SIGBUS
    assert touched(world, world.clients[0], 3) == world.source.page(3)
    assert world.reported("lost") == [2]


def test_a_failing_handler_is_asked_again_for_another_client(make: Make) -> None:
    world = make(Kind("private"), Kind("private"), kind="handler")
    world.function.failing.add(2)
    world.hopeless.add(2)
    assert touched(world, world.clients[0], 2) == SIGBUS
    assert world.map[2] != LOST
    world.function.failing.clear()
    assert touched(world, world.clients[1], 2) == world.source.page(2)


def test_a_handler_that_fails_when_another_worker_was_in_time_does_no_harm(make: Make) -> None:
    world = make(Kind("private"), Kind("private"), kind="handler")
    threads = [world.touch(client, 2) for client in world.clients]
    for client in world.clients:
        world.step(client)
        assert client.life is not None and client.life.at == "copy"
    world.kill(world.clients[0], "after")  # placed, not marked
    world.function.failing.add(2)  # so nobody can compare it with its source
    world.settle()
    assert [thread.outcome for thread in threads] == [world.source.page(2)] * 2


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_what_a_quarantined_client_was_denied_is_healed_when_it_is_resumed(make: Make, kind: Kind) -> None:
    world = make(kind, kind)
    client, other = world.clients
    world.quarantined.add(0)
    world.kill(client, "before")
    assert [touched(world, client, page) for page in (2, 3)] == [SIGBUS, SIGBUS]
    assert touched(world, other, 3) == world.source.page(3), "others can have it"
    assert touched(world, client, 4, 7) == SIGBUS and 4 not in world.memory.pages
    assert list(world.map[2:5]) == [MISSING, RECEIVED, MISSING]
    world.kill(client, "before")
    assert touched(world, client, 2) == SIGBUS, "a successor in quarantine heals nothing"
    world.quarantined.clear()
    world.kill(client, "before")
    world.settle()
    assert [touched(world, client, page) for page in (2, 3, 4)] == [world.source.page(page) for page in (2, 3, 4)]
    assert counters.denied(client.words) == []


def test_what_cannot_be_had_stays_denied(make: Make) -> None:
    world = make(Kind("private"))
    (client,) = world.clients
    world.quarantined.add(0)
    world.kill(client, "before")
    assert touched(world, client, 2) == SIGBUS
    world.source.unreadable.add(2)
    world.quarantined.clear()
    world.kill(client, "before")
    world.settle()
    assert touched(world, client, 2) == SIGBUS
    world.source.unreadable.clear()
    world.kill(client, "before")
    world.settle()
    assert touched(world, client, 2) == world.source.page(2)


def test_whoever_waits_at_a_page_that_is_poisoned_already_is_woken(make: Make) -> None:
    world = make(Kind("private"))
    client = world.clients[0]
    world.change_the_file(4096)
    thread = world.touch(client, 2)
    client.space.table[client.address(2)] = POISON  # by the supervisor, which has not woken anybody yet
    world.settle()
    assert thread.outcome == SIGBUS


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("kind", ["file", "handler"])
def test_no_client_of_a_guarded_block_is_shown_a_strangers_page(make: Make, mode: str, kind: str) -> None:
    world = make(Kind(mode, guarded=True, adaptive=False), kind=kind)
    world.pollute(2)
    for page in range(4):  # page 2 is in the window of page 0
        assert touched(world, world.clients[0], page) == world.source.page(page)
    assert world.reported("polluted") == [2]


def test_a_page_that_a_stranger_makes_just_before_our_copy(make: Make) -> None:
    """It is present and marked PLACING: our own interrupted work looks the same, also to a successor."""
    world = make(Kind("private", guarded=True), Kind("shared", guarded=True))
    client = world.clients[0]
    world.touch(client, 2)
    while world.map[2] != PLACING:
        world.step(client)
    world.pollute(2)
    world.kill(client, "before")
    assert touched(world, world.clients[1], 2) == world.source.page(2)


def test_what_a_shared_client_wrote_survives_a_slow_worker(make: Make) -> None:
    """Two workers find the same strange page. The slower one must not write over what a client has stored since."""
    world = make(Kind("shared", guarded=True), Kind("shared", guarded=True))
    slow, fast = world.clients
    world.pollute(2)
    world.touch(slow, 2)
    assert slow.life is not None
    while slow.life.at != "pwrite":
        world.step(slow)
    thread = world.touch(fast, 2, 77)
    for _ in range(20):
        world.step(fast)
    assert thread.outcome is None, "it waits for its turn"
    world.settle()
    assert touched(world, slow, 2) == bytes((77,)) + world.source.page(2)[1:]


def test_what_a_shared_client_wrote_survives_a_worker_that_believed_the_page_missing(make: Make) -> None:
    world = make(Kind("shared", guarded=True), Kind("shared", guarded=True))
    slow, fast = world.clients
    world.touch(slow, 2)
    assert slow.life is not None
    while slow.life.at != "lock":  # between its look at the mark and its turn
        world.step(slow)
    world.pollute(2)
    thread = world.touch(fast, 2, 77)
    while thread.outcome is None:
        world.step(fast)
        for woken in list(world.kernel.woken):
            world.kernel.run(woken)
    assert touched(world, slow, 2) == bytes((77,)) + world.source.page(2)[1:]


def test_a_strangers_page_that_nothing_can_replace_is_sigbus(make: Make) -> None:
    world = make(Kind("private", guarded=True), Kind("shared", guarded=True))
    world.pollute(2)
    world.change_the_file(100)
    assert [touched(world, client, 2) for client in world.clients] == [SIGBUS, SIGBUS]
    assert world.map[2] in (MISSING, PLACING)


def test_no_memory_is_waited_for_ever_longer_and_told_once(make: Make) -> None:
    world = make(Kind("private"))
    client = world.clients[0]
    world.memory.room = 0
    thread = world.touch(client, 1)
    while len(world.paused) < 12:
        if thread in world.kernel.woken:
            world.kernel.run(thread)
        world.step(client)
    assert world.reported("no-memory") == [1]
    assert world.paused[:3] == [0.01, 0.02, 0.04] and world.paused[-1] == 1.0
    world.memory.room = None
    world.settle()
    assert thread.outcome == world.source.page(1)


def test_an_empty_pool_of_huge_pages_is_no_present_page() -> None:
    world = World([Kind("private"), Kind("shared")], 3, page_size=2 << 20)
    try:
        world.settle()
        world.memory.room = 0
        thread = world.touch(world.clients[0], 1)
        while not world.paused:
            world.step(world.clients[0])
        assert world.map[1] == PLACING
        world.memory.room = None
        world.settle()
        assert thread.outcome == world.source.page(1)
        assert touched(world, world.clients[1], 1) == world.source.page(1)
        assert world.reported("no-memory") == [1]
    finally:
        world.end()


def test_a_dead_client_ends_its_worker(make: Make) -> None:
    world = make(Kind("shared"), Kind("private"))
    client = world.clients[0]
    world.touch(client, 1)
    world.step(client)
    world.kernel.die(client.space)
    world.step(client)
    while client.life is not None and not client.life.over:
        world.step(client)
    assert client.life is not None and isinstance(client.life.end, ClientGone)


def test_a_stale_region_is_told_once_and_its_waiters_see_for_themselves(make: Make) -> None:
    world = make(Kind("shared"))
    client = world.clients[0]
    threads = [world.touch(client, page) for page in (1, 2)]
    client.space.areas[0].registered = None
    world.memory.pages.update({1: world.source.page(1), 2: world.source.page(2)})
    world.polluted |= {1, 2}
    world.settle()
    assert all(thread.outcome for thread in threads)
    assert world.reported("stale-region") == [1]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_an_answer_that_nobody_provoked_ends_the_worker(code: int) -> None:
    world = World([Kind("private")])
    client = world.clients[0]

    def ioctl(descriptor: int, request: int, buffer: bytearray) -> int:
        raise failure(code)

    handler = world.fault_handler(client, Calls(ioctl, world.kernel.lseek, world.kernel.pread, world.kernel.pwrite))
    world.touch(client, 1)
    with pytest.raises(CannotContinue):
        handler.message(*world.kernel.messages(client.descriptor, 1)[0])


def test_a_fault_outside_every_region_is_told_and_left_alone(make: Make) -> None:
    world = make(Kind("private", end=4))
    client = world.clients[0]
    client.space.areas[0].end += 4096
    thread = world.touch(client, 4)
    world.settle()
    assert thread.outcome is None and [kind for kind, *_ in world.reports] == ["outside"]


@pytest.mark.parametrize("kind", [Kind("private"), Kind("private", guarded=True), Kind("shared", guarded=True)])
def test_without_memory_in_the_cgroup_pages_that_it_would_pay_for_wait(make: Make, kind: Kind) -> None:
    """Until the supervisor has memory again, or has not said for some seconds that it has none."""
    world = make(kind)
    client = world.clients[0]
    world.service[counters.HELD_UNTIL_NS] = 1 << 62
    thread = world.touch(client, 3)
    while len(world.paused) < 5:
        if thread in world.kernel.woken:
            world.kernel.run(thread)
        world.step(client)
    assert thread.outcome is None and 3 not in world.memory.pages
    world.service[counters.HELD_UNTIL_NS] = 1
    world.settle()
    assert thread.outcome == world.source.page(3)


def test_a_shared_client_pays_itself_and_does_not_wait(make: Make) -> None:
    world = make(Kind("shared"))
    world.service[counters.HELD_UNTIL_NS] = 1 << 62
    assert touched(world, world.clients[0], 3) == world.source.page(3)
    assert world.paused == []
