"""The watchdog: a handler that takes too long, and a worker that lives but answers nothing."""

from __future__ import annotations

import time

from postcopy_kernel.process import is_stopped
from postcopy_kernel.userfaultfd import stuck_faults
from postcopy_protocol.counters import BUSY_SINCE_NS, OUTSIDE, PLACED
from postcopy_protocol.counters import faults as answered

from .clients.attach_server import AttachServer
from .clients.client_zero import NUMBER as ZERO
from .clients.client_zero import ClientZero
from .observe.event_log import Tell
from .paging.engine import Engine
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import WorkerPool

STUCK_SECONDS = 5.0
"""A worker whose client waits for so long while no fault is answered hangs, whatever it is doing."""

STOPPED_SECONDS = 2.0
"""A custodian that somebody has stopped is not waited for as long."""


class Watchdog:
    """Looks at figures in shared memory and at the kernel's gauge of every userfaultfd; asks nobody."""

    def __init__(
        self,
        workforce: WorkerPool,
        custody: CustodianClient,
        reception: AttachServer,
        zero: ClientZero,
        engine: Engine,
        handler_timeout: float,
        event: Tell,
    ) -> None:
        self._workforce = workforce
        self._custody = custody
        self._reception = reception
        self._zero = zero
        self._engine = engine
        self._timeout = handler_timeout
        self._event = event
        self._watched: dict[int, tuple[object, float]] = {}

    def tick(self, now: float) -> None:
        """Once a second: kill what hangs; the law of crashes takes its course."""
        self._watch_custodian(now)
        figures = {number: client.words for number, client in self._reception.clients.items()}
        figures[ZERO] = self._zero.words
        for number, words in figures.items():
            slot = self._workforce.fleet.slots.get(number)
            if words is None or slot is None or slot.state != "running":
                self._watched.pop(number, None)
                continue
            busy = words[BUSY_SINCE_NS]
            if busy and time.monotonic_ns() - busy > self._timeout * 1e9:
                self._kill(number, f"is busy with one page for {self._timeout:g} s: its source does not answer")
            elif number == ZERO:
                self._watch_zero(words, now)
            else:
                self._watch_client(number, words, now)

    def _watch_custodian(self, now: float) -> None:
        """Workers are wanted and it forks none: it is stopped, or hangs for longer than a crowd could keep it busy."""
        if self._custody.channel is None:
            return  # there is none: one is being started
        silent, fleet = self._workforce.fleet.unanswered(now), self._workforce.fleet
        hangs = silent > STOPPED_SECONDS and is_stopped(self._custody.pid)
        if hangs or silent > fleet.policy.start_deadline:
            why = f"answers no order to fork for {silent:.0f} s"
            self._event("watchdog", f"the custodian {why}; it is killed", pid=self._custody.pid, cause=why)
            self._custody.kill()

    def _watch_zero(self, words: memoryview, now: float) -> None:
        """It has been asked for pages, is busy with none, and nothing comes: it is stopped."""
        asked = self._zero.outstanding()
        if words[BUSY_SINCE_NS] or not asked:
            self._watched.pop(ZERO, None)
            return
        self._look(ZERO, (words[PLACED], asked), now)

    def _watch_client(self, number: int, words: memoryview, now: float) -> None:
        """Waiters, read or unread, while the worker is busy with nothing and answers nothing: it hangs. Where it has
        asked us for pages, only what it has not read counts: those it has may wait for a source as long as it takes."""
        ufd, faults = self._reception.clients[number].userfaultfd, answered(words)
        if ufd is None:
            return
        try:
            unread, waiting = stuck_faults(ufd.fileno())
        except OSError:
            return  # no descriptor is left to look with: nobody is judged unseen
        if self._engine.is_waiting(number):
            waiting = unread
        else:
            waiting -= words[OUTSIDE]  # read, and left waiting on purpose
        if words[BUSY_SINCE_NS] or waiting <= 0:
            self._watched.pop(number, None)
            return
        self._look(number, faults, now)

    def _look(self, number: int, figure: object, now: float) -> None:
        """Something is to be done and nothing is in hand: does the figure move?"""
        seen, since = self._watched.setdefault(number, (figure, now))
        if seen != figure:
            self._watched[number] = (figure, now)
        elif now - since > STUCK_SECONDS:
            self._watched.pop(number)
            self._kill(number, f"answers no fault for {STUCK_SECONDS:g} s")

    def _kill(self, number: int, why: str) -> None:
        whose = {"worker": number, "client": number} if number != ZERO else {"worker": number}
        self._event("watchdog", f"worker {number} {why}; it is killed", **whose, cause=why)
        self._workforce.kill(number, why)
