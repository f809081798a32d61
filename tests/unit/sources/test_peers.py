"""Which host is asked for a chunk, how much is in flight, and the conversation with one host. No socket, no clock."""

from __future__ import annotations

import itertools
import select
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.caibx import SHA256
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.message import Message
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    RESIDENT,
    Advise,
    Advised,
    Listen,
    Pages,
    RangeKind,
    RequestRanges,
    SourceRefused,
    pack_ranges,
)
from postcopy_protocol.source_conversation import Offer, SourceConversation
from postcopy_protocol.sources import RemoteSource
from postcopy_sources.answering import NOT_RESIDENT, Answerer
from postcopy_sources.storage import pace, peers
from postcopy_sources.storage.pace import LARGEST_WINDOW, PERIOD, TARGET, Pace
from postcopy_sources.storage.peer_conversation import PIECE, PeerConversation
from postcopy_sources.storage.peer_policy import LONGEST_PAUSE, Outcome, PeerPolicy
from postcopy_wire.transport import SENT

PAGE = 4096
quick = settings(deadline=None, max_examples=60)


# --- which host -------------------------------------------------------------------------------------------------------


@quick
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.floats(0.001, 3.0), st.sampled_from(Outcome), st.booleans(), st.sets(st.integers(0, 3))),
        max_size=80,
    ),
)
def test_any_history_of_hosts(count: int, history: list[tuple[float, Outcome, bool, set[int]]]) -> None:
    """Never one that is tried or away; the nearest with room; what is in flight is counted; each comes back."""
    policy, now, in_flight = PeerPolicy(count), 0.0, list[tuple[int, float]]()
    for peer in policy.peers:
        peer.up = True
    for step, outcome, store_ready, tried in history:
        now += step
        number = policy.choose(tried, store_ready, now)
        well = [one for one, peer in enumerate(policy.peers) if one not in tried and peer.well(now)]
        with_room = [one for one in well if policy.peers[one].pace.room]
        if number is None:
            assert not with_room and (store_ready or not well)
        else:
            assert number in well and (not with_room or number == with_room[0])
            assert 0 < policy.sent(number) <= 2.0
            in_flight.append((number, now))
        if len(in_flight) > 6 or (in_flight and step > 1):
            one, sent = in_flight.pop(0)
            policy.ended(one, outcome, now - sent, now)
        for one, peer in enumerate(policy.peers):
            assert peer.pace.in_flight == sum(number == one for number, _ in in_flight)
            assert 1.0 <= peer.pace.window <= LARGEST_WINDOW and peer.away_until <= now + LONGEST_PAUSE
    for one, sent in in_flight:
        policy.ended(one, Outcome.LATE, now - sent, now)
    now += LONGEST_PAUSE
    assert policy.choose((), False, now) == 0
    assert set(itertools.takewhile(lambda one: one is not None, _all(policy, now))) == set(range(count))


def _all(policy: PeerPolicy, now: float) -> list[int | None]:
    tried: list[int] = []
    while (number := policy.choose(tried, True, now)) is not None:
        tried.append(number)
    return [*tried, None]


def test_a_host_that_is_late_is_left_out_and_comes_back() -> None:
    policy = PeerPolicy(2)
    for peer in policy.peers:
        peer.up = True
    pauses = list[float]()
    now = 0.0
    for _ in range(10):
        assert policy.choose((), True, now) == 0
        policy.sent(0)
        assert policy.choose((), True, now) == (0 if not pauses else 1), "one request at a time tries it"
        policy.ended(0, Outcome.LATE, 1.0, now)
        assert policy.choose((), True, now) == 1
        pauses.append(policy.peers[0].away_until - now)
        now = policy.peers[0].away_until
    assert pauses == sorted(pauses) and pauses[0] < 0.5 and pauses[-1] == LONGEST_PAUSE
    policy.sent(0)
    policy.ended(0, Outcome.SERVED, 0.001, now)
    assert policy.choose((), True, now) == 0 and policy.peers[0].failures == 0


def test_wrong_bytes_cost_more_than_a_late_answer_and_absence_costs_nothing() -> None:
    policy = PeerPolicy(3)
    for number, outcome in enumerate((Outcome.LATE, Outcome.WRONG, Outcome.ABSENT)):
        policy.peers[number].up = True
        policy.sent(number)
        policy.ended(number, outcome, 0.001, 0.0)
    late, wrong, absent = policy.peers
    assert 0 < late.away_until < wrong.away_until and absent.well(0.0)


