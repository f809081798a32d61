"""What the fleet's law says, done: forks ordered, pidfds watched, workers killed, and the news told to whom it
concerns."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from postcopy_kernel import process
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import (
    Assignment,
    CustodianReady,
    ForkFailed,
    Message,
    WorkerExited,
    WorkerForked,
    WorkerHello,
)

from . import fleet
from .custody import Custody
from .fleet import Fleet
from .porter import Porter

log = logging.getLogger(__name__)

Describe = Callable[[int, int, bool], "tuple[list[str], Assignment]"]
"""(worker, incarnation, quarantined) -> keys of its descriptors in order, and what it is told."""
News = Callable[[str, int], None]
"""(``ready``, ``gone``, ``restarting`` or ``quarantined``, worker)."""


@dataclass(frozen=True, slots=True)
class Running:
    """A worker's process."""

    worker: int
    incarnation: int
    pid: int
    pidfd: int


class Workforce:
    """All workers of the house, worker zero among them."""

    def __init__(self, custody: Custody, porter: Porter, describe: Describe, news: News) -> None:
        self.fleet = Fleet()
        self._custody = custody
        self._porter = porter
        self._describe = describe
        self._news = news
        self._running: dict[int, Running] = {}  # by pidfd

    # --- wishes -------------------------------------------------------------------------------------------------------

    def start(self, worker: int) -> None:
        self._do(self.fleet.start(worker, time.monotonic()))

    def renew(self, worker: int) -> None:
        """Its assignment has changed."""
        self._do(self.fleet.renew(worker, time.monotonic()))

    def leave(self, worker: int) -> None:
        self._do(self.fleet.leave(worker, time.monotonic()))

    def kill(self, worker: int, why: str) -> None:
        """The watchdog's word: SIGKILL, and the law of crashes takes its course."""
        for life in self._running.values():
            if life.worker == worker:
                log.warning("worker %d (pid %d) is killed: %s", worker, life.pid, why)
                _kill(life)

    # --- what status shows --------------------------------------------------------------------------------------------

    def pid(self, worker: int) -> int | None:
        slot = self.fleet.slots.get(worker)
        lives = (life for life in self._running.values() if life.worker == worker)
        return next((life.pid for life in lives if slot and life.incarnation == slot.incarnation), None)

    @property
    def restarts(self) -> int:
        return self.fleet.restarts

    @property
    def alive(self) -> list[Running]:
        return list(self._running.values())

    # --- news ---------------------------------------------------------------------------------------------------------

    def custodian_said(self, message: Message | None, fds: tuple[int, ...]) -> None:
        now = time.monotonic()
        match message:
            case None:
                log.error("the custodian is gone; starting another")
                self._custody.lost()
                self._porter.watch_custodian(self._custody.start())
                self._do(self.fleet.custodian_lost(now))
            case CustodianReady():
                log.debug("custodian ready (pid %d)", message.pid)
            case WorkerForked():
                life = Running(message.worker, message.incarnation, message.pid, fds[0])
                self._running[life.pidfd] = life
                self._porter.watch_process(life.pidfd)
                self._do(self.fleet.forked(message.worker, message.incarnation, now))
            case ForkFailed():
                log.error("worker %d could not be forked: %s", message.worker, message.reason)
                self._do(self.fleet.fork_failed(message.worker, message.incarnation, now))
            case WorkerExited():
                self._log_exit(message)

    def hello(self, message: WorkerHello) -> None:
        self._do(self.fleet.hello(message.worker, message.incarnation, time.monotonic()))

    def process_ended(self, pidfd: int) -> bool:
        """A pidfd says that its process is gone: was it a worker's?"""
        life = self._running.pop(pidfd, None)
        if life is None:
            return False
        os.close(pidfd)
        slot = self.fleet.slots.get(life.worker)
        if slot is not None and slot.state != "ending" and slot.incarnation == life.incarnation:
            self._news("restarting", life.worker)
        self._do(self.fleet.exited(life.worker, life.incarnation, time.monotonic()))
        return True

    def tick(self) -> None:
        self._custody.flush()
        self._do(self.fleet.tick(time.monotonic()))

    def _log_exit(self, message: WorkerExited) -> None:
        code = os.waitstatus_to_exitcode(message.status)
        slot = self.fleet.slots.get(message.worker)
        expected = code == 0 or slot is None or slot.state == "ending" or slot.incarnation != message.incarnation
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        log.log(logging.DEBUG if expected else logging.WARNING, "worker %d ended with %s", message.worker, how)

    # --- effects ------------------------------------------------------------------------------------------------------

    def _do(self, effects: list[fleet.Effect]) -> None:
        for effect in effects:
            match effect:
                case fleet.Fork(worker, incarnation):
                    quarantined = self.fleet.slots[worker].quarantined
                    keys, assignment = self._describe(worker, incarnation, quarantined)
                    self._custody.fork(worker, incarnation, keys, encode(assignment))
                case fleet.Kill(worker, incarnation):
                    for life in self._running.values():
                        if (life.worker, life.incarnation) == (worker, incarnation):
                            _kill(life)
                case fleet.Ready(worker):
                    self._news("ready", worker)
                case fleet.Gone(worker):
                    self._news("gone", worker)
                case fleet.Quarantine(worker):
                    self._news("quarantined", worker)
        self._porter.ring_at(0.0 if self._custody.behind else self.fleet.next_due())


def _kill(life: Running) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself; its pidfd will say so
        process.pidfd_signal(life.pidfd, signal.SIGKILL)
