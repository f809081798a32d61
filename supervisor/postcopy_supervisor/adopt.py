"""Adoption: the clients and workers of the previous supervisor continue under this one.

Workers of remote blocks connect to the router again within some 100 ms. The requests that they sent to the dead
supervisor are lost. So each gets an empty Wake as soon as it is connected, which makes its clients fault again."""

from __future__ import annotations

import mmap

from postcopy_kernel import descriptors
from postcopy_protocol import counters
from postcopy_protocol.messages import Wake

from .clients.attach_server import AttachServer
from .clients.client import Clients
from .clients.worker_zero import NUMBER as ZERO
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import Process, WorkerPool
from .recovery.plan import Plan
from .recovery.watchers import Orphans

RETRY_SECONDS = 0.01


class PendingWorkers:
    """Adopted workers that have got no message of this supervisor yet."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._workers: set[int] = set()

    def expect(self, workers: set[int]) -> None:
        self._workers |= workers

    def tick(self, now: float) -> float | None:
        """Try to reach each of them; returns when to try again. Workers that have left are forgotten."""
        if not self._workers:
            return None
        self._workers = {
            worker
            for worker in self._workers
            if worker in self._pool.slots and not self._pool.try_send(worker, Wake(0, b""))
        }
        return now + RETRY_SECONDS if self._workers else None


def adopt(
    plan: Plan,
    custodian: CustodianClient,
    pool: WorkerPool,
    clients: Clients,
    server: AttachServer,
    orphans: Orphans,
) -> None:
    """Take over clients first, then the workers that serve them, then start those that are missing."""
    if not plan.recovers:
        return
    for inherited in plan.clients:
        server.adopt(inherited)
    _relieve(plan, clients, orphans)
    for fd in plan.zero:
        page = memoryview(mmap.mmap(fd, counters.PAGE_BYTES)).cast("Q")
        pool.skip_incarnations(ZERO, page[counters.INCARNATION])
    descriptors.close_all(plan.zero)
    for kept in plan.workers:
        client = clients.by_number.get(kept.worker)
        wanted = client is not None and bool(client.regions)
        running = Process(kept.worker, kept.incarnation, kept.pid, kept.pidfd)
        pool.adopt(running, wanted, client is not None and client.quarantined)
    server.start_workers()
    for key in plan.forgotten:
        custodian.forget(key)


def _relieve(plan: Plan, clients: Clients, orphans: Orphans) -> None:
    """Watchers of rescued clients stop answering faults. What they have poisoned is noted as a worker would have noted
    it, so that the next worker places and heals it."""
    notes = {kept.note.block: kept.note for kept in plan.blocks.values()}
    rescued = {number: client for number, client in clients.by_number.items() if number in plan.rescued}
    for number, poisoned in orphans.relieve({number: (client.pid, client.uid) for number, client in rescued.items()}):
        page, touches = rescued[number].counters, rescued[number].touches
        for block, offset in poisoned:
            if page is not None and block in touches and offset < notes[block].size:  # it is the client's word
                counters.deny(page, block, offset // notes[block].page_size)