def test_load_spreads_when_the_nearest_is_full() -> None:
    policy = PeerPolicy(2)
    for peer in policy.peers:
        peer.up = True
    chosen = list[int | None]()
    for _ in range(12):
        number = policy.choose((), True, 0.0)
        chosen.append(number)
        if number is not None:
            policy.sent(number)
    assert chosen == [0] * 4 + [1] * 4 + [None] * 4
    for up, best in (((True, True), 0), ((False, True), 1), ((False, False), None)):
        for peer, one in zip(policy.peers, up, strict=True):
            peer.up = one
        assert policy.choose((), False, 0.0) == best, "the store is away: a full host is better than none"


# --- how much is in flight --------------------------------------------------------------------------------------------


def run(delay: float, rate: float, seconds: float = 30.0) -> tuple[Pace, float]:
    """A server that answers after ``delay`` and sends ``rate`` requests a second, one after another. All room is
    used. Returns the pace, and the longest wait of the last part."""
    pace, now, free = Pace(), 0.0, 0.0
    waiting: list[tuple[float, float]] = []  # when the answer begins, and when it was sent
    longest = 0.0
    while now < seconds:
        while pace.room:
            pace.sent()
            free = max(free, now + delay) + 1 / rate
            waiting.append((free, now))
        now, sent = waiting.pop(0)
        pace.answered(now - sent, now)
        pace.ended()
        if seconds - PERIOD < now:
            longest = max(longest, now - sent)
    return pace, longest


@pytest.mark.parametrize(("delay", "rate"), [(0.02, 1000.0), (0.1, 2000.0), (0.001, 5000.0)])
def test_a_fast_link_with_delay_is_filled(delay: float, rate: float) -> None:
    pace, longest = run(delay, rate)
    assert pace.window >= min(LARGEST_WINDOW, rate * delay) * 0.8
    assert longest < delay + 3 * TARGET


def test_on_a_slow_link_an_urgent_chunk_waits_for_about_one_other() -> None:
    pace, longest = run(0.01, 4.0)
    assert pace.window < 2.5 and longest < 3 / 4.0


def test_patience_follows_the_server() -> None:
    pace = Pace()
    first = pace.patience
    for number in range(50):
        pace.sent()
        pace.answered(0.01, number / 10)
        pace.ended()
    assert pace.patience < first and pace.patience == 0.25
    for number in range(50):
        pace.answered(5.0, 10 + number / 10)
    assert pace.patience == 2.0


# --- the conversation -------------------------------------------------------------------------------------------------


def source(size: int, features: tuple[str, ...] = ("zero", "push", RESIDENT)) -> SourceConversation:
    return SourceConversation({"ram0": Offer("ram0", size, PAGE, "x")}, itertools.count(7).__next__, features)


def talk(size: int) -> tuple[PeerConversation, SourceConversation]:
    here, there = PeerConversation("ram0", size), source(size)
    advise = here.connected()
    assert isinstance(advise, Advise) and not here.lost()
    listen, _, _ = here.heard(there.advise(advise)[0], ())
    assert isinstance(listen, Listen) and here.up and not here.refused
    there.listen(listen)
    return here, there


@quick
@given(st.data())
def test_a_range_comes_whole_in_any_pieces(data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 80))
    size = pages * PAGE - data.draw(st.integers(0, PAGE - 1))
    image = bytes(range(1, 250)) * (pages * 17)
    first = data.draw(st.integers(0, pages - 1))
    count = data.draw(st.integers(1, pages - first))
    length = min(count * PAGE, size - first * PAGE)
    here, there = talk(size)
    number, message = here.request(first * PAGE, length)
    assert isinstance(message, RequestRanges)
    stream, ranges = there.request(message)
    assert all(part <= PIECE for _, part in ranges)
    cuts = [(offset + at, PAGE) for offset, part in ranges for at in range(0, part, PAGE)]
    lost = data.draw(st.booleans()) and data.draw(st.sampled_from(cuts))
    answers = []
    for part in data.draw(st.permutations(cuts)):
        offset, _ = part
        kind = RangeKind.LOST if part == lost else RangeKind.DATA
        frames = [memoryview(image[offset : offset + PAGE])] * (kind == RangeKind.DATA)
        pages_there = Pages(stream.number, message.request, pack_ranges([part]), bytes([kind]), "")
        answers.append(here.heard(pages_there, frames)[1:])
    done = [answer for answer in answers if answer[0]]
    assert len(done) == 1 and done[0][0] == number
    found = done[0][1]
    assert found is None if lost else bytes(found or b"")[:length] == image[first * PAGE :][:length]


