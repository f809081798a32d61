"""Clients that walk through one remote block together: whose fault requests what, and when each continues."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast
from unittest.mock import Mock

import pytest

from postcopy_protocol.templates import MessageTemplates
from postcopy_supervisor.paging.fast_path import source_fast_path
from postcopy_supervisor.paging.flow_control import BACKGROUND
from postcopy_supervisor.paging.paging import FOLLOWING_SECONDS, MOST_FOLLOWING_SECONDS, Follower
from postcopy_supervisor.paging.source_link import LinkState
from postcopy_supervisor.periodic import PeriodicWork
from tests.unit.supervisor.test_shortage import BLOCK, PAGE, PAGES, Bench

LEADER, FOLLOWER, THIRD = 1, 2, 3


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A stream: the leader waits for page 1, pages 1 and 2 are requested, and the follower waits for page 2."""
    bench = Bench(around=4 * PAGE)
    bench.core.room = 16
    bench.paging.fault(LEADER, bench.block, [0])
    bench.come(0, 1)
    bench.paging.fault(LEADER, bench.block, [1])
    bench.woken.clear()
    bench.paging.fault(FOLLOWER, bench.block, [2])
    yield bench
    bench.paging.engine.check()
    os.close(bench.memory)


def requested(bench: Bench) -> list[tuple[int, int]]:
    return [(ask.first, ask.end) for ask in bench.paging.engine.outstanding()]


def test_a_follower_requests_a_window_behind_the_others_and_waits_for_it(bench: Bench) -> None:
    assert requested(bench) == [(1, 3), (3, 7)]
    bench.come(1, 3)
    assert bench.woken == [1], "the leader has its page; the follower continues with more before it"
    bench.come(3, 7)
    assert bench.woken == [1, 2]


def test_a_follower_does_not_wait_long_for_more_than_its_page(bench: Bench) -> None:
    bench.come(1, 3)
    bench.now += FOLLOWING_SECONDS
    assert bench.rung[-1] <= bench.now
    bench.paging.stream(0)
    assert bench.woken == [1, 2]


def test_a_follower_whose_page_is_late_waits_for_it_alone(bench: Bench) -> None:
    bench.now += FOLLOWING_SECONDS
    bench.paging.stream(0)
    assert requested(bench) == [(1, 3), (3, 7)]
    bench.come(1, 3)
    assert bench.woken == [1, 2]


def test_a_follower_that_leaves_is_forgotten(bench: Bench) -> None:
    bench.paging.left(FOLLOWER)
    bench.come(1, 3)
    bench.come(3, 7)
    assert bench.woken == [1]
    assert not bench.paging.engine.waiting


def test_the_rest_of_the_background_is_worked_out_only_for_a_follower(bench: Bench) -> None:
    """Without a background. Answers of a source call it, so it is part of a remote fault."""
    budget, parts, timer = Mock(unasked=0), Mock(paging=bench.paging), Mock()
    budget.left.return_value = 0
    names = ("program", "pending", "release", "watchdog", "auditor", "exports", "heartbeat", "entrances")
    others: dict[str, Any] = dict.fromkeys(names, Mock())
    work = PeriodicWork(parts, budget, 0, Mock(links={b"source": bench.link}), timer=timer, **others)
    work.stream()
    assert budget.left.call_count == 1
    bench.come(1, 3)
    bench.come(3, 7)
    work.stream()
    assert budget.left.call_count == 1


@pytest.mark.parametrize("before", [[], [PAGES - 2]])
def test_a_follower_at_the_end_of_a_block_waits_for_no_single_page(before: list[int]) -> None:
    """That is no window: it may be the page itself."""
    bench = Bench(around=4 * PAGE)
    for page in [*before, PAGES - 1]:
        bench.paging.fault(LEADER, bench.block, [page])
    page = [*before, PAGES - 1][0]
    bench.paging.fault(FOLLOWER, bench.block, [page])
    assert requested(bench) == [(one, one + 1) for one in [*before, PAGES - 1]]
    assert bench.paging.engine.waiters_of(BLOCK, page) == [LEADER, FOLLOWER]
    os.close(bench.memory)


