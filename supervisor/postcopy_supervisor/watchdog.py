"""The watchdog: kills a worker whose source takes too long, one that hangs, and a custodian that forks nothing."""

from __future__ import annotations

import time

from postcopy_kernel.process import is_stopped
from postcopy_protocol import counters

from .clients.client import Clients
from .clients.client_zero import ClientZero
from .clients.worker_zero import NUMBER as ZERO
from .event_log import RecordEvent
from .paging.engine import Engine
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import WorkerPool
from .waits import Waits

STUCK_SECONDS = 5.0  # a worker hangs when its client waits this long and no fault is answered
STOPPED_SECONDS = 2.0  # a custodian that is stopped (SIGSTOP) is killed after this time, before its deadline


class Watchdog:
    """Reads counters in shared memory, and the kernel's counts of waiters of every userfaultfd (``waits``)."""

    def __init__(
        self,
        pool: WorkerPool,
        custodian: CustodianClient,
        clients: Clients,
        zero: ClientZero,
        engine: Engine,
        waits: Waits,
        handler_timeout: float,
        event: RecordEvent,
    ) -> None:
        self._pool, self._custodian, self._clients, self._zero, self._engine = pool, custodian, clients, zero, engine
        self._timeout, self._event, self._waits = handler_timeout, event, waits
        self._watched: dict[int, tuple[object, float]] = {}

    def tick(self, now: float) -> None:
        """Once a second: kill what hangs. Its end counts as a crash."""
        self._watch_custodian(now)
        pages = {number: client.counters for number, client in self._clients.by_number.items()}
        pages[ZERO] = self._zero.counters
        for number, page in pages.items():
            slot = self._pool.slots.get(number)
            if page is None or slot is None or slot.state != "running":
                self._watched.pop(number, None)
                continue
            busy = page[counters.BUSY_SINCE_NS]
            if busy and time.monotonic_ns() - busy > self._timeout * 1e9:
                self._kill(number, f"is busy with one page for {self._timeout:g} s: its source does not answer")
            elif number == ZERO:
                self._watch_zero(page, now)
            else:
                self._watch_client(number, page, now)

    def _watch_custodian(self, now: float) -> None:
        """Kill a custodian that has open orders and forks nothing: it is stopped, or hangs."""
        if self._custodian.channel is None:
            return  # one is being started
        silent = self._pool.unanswered(now)
        hangs = silent > STOPPED_SECONDS and is_stopped(self._custodian.pid)
        if hangs or silent > self._pool.policy.start_deadline:
            why = f"has forked no worker for {silent:.0f} s"
            self._event("watchdog", f"the custodian {why}; it is killed", pid=self._custodian.pid, cause=why)
            self._custodian.kill()

    def _watch_zero(self, page: memoryview, now: float) -> None:
        """It has been asked for pages, is busy with none, and places none: it hangs."""
        asked = self._zero.outstanding()
        if page[counters.BUSY_SINCE_NS] or not asked:
            self._watched.pop(ZERO, None)
            return
        self._check_progress(ZERO, (page[counters.PLACED], asked), now)

    def _watch_client(self, number: int, page: memoryview, now: float) -> None:
        """A worker with waiters that is busy with nothing and answers nothing hangs. Where it has open requests here,
        only unread faults count: the others may wait for a source."""
        wait = self._waits.by_client.get(number)
        if wait is None:
            waiting = 0
        elif self._engine.is_waiting(number):
            waiting = wait.unread
        else:
            waiting = wait.faults - page[counters.OUTSIDE]  # these are read, and left waiting on purpose
        if page[counters.BUSY_SINCE_NS] or (waiting <= 0 and not self._keeps_an_event_waiting(number)):
            self._watched.pop(number, None)
            return
        self._check_progress(number, counters.faults(page), now)

    def _keeps_an_event_waiting(self, number: int) -> bool:
        """Whether a machine that gives memory back may wait for this worker: the kernel counts no waiters of events."""
        return self._clients.by_number[number].copied_map >= 0 and is_stopped(self._pool.pid(number) or 0)

    def _check_progress(self, number: int, figure: object, now: float) -> None:
        """Kill it when ``figure`` has not changed for too long."""
        seen, since = self._watched.setdefault(number, (figure, now))
        if seen != figure:
            self._watched[number] = (figure, now)
        elif now - since > STUCK_SECONDS:
            self._watched.pop(number)
            self._kill(number, f"answers no fault for {STUCK_SECONDS:g} s")

    def _kill(self, number: int, why: str) -> None:
        where = {"worker": number, "client": number} if number != ZERO else {"worker": number}
        self._event("watchdog", f"worker {number} {why}; it is killed", **where, cause=why)
        self._pool.kill(number, why)
