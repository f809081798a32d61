"""The engine beside a model: a page is requested once, a waiter is released exactly once, and none is forgotten."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postcopy_supervisor.paging.engine import Ask, Effect, Engine, Release
from tests.simulated.effort import effort

blocks = st.integers(0, 1)
pages = st.integers(0, 9)
lengths = st.integers(1, 5)
waiters = st.integers(0, 3)


class Requests(RuleBasedStateMachine):
    """The model: which waiter waits for which page, and which pages of which block are requested."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.waiting: set[tuple[int, int, int]] = set()
        self.asked: list[Ask] = []

    def _heard(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Ask) and effect.first < effect.end
            for other in self.asked:
                apart = other.block != effect.block or other.end <= effect.first or effect.end <= other.first
                assert apart, f"{effect} is asked twice, see {other}"
            self.asked.append(effect)

    def _in_flight(self, block: int, page: int) -> bool:
        return any(ask.block == block and ask.first <= page < ask.end for ask in self.asked)

    @rule(waiter=waiters, block=blocks, page=pages, length=lengths)
    def fault(self, waiter: int, block: int, page: int, length: int) -> None:
        known, before = self._in_flight(block, page), self.engine.deduplicated
        effects = self.engine.fault(waiter, block, page, page + length)
        assert len(effects) == (not known)
        assert self.engine.deduplicated == before + known
        self._heard(effects)
        self.waiting.add((waiter, block, page))
        assert self._in_flight(block, page)

    @rule(block=blocks, page=pages, length=lengths)
    def background(self, block: int, page: int, length: int) -> None:
        self._heard(self.engine.ask(block, page, page + length))

    def _answer(self, ask: Ask, lost: set[int]) -> None:
        due = {key for key in self.waiting if key[1] == ask.block and ask.first <= key[2] < ask.end}
        effects = self.engine.answered(ask.block, ask.first, ask.end, lost)
        assert all(isinstance(effect, Release) for effect in effects)
        released = [effect for effect in effects if isinstance(effect, Release)]
        assert sorted((one.waiter, one.block, one.page) for one in released) == sorted(due)
        assert all(one.lost == (one.page in lost) for one in released)
        self.waiting -= due

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99), lost=st.sets(pages, max_size=3))
    def answer(self, which: int, lost: set[int]) -> None:
        self._answer(self.asked.pop(which % len(self.asked)), lost)

    @precondition(lambda self: self.asked)
    @rule()
    def outstanding(self) -> None:
        anew = list(self.engine.outstanding())
        key = [(ask.block, ask.first, ask.end) for ask in anew]
        assert sorted(key) == sorted((ask.block, ask.first, ask.end) for ask in self.asked)

    @rule(waiter=waiters)
    def leave(self, waiter: int) -> None:
        stood = {key for key in self.waiting if key[0] == waiter}
        assert self.engine.leave(waiter) == sorted((block, page) for _, block, page in stood)
        self.waiting -= stood

    @invariant()
    def holds(self) -> None:
        self.engine.check()
        assert self.engine.in_flight == len(self.asked)
        assert self.engine.idle == (not self.waiting and not self.asked)

    def teardown(self) -> None:
        while self.asked:
            self._answer(self.asked.pop(), set())
        assert not self.waiting
        assert self.engine.idle


TestRequests = Requests.TestCase
TestRequests.settings = effort(200)


def test_a_second_answer_releases_no_waiter() -> None:
    engine = Engine()
    assert engine.fault(3, 0, 5, 8) == [Ask(0, 5, 8)]
    assert engine.answered(0, 5, 8, [5]) == [Release(3, 0, 5, True)]
    assert engine.answered(0, 5, 8, []) == []


def test_a_range_in_flight_is_not_requested_again() -> None:
    engine = Engine()
    assert engine.ask(0, 4, 8) == [Ask(0, 4, 8)]
    assert engine.ask(0, 4, 8) == []
    assert engine.fault(1, 0, 2, 8) == [Ask(0, 2, 4)]
    assert engine.ask(0, 6, 10) == [Ask(0, 8, 10)]
