"""The flow beside a model: every wish is on its way exactly once, in its turn, within bounds, until it has come or is
given up."""

from __future__ import annotations

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
    Send,
)
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
class Wished:
    """One wish as its client sees it. Its offset is nobody else's, so what is sent is known by it."""

    client: int
    offset: int
    length: int
    sent: int = 0
    request: int = 0
    deferred: bool = False


class Wishes(RuleBasedStateMachine):
    """The model keeps every wish that has not come, in the order of each client."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = FlowControl(LIMITS)
        self.now = 100.0
        self.next = 0
        self.open: dict[int, Wished] = {}  # by offset
        self.parts: dict[int, list[int]] = {}  # offset: pages that have come of what was sent last
        self.passed: dict[int, dict[int, int]] = {}  # client: wishes of others sent since its first one waits
        self.seen: set[int] = set()

    def _heard(self, effects: list[Effect]) -> None:
        for effect in effects:
            wish = self.open[effect.offset]
            assert (effect.block, effect.length) == (1, wish.length)
            if isinstance(effect, GiveUp):
                assert wish.sent == LIMITS.attempts, "given up before its time"
                del self.open[effect.offset]
                continue
            assert isinstance(effect, Send) and self.flow.up
            assert effect.request not in self.seen and effect.request > 0, "a number of a request is used once"
            assert not wish.request, f"{wish} is sent while it is in flight"
            assert not wish.deferred, f"{wish} is sent before its time"
            assert effect.urgent == (wish.client != BACKGROUND)
            self.seen.add(effect.request)
            wish.request, wish.sent = effect.request, wish.sent + 1
            self.parts[wish.offset] = []
            self._turns(wish)

    def _turns(self, sent: Wished) -> None:
        """A wish that waits is passed by at most one of each other client, and by none of the background."""
        for client, passed in self.passed.items():
            if client == sent.client or client == BACKGROUND:
                continue
            passed[sent.client] = passed.get(sent.client, 0) + 1
            assert sent.client != BACKGROUND, f"background is sent while client {client} waits"
            assert passed[sent.client] <= 1, f"client {sent.client} goes twice before client {client}"
        self.passed.pop(sent.client, None)

    def _waiting(self, client: int) -> bool:
        return any(wish.client == client and not wish.request and not wish.deferred for wish in self.open.values())

    def _wish(self, client: int, length: int) -> None:
        wish = Wished(client, self.next * 16 * PAGE, length * PAGE)
        self.next += 1
        self.open[wish.offset] = wish
        self._heard(self.flow.wish(client, 1, wish.offset, wish.length, self.now))

    @rule(client=clients, length=lengths)
    def wish(self, client: int, length: int) -> None:
        self._wish(client, length)

    @rule(client=clients, count=st.integers(5, 20))
    def storm(self, client: int, count: int) -> None:
        for _ in range(count):
            self._wish(client, 1)

    @rule(length=lengths)
    def background(self, length: int) -> None:
        if self.flow.room_for_background(self.now) >= length * PAGE:
            assert not any(self._waiting(client) for client in range(1, 5)), "background while somebody waits"
            assert not any(wish.deferred for wish in self.open.values()), "background while there is no memory"
            self._wish(BACKGROUND, length)

    @precondition(lambda self: any(wish.request for wish in self.open.values()))
    @rule(which=which, page=st.integers(0, 3))
    def part(self, which: int, page: int) -> None:
        """One page of a request comes, perhaps again: only when all its pages have come it has landed."""
        outstanding = [wish for wish in self.open.values() if wish.request]
        wish = outstanding[which % len(outstanding)]
        page %= wish.length // PAGE
        self.parts[wish.offset].append(page)
        request, done = wish.request, len(set(self.parts[wish.offset])) == wish.length // PAGE
        if done:
            del self.open[wish.offset]
        effects, took = self.flow.answered(request, 1, [(wish.offset + page * PAGE, PAGE)], self.now)
        assert done or (not effects and not took)
        self._heard(effects)

    @precondition(lambda self: any(wish.request for wish in self.open.values()))
    @rule(which=which)
    def whole(self, which: int) -> None:
        outstanding = [wish for wish in self.open.values() if wish.request]
        wish = outstanding[which % len(outstanding)]
        del self.open[wish.offset]
        effects, _ = self.flow.answered(wish.request, 1, [(wish.offset, wish.length)], self.now)
        self._heard(effects)

    @precondition(lambda self: any(wish.request for wish in self.open.values()))
    @rule(which=which, page=st.integers(0, 3))
    def no_memory(self, which: int, page: int) -> None:
        """All of a request comes, and what lies behind ``page`` finds no memory: that is wished for again, later."""
        outstanding = [wish for wish in self.open.values() if wish.request]
        wish = outstanding[which % len(outstanding)]
        page %= wish.length // PAGE
        request, at, end = wish.request, wish.offset, wish.offset + wish.length
        come = sum(high - low for low, high in self.flow.unwished(1, at, end))
        assert come == len(set(self.parts[at])) * PAGE, "the rest is on its way"
        del self.open[at]
        effects, _ = self.flow.answered(request, 1, [(at, wish.length)], self.now)
        rest = Wished(wish.client, at + page * PAGE, wish.length - page * PAGE, deferred=True)
        self.open[rest.offset] = rest
        assert self.flow.unwished(1, at, end) == [(at, end)]
        self.flow.defer([(rest.client, 1, rest.offset, rest.length)], self.now)
        assert self.now < self.flow.again_at <= self.now + LONGEST_PAUSE
        assert self.flow.unwished(1, at, end) == ([(at, rest.offset)] if page else [])
        self._heard(effects)

    @rule(request=st.integers(0, 30).map(FIRST_REQUEST.__add__), block=st.integers(1, 2), offset=st.integers(0, 400))
    def nonsense(self, request: int, block: int, offset: int) -> None:
        """Answers that nobody asked for, or with other ranges than asked for, are answers to nothing."""
        start = (offset * 16 + 8) * PAGE  # between two wishes
        assert self.flow.answered(request, block, [(start, PAGE)], self.now) == ([], 0.0)
        known = {wish.request for wish in self.open.values()}
        if block == 2 or request not in known:
            assert self.flow.answered(request, block, [(0, 1 << 40)], self.now) == ([], 0.0)

    @rule(seconds=st.sampled_from((0.01, 0.06, 1.0, 9.9, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for wish in self.open.values():
            if wish.request and self.now - self.flow.outstanding[wish.request].sent >= LIMITS.patience:
                wish.request = 0
            if self.flow.up and self.now >= self.flow.again_at:
                wish.deferred = False
        self._heard(self.flow.tick(self.now))

    @rule()
    def lose(self) -> None:
        self.flow.lost_source()
        for wish in self.open.values():
            wish.request = wish.sent = 0
        assert not self.flow.tick(self.now + 1000), "no time passes while the source is away"

    @rule()
    def find(self) -> None:
        self._heard(self.flow.found_source(self.now))

    @invariant()
    def holds(self) -> None:
        self.flow.check()
        outstanding = {wish.request: wish for wish in self.open.values() if wish.request}
        assert set(self.flow.outstanding) == set(outstanding)
        assert self.flow.waiting == len(self.open) - len(outstanding), "a wish is lost, or there twice"
        urgent = [wish for wish in outstanding.values() if wish.client != BACKGROUND]
        assert len(urgent) <= LIMITS.requests
        full = len(urgent) >= LIMITS.requests or sum(wish.length for wish in urgent) >= LIMITS.bytes
        waits = [client for client in range(1, 5) if self._waiting(client)]
        assert not (waits and self.flow.up) or full, "an urgent wish waits though there is room"
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
            outstanding = [wish for wish in self.open.values() if wish.request]
            if outstanding:
                wish = outstanding[0]
                del self.open[wish.offset]
                self._heard(self.flow.answered(wish.request, 1, [(wish.offset, wish.length)], self.now)[0])
        assert not self.open and not self.flow.in_flight and not self.flow.waiting


TestWishes = Wishes.TestCase
TestWishes.settings = effort(300)


def sends(effects: list[Effect]) -> list[int]:
    assert all(isinstance(effect, Send) for effect in effects)
    return [effect.offset for effect in effects]


def test_a_first_wish_waits_for_one_turn_of_a_storm() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(50):
        flow.wish(1, 1, page * PAGE, PAGE, 0.0)
    assert flow.wish(2, 1, 1000 * PAGE, PAGE, 0.0) == []
    assert flow.wish(3, 1, 2000 * PAGE, PAGE, 0.0) == []
    order = []
    for request in range(1, 5):
        order += sends(flow.answered(FIRST_REQUEST + request - 1, 1, [((request - 1) * PAGE, PAGE)], 0.0)[0])
        if request == 3:
            break
    assert order == [3 * PAGE, 1000 * PAGE, 2000 * PAGE]


def test_background_never_takes_the_room_of_what_is_urgent() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(20):
        flow.wish(BACKGROUND, 1, page * PAGE, PAGE, 0.0)
    assert flow.in_flight == LIMITS.requests
    assert sends(flow.wish(1, 1, 1000 * PAGE, PAGE, 0.0)) == [1000 * PAGE]
    assert flow.room_for_background(0.0) == 0


def test_the_window_of_the_background_is_small_while_somebody_waits() -> None:
    flow = FlowControl(LIMITS, up=True)
    assert flow.room_for_background(10.0) == LIMITS.background_calm
    flow.wish(1, 1, 0, PAGE, 10.0)
    assert flow.room_for_background(10.0) == LIMITS.background_busy
    flow.wish(BACKGROUND, 1, PAGE, PAGE, 10.0)
    assert flow.room_for_background(10.0) == LIMITS.background_busy - PAGE
    assert flow.room_for_background(10.0 + 2 * LIMITS.calm) == LIMITS.background_calm - PAGE
    flow.lost_source()
    assert flow.room_for_background(20.0) == 0


def test_one_part_twice_is_not_two_parts() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.wish(1, 1, 0, 2 * PAGE, 0.0)
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 1.0) == ([], 0.0)
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 1.0) == ([], 0.0)
    assert flow.in_flight == 1
    assert flow.answered(FIRST_REQUEST, 1, [(PAGE, PAGE)], 3.0) == ([], 3.0)
    assert flow.in_flight == 0


def test_retries_then_given_up() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.wish(1, 1, 0, PAGE, 0.0)
    assert flow.tick(9.9) == []
    assert flow.tick(10.0) == [Send(FIRST_REQUEST + 1, 1, 0, PAGE, True)]
    assert flow.answered(FIRST_REQUEST, 1, [(0, PAGE)], 11.0) == ([], 0.0), (
        "a late answer to a number that is not in use any more"
    )
    assert flow.tick(20.0) == [Send(FIRST_REQUEST + 2, 1, 0, PAGE, True)]
    assert flow.tick(30.0) == [GiveUp(1, 0, PAGE)]
    assert flow.in_flight == flow.waiting == 0


def test_a_loss_forgives_all_attempts_and_asks_in_the_old_order() -> None:
    flow = FlowControl(LIMITS, up=True)
    for page in range(3):
        flow.wish(1, 1, page * PAGE, PAGE, 0.0)
    flow.tick(10.0)
    flow.lost_source()
    assert flow.tick(1000.0) == [] and flow.waiting == 3
    assert sends(flow.found_source(1000.0)) == [0, PAGE, 2 * PAGE]
    assert all(isinstance(effect, Send) for effect in flow.tick(1010.0) + flow.tick(1020.0))
    assert all(isinstance(effect, GiveUp) for effect in flow.tick(1030.0))


def test_no_memory_is_waited_for_ever_longer_and_by_all_together() -> None:
    flow, now, pauses = FlowControl(LIMITS, up=True), 10.0, []
    for _ in range(10):
        flow.defer([(1, 1, 0, PAGE)], now)
        flow.defer([(2, 1, PAGE, PAGE)], now + SHORTEST_PAUSE / 2)
        pauses.append(flow.again_at - now)
        assert flow.tick(flow.again_at - 0.001) == [] and flow.waiting == 2 and not flow.room_for_background(now)
        now = flow.again_at
        assert sends(flow.tick(now)) == [0, PAGE]
        flow.check()
        for wish in list(flow.outstanding.values()):
            flow.answered(wish.request, 1, [(wish.offset, PAGE)], now)
    assert pauses[0] == pytest.approx(SHORTEST_PAUSE) and pauses[-1] == pytest.approx(LONGEST_PAUSE)
    assert pauses == sorted(pauses)
    now += LONGEST_PAUSE
    assert not flow.short(now) and flow.room_for_background(now) > 0
    flow.defer([], now)
    assert flow.again_at - now == pytest.approx(SHORTEST_PAUSE), "another shortage"


def test_a_postponed_wish_outlasts_its_source_and_is_hastened_by_nobody() -> None:
    flow = FlowControl(LIMITS, up=True)
    flow.defer([(1, 1, 0, PAGE)], 0.0)
    assert flow.promote(2, 1, 0, PAGE, 0.0) == []
    assert flow.open_wish(1, 0) is not None
    flow.lost_source()
    assert flow.tick(5.0) == [] and flow.found_source(6.0) == []
    assert sends(flow.tick(6.0)) == [0]


def streaming(pace: float) -> tuple[FlowControl, float]:
    """A piece of eight pages has come within ``pace`` seconds, another one of the same length is on its way."""
    flow = FlowControl(LIMITS)
    flow.found_source(100.0)
    for block in (1, 2):
        (sent,) = flow.wish(BACKGROUND, block, 0, 8 * PAGE, 100.0)
        assert isinstance(sent, Send)
        if block == 1:
            flow.answered(sent.request, 1, [(0, 8 * PAGE)], 100.0 + pace)
    return flow, 100.0


def test_a_page_in_a_slow_piece_is_asked_for_again_once() -> None:
    flow, now = streaming(pace=0.5)
    (sent,) = flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert isinstance(sent, Send) and (sent.offset, sent.length, sent.urgent) == (3 * PAGE, PAGE, True)
    assert not flow.promote(8, 2, 3 * PAGE, PAGE, now), "it is urgent by now"
    assert flow.promote(8, 2, 4 * PAGE, PAGE, now), "another one is not"
    flow.check()
    flow.answered(sent.request, 2, [(3 * PAGE, PAGE)], now)
    assert flow.streaming, "the piece itself is still to come"


def test_a_page_in_a_piece_that_comes_soon_is_waited_for() -> None:
    flow, now = streaming(pace=0.005)
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert flow.promote(7, 2, 3 * PAGE, PAGE, now + 0.5) == [], (
        "it is overdue: its source is slow or gone, not its turn"
    )
    flow, now = streaming(pace=0.5)
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now + 0.495), "it is all but there"


def test_a_page_on_a_long_line_is_waited_for() -> None:
    """An urgent request takes its time there too, and would not come before the piece."""
    flow, now = streaming(pace=0.5)
    (sent,) = flow.promote(7, 2, 3 * PAGE, PAGE, now)
    assert isinstance(sent, Send)
    flow.answered(sent.request, 2, [(3 * PAGE, PAGE)], now + 0.4)
    assert not flow.promote(7, 2, 4 * PAGE, PAGE, now + 0.4)
    assert flow.wish(7, 2, 4 * PAGE, PAGE, now + 0.4), "who asks for what is not on its way is not held up"


def test_behind_a_queue_and_without_a_source() -> None:
    flow, now = streaming(pace=0.005)
    flow.wish(BACKGROUND, 3, 0, PAGE, now)
    flow.wish(BACKGROUND, 3, PAGE, PAGE, now)
    flow.wish(BACKGROUND, 3, 2 * PAGE, PAGE, now)
    assert flow.waiting, "not even sent"
    assert flow.promote(7, 3, 2 * PAGE, PAGE, now)
    flow.lost_source()
    assert not flow.promote(7, 2, 3 * PAGE, PAGE, now), "everything open is sent anew"
    flow.check()
