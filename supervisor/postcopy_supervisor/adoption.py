"""Moving in: the clients and workers of a plan become ours, and what the workers had asked the supervisor before us is
asked anew.

Workers of remote blocks come back to the router by themselves, within some 100 ms. What they had asked is lost with
whom they asked, so each is sent a Wake of nothing as soon as the router can reach it: its clients fault again.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from postcopy_kernel import descriptors
from postcopy_protocol import statistics
from postcopy_protocol.messages import Message, Wake

from .client_zero import NUMBER as ZERO
from .custody import Custody
from .reception import Reception
from .recovery import Plan
from .workforce import Workforce

KNOCK_SECONDS = 0.01


class Returning:
    """Adopted workers that have not heard from us yet."""

    def __init__(self, reach: Callable[[int, Message], bool]) -> None:
        """``reach`` says whether the router knows a way to this worker."""
        self._reach = reach
        self._workers: set[int] = set()

    def expect(self, workers: set[int]) -> None:
        self._workers |= workers

    def knock(self, wanted: Callable[[int], bool], now: float) -> float | None:
        """Try them all; returns when to come again. Workers that are not ``wanted`` any more are forgotten."""
        self._workers = {worker for worker in self._workers if wanted(worker) and not self._reach(worker, Wake(0, b""))}
        return now + KNOCK_SECONDS if self._workers else None


def move_in(plan: Plan, custody: Custody, workforce: Workforce, reception: Reception) -> None:
    """Take over clients first, then the workers that serve them, then start those that are missing."""
    if not plan.recovers:
        reception.next_number = plan.first_client
        return
    reception.next_number = plan.first_client
    for kept in plan.clients:
        reception.adopt(kept)
    for fd in plan.zero:
        words = memoryview(mmap.mmap(fd, statistics.PAGE_BYTES)).cast("Q")
        workforce.used(ZERO, words[statistics.INCARNATION])
    descriptors.close_all(plan.zero)
    for life in plan.workers:
        client = reception.clients.get(life.worker)
        wanted = client is not None and bool(client.regions)
        workforce.adopt(life, wanted, client is not None and client.quarantined)
    reception.begin_without_worker()
    for key in plan.forgotten:
        custody.forget(key)