def test_what_was_not_requested_breaks_the_protocol() -> None:
    here, _ = talk(8 * PAGE)
    number, _ = here.request(0, PAGE)
    frame = memoryview(bytes(PAGE))
    with pytest.raises(BadMessage, match="not requested"):
        here.heard(Pages(7, number, pack_ranges([(PAGE, PAGE)]), b"\0", ""), [frame])
    assert here.heard(Pages(8, number, pack_ranges([(0, PAGE)]), b"\0", ""), [frame]) == (None, 0, None)
    assert here.heard(Pages(7, 99, pack_ranges([(0, PAGE)]), b"\0", ""), [frame]) == (None, 0, None)


def test_a_host_that_cannot_be_used_says_why() -> None:
    here = PeerConversation("ram0", PAGE)
    for there, why in ((source(2 * PAGE), "has 8192 bytes"), (source(PAGE, ("zero",)), "earlier version")):
        advise = here.connected()
        assert isinstance(advise, Advise)
        assert here.heard(there.advise(advise)[0], ()) == (None, 0, None)
        assert why in here.refused and not here.up
    here.heard(SourceRefused("no-such-block", "ram0", "this source has x"), ())
    assert "this source has x" in here.refused


def test_a_refused_host_is_not_asked_and_answers_nothing_more() -> None:
    other, late = Advised("ram0", 7, 2 * PAGE, "y", ("zero", RESIDENT)), SourceRefused("limit", "ram0", "too many")
    refusals: list[Callable[[PeerConversation], object]] = [
        lambda here: here.heard(late, ()),
        lambda here: here.heard(other, ()),
        lambda here: here.refuse("it breaks the protocol"),
    ]
    for refuse in refusals:
        here, there = talk(PAGE)
        number, _ = here.request(0, PAGE)
        assert not here.lost()
        refuse(here)
        assert here.refused and not here.up and here.lost() == [number] and not here.lost()
        advise = here.connected()
        assert isinstance(advise, Advise)
        here.heard(there.advise(advise)[0], ())
        assert (here.up, here.refused) == (True, "")


def test_a_host_that_has_forgotten_us_is_asked_again() -> None:
    here, _ = talk(PAGE)
    number, _ = here.request(0, PAGE)
    advise, _, _ = here.heard(SourceRefused("out-of-phase", "", "advise first"), ())
    assert isinstance(advise, Advise) and not here.up and here.lost() == [number]
    assert here.heard(SourceRefused("out-of-phase", "", "advise first"), ())[0] is None


def test_a_resident_stream_never_waits() -> None:
    """Two hosts that help each other must not wait for one another."""
    sent, put = list[list[bytes]](), list[object]()
    reads = {0: b"\1" * PAGE}

    def read_now(offset: int, length: int) -> bytes:
        if offset not in reads:
            raise BlockingIOError
        return reads[offset]

    block = SimpleNamespace(name="ram0", size=2 * PAGE, page_size=PAGE, read_now=read_now, read=None)
    there = source(2 * PAGE)
    sender = SimpleNamespace(send_pages=lambda connection, parts, request: sent.append(parts))
    readers = SimpleNamespace(put=lambda job, urgent: put.append(job))
    answerer = Answerer({"ram0": block}, sender, None, readers)  # type: ignore[arg-type]
    for features in (("zero", RESIDENT), ("zero",)):
        stream = there.advise(Advise("ram0", PAGE, features))[0].stream
        there.listen(Listen(stream, 0))
        connection = SimpleNamespace(conversation=there, last_message_at=0.0, staging=None)
        message = RequestRanges(1, stream, True, pack_ranges([(0, PAGE), (PAGE, PAGE)]))
        answerer.request(connection, message)  # type: ignore[arg-type]
        if RESIDENT in features:
            assert not put and NOT_RESIDENT.encode() in b"".join(map(bytes, sent[0]))
        else:
            assert len(put) == 1