def test_where_memory_is_scarce_nothing_is_requested_ahead() -> None:
    bench = Bench(around=4 * PAGE)
    bench.paging.fault(LEADER, bench.block, [0])
    bench.paging.fault(LEADER, bench.block, [1])
    bench.paging.roomy = False
    bench.paging.fault(FOLLOWER, bench.block, [2])
    assert requested(bench)[:2] == [(0, 1), (1, 3)]
    assert bench.paging.engine.waiters_of(BLOCK, 2) == [FOLLOWER]
    os.close(bench.memory)


def test_one_slow_answer_does_not_hold_a_follower_up(bench: Bench) -> None:
    bench.come(1, 3)
    bench.flow.urgent_pace = 7.0
    bench.paging.fault(THIRD, bench.block, [3])
    assert bench.rung[-1] <= bench.now + MOST_FOLLOWING_SECONDS


def test_each_follower_is_due_at_its_own_time(bench: Bench) -> None:
    bench.now += FOLLOWING_SECONDS / 2
    bench.paging.fault(THIRD, bench.block, [3])
    bench.now += FOLLOWING_SECONDS / 2
    due = bench.paging.stream(0)
    assert due is not None and due <= bench.now + FOLLOWING_SECONDS / 2, "the alarm rings once"


def test_where_a_window_is_one_page_no_client_follows() -> None:
    bench = Bench(around=PAGE)
    bench.core.room = 16
    for page in range(PAGES):
        bench.paging.fault(LEADER, bench.block, [page])
    bench.paging.fault(FOLLOWER, bench.block, [0])
    bench.come(0, 1)
    assert bench.woken == [0, 0]
    os.close(bench.memory)


def answer(bench: Bench, page: int) -> None:
    """A page comes in the form of the fast path."""
    paths = source_fast_path(cast(Any, bench.paging), bench.link, [bench.block], lambda *_: 0, lambda buffer: 1 << 30)
    head = next(head for head, one in bench.link.answers.items() if (one.offset, one.length) == (page * PAGE, PAGE))
    assert paths(head, memoryview(bytes(PAGE))) is not None


def up(bench: Bench) -> None:
    bench.link.state, bench.flow.up = LinkState.UP, True
    bench.link.templates[BLOCK] = MessageTemplates(1)


def test_a_page_that_overtakes_the_background_wakes_its_followers() -> None:
    bench = Bench(around=2 * PAGE)
    bench.core.room = 16
    up(bench)
    bench.paging.fault(LEADER, bench.block, [0])
    bench.come(0, 1)
    bench.paging.fault(LEADER, bench.block, [1])
    bench.paging.engine.ask(BLOCK, 3, 5)
    bench.link.request(BACKGROUND, BLOCK, 3 * PAGE, 2 * PAGE, bench.now)
    bench.flow.filling = True  # the background is slow
    for client in (FOLLOWER, THIRD):
        bench.paging.fault(client, bench.block, [3])
    assert list(bench.paging.following) == [(BLOCK, 3)]
    bench.woken.clear()
    answer(bench, 3)
    assert bench.woken == [3, 3] and not bench.paging.following
    os.close(bench.memory)


def test_a_follower_waits_for_what_is_requested_for_it() -> None:
    bench = Bench(around=4 * PAGE)
    bench.core.room = 16
    bench.paging.fault(LEADER, bench.block, [0])
    bench.come(0, 1)
    bench.paging.fault(LEADER, bench.block, [1])
    bench.paging.engine.ask(BLOCK, 5, 6)
    bench.paging.fault(FOLLOWER, bench.block, [2])
    assert list(bench.paging.following) == [(BLOCK, 4)], "page 5 is another's, and page 6 is not requested"
    os.close(bench.memory)


def test_many_followers_are_not_compared_with_each_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "__eq__", lambda *_: pytest.fail("that is quadratic"))
    for client in range(100):
        bench.paging.fault(THIRD + client, bench.block, [2])
    bench.come(1, 7)
    bench.come(7, PAGES)
    assert bench.woken.count(2) == 101 and not bench.paging.following
