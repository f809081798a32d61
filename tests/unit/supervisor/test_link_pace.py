"""The pace of the background, on a simulated link: it fills the link, and an urgent answer finds little before it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_supervisor.paging.flow_control import BACKGROUND, Effect, FlowControl, RangeRequest
from postcopy_supervisor.paging.link_pace import BUSY_PIECE, START_WINDOW, TARGET, TARGET_SHARE
from tests.simulated.effort import effort

PAGE = 4096
MB = 1e6
HEAD = 100  # bytes of an answer beside its pages
PROCESSING = 0.0003  # seconds of every answer, in the programs at both ends


class Link:
    """A source behind a link of ``rate`` bytes a second and ``delay`` seconds each way; its answers are sent in order.
    ``burst``: bytes that pass at once after a rest. ``reading``: seconds until a piece of background is read."""

    def __init__(
        self, rate: float, delay: float = 0.0, burst: int = 0, reading: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.rate, self.delay, self.burst, self.reading = rate, delay, burst, reading
        self.flow = FlowControl(up=True)
        self.now, self._free, self._order, self._asked = 0.0, 0.0, 0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.arrived = 0  # bytes of background
        self.waited: list[float] = []  # of urgent requests

    def at(self, when: float, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, act))

    def _answer(self, length: int, act: Callable[[], None], reading: float = 0.0) -> None:
        """The answer to what is sent now."""

        def send() -> None:
            self._free = max(self.now - self.burst / self.rate, self._free) + (length + HEAD) / self.rate
            self.at(max(self.now, self._free) + self.delay + PROCESSING, act)

        self.at(self.now + self.delay + reading, send)

    def stream(self) -> None:
        flow, now = self.flow, self.now
        if flow.probe(now):
            self._answer(0, lambda: flow.pong(self.now))
        while flow.room_for_background(now) >= (piece := flow.piece(now)):
            self._asked += 1
            self._send(flow.request(BACKGROUND, 1, self._asked << 24, piece, now))
        if flow.pace.resume_at > now:
            self.at(flow.pace.resume_at, self.stream)

    def _send(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, RangeRequest)
            self._answer(effect.length, lambda effect=effect: self._came(effect), self.reading())  # type: ignore[misc]

    def _came(self, request: RangeRequest) -> None:
        self._send(self.flow.completed(request, self.now))
        if request.urgent:
            self.waited.append(self.now - request.sent)
        else:
            self.arrived += request.length
        if not request.urgent or not self.flow.background_in_flight:
            self.stream()

    def touch(self, again: bool = True, pause: float = 0.0) -> None:
        """A client waits for a page, and touches the next one when it is there."""
        self._asked += 1
        request = self.flow.send(1, 1, self._asked << 24, PAGE, self.now)
        assert request is not None

        def came() -> None:
            self._came(request)
            if again:
                self.at(self.now + pause, lambda: self.touch(again, pause))

        self._answer(PAGE, came)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        ticks = self.now
        while ticks < end:
            self.at(ticks, self.stream)
            ticks += 0.25
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = end


def share(link: Link, seconds: float) -> float:
    """Of the link that the background takes."""
    before = link.arrived
    link.run(seconds)
    return (link.arrived - before) / seconds / link.rate


def alone(link: Link) -> float:
    """What an urgent answer takes without background."""
    return 2 * link.delay + (PAGE + HEAD) / link.rate + PROCESSING


rates = st.floats(5 * MB, 800 * MB)
bursts = st.sampled_from([0, 65536])
delays = st.sampled_from([0.0, 0.001, 0.005, 0.02])


@given(rate=rates, delay=delays, burst=bursts)
@effort(20)
def test_the_background_fills_the_link_and_its_queue_is_short(rate: float, delay: float, burst: int) -> None:
    link = Link(rate, delay, burst)
    link.run(4.0)
    most = link.flow.limits.background_calm / (2 * delay + PROCESSING) / rate  # a window is bounded in bytes, too
    assert share(link, 11.0) > min(0.8, 0.7 * most), link.flow.pace
    queues = []
    for _ in range(20):
        link.run(0.09 + random.Random(rate).random() / 9)
        queues.append(max(0.0, link._free - link.now))
    target = max(TARGET, TARGET_SHARE * 2 * delay)
    assert median(queues) < max(2 * target, 1.5 * 65536 / rate), link.flow.pace


@given(rate=st.floats(5 * MB, 100 * MB), delay=delays, burst=bursts, pause=st.sampled_from([0.0, 0.001, 0.02]))
@effort(20)
def test_urgent_answers_find_little_before_them(rate: float, delay: float, burst: int, pause: float) -> None:
    link = Link(rate, delay, burst)
    link.run(3.0)
    link.touch(pause=pause)
    link.run(6.0)
    del link.waited[:3]
    # A client whose pauses are in step with the background's meets the end of a piece each time.
    assert median(link.waited) < 1.5 * alone(link) + PAGE / rate + BUSY_PIECE / 2, link.flow.pace


@pytest.mark.parametrize("rate", [50 * MB, 10 * MB])
def test_an_urgent_request_out_of_the_blue(rate: float) -> None:
    """A stream that has met no client yet."""
    link = Link(rate)
    for _ in range(12):
        link.run(2.0)
        link.touch(again=False)
    link.run(1.0)
    assert max(link.waited) < 0.015 + alone(link)


def test_the_link_becomes_slower_and_longer_and_quick_again() -> None:
    link = Link(400 * MB)
    link.run(3.0)
    assert share(link, 5.0) > 0.8
    for rate, delay in ((10 * MB, 0.0), (50 * MB, 0.02), (400 * MB, 0.001)):
        link.rate, link.delay = rate, delay
        link.run(25.0)
        assert share(link, 10.0) > 0.8, (rate, link.flow.pace)
        assert link._free - link.now < 0.02, (rate, link.flow.pace)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_busy_machines_are_no_queue(seed: int) -> None:
    """On a long link they delay each answer by up to 24 ms while they stream, and the window stays large."""
    link, chance = Link(50 * MB, 0.02, 65536), random.Random(seed)
    link.now, answer = 1.0, link._answer

    def busy(length: int, act: Callable[[], None], reading: float = 0.0) -> None:
        def late() -> None:
            link.at(link.now + (0.024 * chance.random() if link.flow.background_in_flight else 0.0), act)

        answer(length, late, reading)

    link._answer = busy  # type: ignore[method-assign]
    link.run(5.0)
    assert share(link, 15.0) > 0.85, link.flow.pace
    link.touch(pause=0.05)
    link.run(4.0)
    assert median(link.waited[3:]) < 1.5 * alone(link)


def test_slow_reads_are_no_slow_link() -> None:
    """One piece in four takes 50 ms to read: the window stays large."""
    chance = random.Random(4)
    link = Link(1000 * MB, reading=lambda: 0.05 if chance.random() < 0.25 else 0.0)
    link.run(5.0)
    assert link.flow.pace.window > START_WINDOW


def test_lost_pongs_stop_nothing() -> None:
    link = Link(50 * MB)
    answer = link._answer
    link._answer = lambda length, act, reading=0.0: answer(length, act, reading) if length else None  # type: ignore[method-assign]
    link.run(3.0)
    assert share(link, 15.0) > 0.5


def test_another_link_after_a_loss() -> None:
    link = Link(50 * MB)
    link.run(3.0)
    link.flow.lost_source()
    assert link.flow.pace.rate == 0.0 and link.flow.pace.window == START_WINDOW