def test_background_is_read_as_background_whatever_its_length() -> None:
    """A client may wait for as much as the background asks for at a time."""
    called = list[str]()

    def reads(name: str) -> Callable[[int, int], bytes]:
        return lambda offset, length: called.append(name) or bytes(length)  # type: ignore[func-returns-value]

    size = 64 * PAGE
    other = SimpleNamespace(name="ram0", size=size, page_size=PAGE, read=reads("read"))
    block = SimpleNamespace(**vars(other), read_background=reads("background"))
    readers = SimpleNamespace(put=lambda job, urgent: job.read())
    for one, expected in ((block, ["read", "background"]), (other, ["read", "read"])):
        answerer = Answerer({"ram0": one}, None, None, readers)  # type: ignore[arg-type]
        there = source(size)
        stream = there.advise(Advise("ram0", PAGE, ("zero",)))[0].stream
        there.listen(Listen(stream, 0))
        connection = SimpleNamespace(conversation=there, last_message_at=0.0)
        for number, urgent in ((1, True), (2, False)):
            message = RequestRanges(number, stream, urgent, pack_ranges([(0, size)]))
            answerer.request(connection, message)  # type: ignore[arg-type]
        assert called == expected
        called.clear()


# --- the hosts of a block ---------------------------------------------------------------------------------------------


class FakeRouter:
    """Hosts that all answer with ``answer``: what a message to one of them brings from it."""

    def __init__(self, answer: Callable[[Message], Message | None]) -> None:
        self.sent = list[Message]()
        self._answer = answer
        self._heard: dict[bytes, Callable[[list[memoryview]], object]] = {}
        self._answers = list[tuple[bytes, Message]]()
        self._calls: tuple[int, Callable[[], object]] = -1, lambda: None

    def connect(self, endpoint: str, name: bytes, heard: Callable[[list[memoryview]], object], *_: object) -> None:
        self._heard[name] = heard

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        self._calls = fd, call

    def turn(self, seconds: float) -> None:
        fd, call = self._calls
        if select.select([fd], (), (), 0.0 if self._answers else seconds)[0]:
            call()
        answers, self._answers = self._answers, []
        for name, answer in answers:
            self._heard[name]([memoryview(encode(answer))])

    def send(self, name: bytes, data: bytes) -> object:
        message = decode(data, expect=FROM_SUPERVISOR)
        self.sent.append(message)
        if (answer := self._answer(message)) is not None:
            self._answers.append((name, answer))
        return SENT

    def close(self) -> None:
        pass

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.sent)


def connected(monkeypatch: pytest.MonkeyPatch, count: int, router: FakeRouter) -> peers.Peers:
    monkeypatch.setattr(peers, "open_router", lambda *_: router)
    found = peers.Peers("ram0", [RemoteSource(f"ipc:///h{number}", "ram0") for number in range(count)], PAGE)
    wait_until(lambda: all(peer.up for peer in found.policy.peers))
    return found


def wait_until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_host_that_breaks_the_protocol_keeps_no_reader_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone, and advised again later."""
    monkeypatch.setattr(pace, "LONGEST_PATIENCE", 60.0)

    def answer(message: Message) -> Message | None:
        if isinstance(message, Advise):
            return Advised("ram0", 7, PAGE, "x", ("zero", RESIDENT))
        wrong = pack_ranges([(0, 2 * PAGE)])
        return Pages(7, message.request, wrong, b"\1", "") if isinstance(message, RequestRanges) else None

    router = FakeRouter(answer)
    hosts = connected(monkeypatch, 1, router)
    began = time.monotonic()
    for _ in range(2):
        assert hosts.chunk(bytes(32), 0, PAGE, SHA256, True, began + 60) is None
    assert time.monotonic() - began < 30 and router.count(RequestRanges) == 1
    assert not hosts.policy.peers[0].up and router.count(Advise) == 1
    monkeypatch.setattr(peers, "REFUSED_SECONDS", 0.0)
    wait_until(lambda: hosts.policy.peers[0].up)
    hosts.close()


def test_silent_hosts_have_one_deadline_together(monkeypatch: pytest.MonkeyPatch) -> None:
    advised = Advised("ram0", 7, PAGE, "x", ("zero", RESIDENT))
    router = FakeRouter(lambda message: advised if isinstance(message, Advise) else None)
    hosts = connected(monkeypatch, 16, router)
    began = time.monotonic()
    assert hosts.chunk(bytes(32), 0, PAGE, SHA256, True, began + 0.5) is None
    assert time.monotonic() - began < 10 and router.count(RequestRanges) == 1
    assert hosts.chunk(bytes(32), 0, PAGE, SHA256, True, time.monotonic() + 0.01) is None, "too late to ask"
    assert router.count(RequestRanges) == 1
    hosts.close()
