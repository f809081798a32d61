"""Moving in: the clients and workers of a plan become ours, and what the workers had asked the supervisor before us is
asked anew.

Workers of remote blocks come back to the router by themselves, within some 100 ms. What they had asked is lost with
whom they asked, so each is sent a Wake of nothing as soon as the router can reach it: its clients fault again.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from postcopy_kernel import descriptors
from postcopy_protocol import counters
from postcopy_protocol.messages import Message, Wake

from .clients.attach_server import AttachServer
from .clients.client_zero import NUMBER as ZERO
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import WorkerPool
from .recovery.plan import Plan

KNOCK_SECONDS = 0.01


class PendingWorkers:
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


def adopt(plan: Plan, custody: CustodianClient, workforce: WorkerPool, reception: AttachServer) -> None:
    """Take over clients first, then the workers that serve them, then start those that are missing."""
    if not plan.recovers:
        reception.next_number = plan.first_client
        return
    reception.next_number = plan.first_client
    for kept in plan.clients:
        reception.adopt(kept)
    for fd in plan.zero:
        words = memoryview(mmap.mmap(fd, counters.PAGE_BYTES)).cast("Q")
        workforce.used(ZERO, words[counters.INCARNATION])
    descriptors.close_all(plan.zero)
    for life in plan.workers:
        client = reception.clients.get(life.worker)
        wanted = client is not None and bool(client.regions)
        workforce.adopt(life, wanted, client is not None and client.quarantined)
    reception.begin_without_worker()
    for key in plan.forgotten:
        custody.forget(key)
