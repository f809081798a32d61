"""Flow control beside a model: every request is in flight exactly once, in its turn, within bounds, until it is
answered or given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postcopy_protocol.templates import FIRST_REQUEST
from postcopy_supervisor.paging.flow_control import (
    BACKGROUND,
    LONGEST_PAUSE,
    SHORTEST_PAUSE,
    Effect,
    FlowControl,
    GiveUp,
    Limits,
    RangeRequest,
)
from postcopy_supervisor.paging.link_pace import FAST, LONGEST_BUSY
from tests.simulated.effort import effort

PAGE = 4096
LIMITS = Limits(
    requests=3,
    bytes=6 * PAGE,
    background_busy=2 * PAGE,
    background_calm=8 * PAGE,
    patience=10.0,
    attempts=3,
    calm=0.05,
)
clients = st.integers(1, 4)
which = st.integers(0, 99)
lengths = st.integers(1, 4)


@dataclass
class Wanted:
    """One request as its client sees it. Its offset is unique, so what is sent is known by it."""

    client: int
    offset: int
    length: int
    sent: int = 0
    number: int = 0
    deferred: bool = False


class Requests(RuleBasedStateMachine):
    """The model keeps every open request, in the order of each client."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = FlowControl(LIMITS)
        self.now = 100.0
        self.next = 0
        self.open: dict[int, Wanted] = {}  # by offset
        self.parts: dict[int, list[int]] = {}  # offset: pages that have come of what was sent last
        self.passed: dict[int, dict[int, int]] = {}  # client: requests of others sent since its first one waits
        self.seen: set[int] = set()

    def _heard(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            about = effect.request if isinstance(effect, GiveUp) else effect
            request = self.open[about.offset]
            assert (about.block, about.length) == (1, request.length)
            if isinstance(effect, GiveUp):
                assert request.sent == LIMITS.attempts, "given up before its time"
                del self.open[about.offset]
                continue
            assert isinstance(effect, RangeRequest) and self.flow.up
            number = effect.number
            assert number not in self.seen and number > 0, "a number of a request is used once"
            assert not request.number, f"{request} is sent while it is in flight"
            assert not request.deferred, f"{request} is sent before its time"
            assert effect.urgent == (request.client != BACKGROUND)
            self.seen.add(number)
            request.number, request.sent = number, request.sent + 1
            self.parts[request.offset] = []
            self._turns(request)

    def _turns(self, sent: Wanted) -> None:
        """A queued request is overtaken by at most one of each other client, and by none of the background."""
        for client, passed in self.passed.items():
            if client == sent.client or client == BACKGROUND:
                continue
            passed[sent.client] = passed.get(sent.client, 0) + 1
            assert sent.client != BACKGROUND, f"background is sent while client {client} waits"
            assert passed[sent.client] <= 1, f"client {sent.client} goes twice before client {client}"
        self.passed.pop(sent.client, None)

    def _waiting(self, client: int) -> bool:
        return any(
            request.client == client and not request.number and not request.deferred for request in self.open.values()
        )

    def _request(self, client: int, length: int) -> None:
        request = Wanted(client, self.next * 16 * PAGE, length * PAGE)
        self.next += 1
        self.open[request.offset] = request
        self._heard(self.flow.request(client, 1, request.offset, request.length, self.now))

    @rule(client=clients, length=lengths)
    def request(self, client: int, length: int) -> None:
        self._request(client, length)

    @rule(client=clients, count=st.integers(5, 20))
    def storm(self, client: int, count: int) -> None:
        for _ in range(count):
            self._request(client, 1)

    @rule(length=lengths)
    def background(self, length: int) -> None:
        if self.flow.room_for_background(self.now) >= length * PAGE:
            assert not any(self._waiting(client) for client in range(1, 5)), "background while a client waits"
            assert not any(request.deferred for request in self.open.values()), "background while there is no memory"
            self._request(BACKGROUND, length)

    @precondition(lambda self: any(request.number for request in self.open.values()))
    @rule(which=which, page=st.integers(0, 3))
    def part(self, which: int, page: int) -> None:
        """One page of a request comes, perhaps again: only when all its pages have come it is completed."""
        outstanding = [request for request in self.open.values() if request.number]
        request = outstanding[which % len(outstanding)]
        page %= request.length // PAGE
        self.parts[request.offset].append(page)
        number, done = request.number, len(set(self.parts[request.offset])) == request.length // PAGE
        if done:
            del self.open[request.offset]
        effects, took = self.flow.answered(number, 1, [(request.offset + page * PAGE, PAGE)], self.now)
        assert done or (not effects and not took)
        self._heard(effects)

    @precondition(lambda self: any(request.number for request in self.open.values()))
    @rule(which=which)
    def whole(self, which: int) -> None:
        outstanding = [request for request in self.open.values() if request.number]
        request = outstanding[which % len(outstanding)]
        del self.open[request.offset]
        effects, _ = self.flow.answered(request.number, 1, [(request.offset, request.length)], self.now)
        self._heard(effects)

    @precondition(lambda self: any(request.number for request in self.open.values()))
    @rule(which=which, page=st.integers(0, 3))
    def no_memory(self, which: int, page: int) -> None:
        """All of a request comes, and what lies behind ``page`` finds no memory: that is requested again, later."""
        outstanding = [request for request in self.open.values() if request.number]
        request = outstanding[which % len(outstanding)]
        page %= request.length // PAGE
        number, at, end = request.number, request.offset, request.offset + request.length
        come = sum(high - low for low, high in self.flow.not_requested(1, at, end))
        assert come == len(set(self.parts[at])) * PAGE, "the rest is on its way"
        del self.open[at]
        effects, _ = self.flow.answered(number, 1, [(at, request.length)], self.now)
        rest = Wanted(request.client, at + page * PAGE, request.length - page * PAGE, deferred=True)
        self.open[rest.offset] = rest
        assert self.flow.not_requested(1, at, end) == [(at, end)]
        self.flow.defer([RangeRequest(rest.client, 1, rest.offset, rest.length)], self.now)
        assert self.now < self.flow.retry_at <= self.now + LONGEST_PAUSE
        assert self.flow.not_requested(1, at, end) == ([(at, rest.offset)] if page else [])
        self._heard(effects)

    @rule(request=st.integers(0, 30).map(FIRST_REQUEST.__add__), block=st.integers(1, 2), offset=st.integers(0, 400))
    def nonsense(self, request: int, block: int, offset: int) -> None:
        """Answers to no request, or with other ranges, are ignored."""
        start = (offset * 16 + 8) * PAGE  # between two requests
        assert self.flow.answered(request, block, [(start, PAGE)], self.now) == ((), 0.0)
        known = {request.number for request in self.open.values()}
        if block == 2 or request not in known:
            assert self.flow.answered(request, block, [(0, 1 << 40)], self.now) == ((), 0.0)

    @rule(seconds=st.sampled_from((0.01, 0.06, 1.0, 9.9, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for request in self.open.values():
            if request.number and self.now - self.flow.outstanding[request.number].sent >= LIMITS.patience:
                request.number = 0
            if self.flow.up and self.now >= self.flow.retry_at:
                request.deferred = False
        self._heard(self.flow.tick(self.now))

    @rule()
    def lose(self) -> None:
        self.flow.lost_source()
        for request in self.open.values():
            request.number = request.sent = 0
        assert not self.flow.tick(self.now + 1000), "no time passes while the source is away"

    @rule()
    def find(self) -> None:
        self._heard(self.flow.found_source(self.now))

    @invariant()
    def holds(self) -> None:
        self.flow.check()
        outstanding = {request.number: request for request in self.open.values() if request.number}
        assert set(self.flow.outstanding) == set(outstanding)
        assert self.flow.waiting == len(self.open) - len(outstanding), "a request is lost, or there twice"
        urgent = [request for request in outstanding.values() if request.client != BACKGROUND]
        assert len(urgent) <= LIMITS.requests
        full = len(urgent) >= LIMITS.requests or sum(request.length for request in urgent) >= LIMITS.bytes
        waits = [client for client in range(1, 5) if self._waiting(client)]
        assert not (waits and self.flow.up) or full, "an urgent request waits though there is room"
        if self.flow.up:
            for client in waits:
                self.passed.setdefault(client, {})
            self.passed = {client: self.passed[client] for client in waits}
        else:
            self.passed.clear()

    def teardown(self) -> None:
        """When the source is there and answers, everything comes."""
        self._heard(self.flow.found_source(self.now))
        self.time_passes(LONGEST_PAUSE)
        for _ in range(len(self.open)):
            outstanding = [request for request in self.open.values() if request.number]
            if outstanding:
                request = outstanding[0]
                del self.open[request.offset]
                self._heard(self.flow.answered(request.number, 1, [(request.offset, request.length)], self.now)[0])
        assert not self.open and not self.flow.in_flight and not self.flow.waiting


TestRequests = Requests.TestCase
TestRequests.settings = effort(300)


def sends(effects: Sequence[Effect]) -> list[int]:
    return [effect.offset for effect in effects if isinstance(effect, RangeRequest)]


def numbers(effects: Sequence[Effect]) -> list[int]:
    return [effect.number for effect in effects if isinstance(effect, RangeRequest)]


def test_a_first_request_waits_for_one_turn_of_a_storm() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(50):
        flow.request(1, 1, page * PAGE, PAGE, 0.0)
    assert flow.request(2, 1, 1000 * PAGE, PAGE, 0.0) == []
    assert flow.request(3, 1, 2000 * PAGE, PAGE, 0.0) == []
    order = []
    for request in range(1, 5):
        order += sends(flow.answered(FIRST_REQUEST + request - 1, 1, [((request - 1) * PAGE, PAGE)], 0.0)[0])
        if request == 3:
            break
    assert order == [3 * PAGE, 1000 * PAGE, 2000 * PAGE]


def test_background_never_takes_the_room_of_urgent_requests() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(20):
        flow.request(BACKGROUND, 1, page * PAGE, PAGE, 0.0)
    assert flow.in_flight == LIMITS.requests
    assert sends(flow.request(1, 1, 1000 * PAGE, PAGE, 0.0)) == [1000 * PAGE]
    assert flow.room_for_background(0.0) == 0


def test_the_background_window_is_small_while_a_client_waits() -> None:
    flow = FlowControl(LIMITS, up=True)
    assert flow.room_for_background(10.0) == LIMITS.background_calm
    flow.request(1, 1, 0, PAGE, 10.0)
    assert flow.room_for_background(10.0) == LIMITS.background_busy
    flow.request(BACKGROUND, 1, PAGE, PAGE, 10.0)
    assert flow.room_for_background(10.0) == 0, "on a link that is not known one piece at a time"
    assert flow.room_for_background(10.0 + LONGEST_BUSY) == LIMITS.background_calm - PAGE
    flow.pace.rate = 2 * FAST
    assert flow.room_for_background(10.0) == LIMITS.background_busy - PAGE
    assert flow.room_for_background(10.0 + 2 * LIMITS.calm) == LIMITS.background_calm - PAGE
    flow.lost_source()
    assert flow.room_for_background(20.0) == 0


def test_one_part_twice_does_not_complete_a_request() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.request(1, 1, 0, 2 * PAGE, 0.0)
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 1.0) == ((), 0.0)
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 1.0) == ((), 0.0)
    assert flow.in_flight == 1
    assert flow.answered(FIRST_REQUEST, 1, [(PAGE, PAGE)], 3.0) == ((), 3.0)
    assert flow.in_flight == 0


def test_a_request_is_retried_then_given_up() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.request(1, 1, 0, PAGE, 0.0)
    assert flow.tick(9.9) == []
    assert numbers(flow.tick(10.0)) == [FIRST_REQUEST + 1]
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 11.0) == ((), 0.0), (
        "a late answer to a number that is not in use any more"
    )
    assert numbers(flow.tick(20.0)) == [FIRST_REQUEST + 2]
    (given_up,) = flow.tick(30.0)
    assert isinstance(given_up, GiveUp) and given_up.request.covers(1, 0)
    assert flow.in_flight == flow.waiting == 0


def test_after_a_loss_attempts_start_again_in_the_old_order() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(3):
        flow.request(1, 1, page * PAGE, PAGE, 0.0)
    flow.tick(10.0)
    flow.lost_source()
    assert flow.tick(1000.0) == [] and flow.waiting == 3
    assert sends(flow.found_source(1000.0)) == [0, PAGE, 2 * PAGE]
    assert all(isinstance(effect, RangeRequest) for effect in flow.tick(1010.0) + flow.tick(1020.0))
    assert all(isinstance(effect, GiveUp) for effect in flow.tick(1030.0))


def test_the_pause_without_memory_doubles_and_is_one_for_all() -> None:
    flow, now, pauses = FlowControl(LIMITS, up=True), 10.0, []
    for _ in range(10):
        flow.defer([RangeRequest(1, 1, 0, PAGE)], now)
        flow.defer([RangeRequest(2, 1, PAGE, PAGE)], now + SHORTEST_PAUSE / 2)
        pauses.append(flow.retry_at - now)
        assert flow.tick(flow.retry_at - 0.001) == [] and flow.waiting == 2 and not flow.room_for_background(now)
        now = flow.retry_at
        assert sends(flow.tick(now)) == [0, PAGE]
        flow.check()
        for request in list(flow.outstanding.values()):
            flow.answered(request.number, 1, [(request.offset, PAGE)], now)
    assert pauses[0] == pytest.approx(SHORTEST_PAUSE) and pauses[-1] == pytest.approx(LONGEST_PAUSE)
    assert pauses == sorted(pauses)
    now += LONGEST_PAUSE
    assert not flow.short_of_memory(now) and flow.room_for_background(now) > 0
    flow.defer([], now)
    assert flow.retry_at - now == pytest.approx(SHORTEST_PAUSE), "another shortage"


def test_a_deferred_request_survives_its_source_and_is_not_promoted() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.defer([RangeRequest(1, 1, 0, PAGE)], 0.0)
    assert flow.promote(2, 1, 0, PAGE, 0.0) == []
    assert flow.find_open(1, 0) is not None
    flow.lost_source()
    assert flow.tick(5.0) == [] and flow.found_source(6.0) == []
    assert sends(flow.tick(6.0)) == [0]


def streaming(pace: float) -> tuple[FlowControl, float]:
    """A piece of eight pages has come within ``pace`` seconds, another one of the same length is on its way."""
    flow = FlowControl(LIMITS)
    flow.found_source(100.0)
    for block in (1, 2):
        (sent,) = flow.request(BACKGROUND, block, 0, 8 * PAGE, 100.0)
        assert isinstance(sent, RangeRequest)
        if block == 1:
            flow.answered(sent.number, 1, [(0, 8 * PAGE)], 100.0 + pace)
    return flow, 100.0


def test_a_page_in_a_slow_background_request_is_requested_again_once() -> None:
    flow, now = streaming(pace=0.5)
    (sent,) = flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert isinstance(sent, RangeRequest) and (sent.offset, sent.length, sent.urgent) == (3 * PAGE, PAGE, True)
    assert not flow.promote(8, 2, 3 * PAGE, PAGE, now), "it is urgent by now"
    assert flow.promote(8, 2, 4 * PAGE, PAGE, now), "another one is not"
    flow.check()
    flow.answered(sent.number, 2, [(3 * PAGE, PAGE)], now)
    assert flow.background_in_flight, "the piece itself is still to come"


def test_a_fault_waits_for_a_background_request_that_comes_soon() -> None:
    flow, now = streaming(pace=0.005)
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert flow.promote(7, 2, 3 * PAGE, PAGE, now + 0.5) == [], (
        "it is overdue because its source is slow or gone, not because of its place"
    )
    flow, now = streaming(pace=0.5)
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now + 0.495), "it has almost arrived"


