"""Clients that walk through one remote block together: whose fault requests what, and when each continues."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from postcopy_supervisor.paging.paging import FOLLOWING_SECONDS
from postcopy_supervisor.periodic import PeriodicWork
from tests.unit.supervisor.test_shortage import BLOCK, PAGE, PAGES, Bench

LEADER, FOLLOWER = 1, 2


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
    """The fast path answers those, and knows of no followers."""
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