def test_a_fault_waits_on_a_long_line() -> None:
    """An urgent request takes its time there too, and would not come before the piece."""
    flow, now = streaming(pace=0.5)
    (sent,) = flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert isinstance(sent, RangeRequest)
    flow.answered(sent.number, 2, [(3 * PAGE, PAGE)], now + 0.4)
    assert not flow.promote(7, 2, 4 * PAGE, PAGE, now + 0.4)
    assert flow.request(7, 2, 4 * PAGE, PAGE, now + 0.4), "a page that is not requested is not held up"


def test_behind_a_queue_and_without_a_source() -> None:
    flow, now = streaming(pace=0.005)
    flow.request(BACKGROUND, 3, 0, PAGE, now)
    flow.request(BACKGROUND, 3, PAGE, PAGE, now)
    flow.request(BACKGROUND, 3, 2 * PAGE, PAGE, now)
    assert flow.waiting, "not even sent"
    assert flow.promote(7, 3, 2 * PAGE, PAGE, now)
    flow.lost_source()
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now), "everything open is sent again"
    flow.check()


def test_a_request_that_the_source_holds_is_never_given_up() -> None:
    flow = FlowControl(Limits(patience=1.0, attempts=2))
    flow.found_source(0.0)
    request = flow.send(1, 1, 0, PAGE, 0.0)
    assert request is not None
    for tenth in range(1, 100):
        assert flow.tick(tenth / 10) == []
        flow.source_waits(request.number, 1, tenth / 10)
    assert flow.tick(10.95) == [request]  # silence: it is sent again, and given up in the end
    assert flow.tick(12.0) == [GiveUp(request)]


def test_a_background_request_to_a_source_that_is_filling_says_nothing_of_the_link() -> None:
    """It waits there for pages to come: a fault overtakes it at once, and the next background is not paced by it."""
    flow, now = streaming(pace=0.005)
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now)
    flow.filling = True
    (sent,) = flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert isinstance(sent, RangeRequest) and sent.urgent
    piece = next(one for one in flow.outstanding.values() if not one.urgent)
    flow.answered(piece.number, 2, [(0, 8 * PAGE)], now + 60)
    flow.filling = False
    flow.request(BACKGROUND, 3, 0, 8 * PAGE, now + 60)
    assert not flow.promote(7, 3, 3 * PAGE, PAGE, now + 60), "the next piece is expected as soon as before"
