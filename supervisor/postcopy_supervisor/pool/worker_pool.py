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
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import (
    Assignment,
    CustodianReady,
    ForkFailed,
    Message,
    WorkerExited,
    WorkerForked,
    WorkerHello,
)

from ..listener import Listener
from ..observe.event_log import Tell
from ..recovery.plan import KeptWorker
from . import lifecycle
from .custodian_client import CustodianClient
from .lifecycle import Lifecycle

log = logging.getLogger(__name__)

Describe = Callable[[int, int, bool], "tuple[list[str], Assignment]"]
"""(worker, incarnation, quarantined) -> keys of its descriptors in order, and what it is told."""
News = Callable[[str, int], None]
"""(``ready``, ``gone``, ``restarting`` or ``quarantined``, worker)."""
AGAIN_SECONDS = 1.0
"""Between two tries to start a custodian."""
EXPLAIN_SECONDS = 1.0
"""For so long a restart waits to be told, because the custodian, which reaps, says how the worker ended."""


@dataclass(frozen=True, slots=True)
class Running:
    """A worker's process."""

    worker: int
    incarnation: int
    pid: int
    pidfd: int

    @property
    def key(self) -> Life:
        return self.worker, self.incarnation


Life = tuple[int, int]
"""Worker and incarnation."""


class WorkerPool:
    """All workers of the house, worker zero among them."""

    def __init__(self, custody: CustodianClient, porter: Listener, describe: Describe, news: News, tell: Tell) -> None:
        self.fleet = Lifecycle()
        self._custody = custody
        self._porter = porter
        self._describe = describe
        self._news = news
        self._tell = tell
        self._running: dict[int, Running] = {}  # by pidfd
        self._lives: dict[Life, Running] = {}  # the same by what they are
        self._causes: dict[Life, str] = {}  # of lives that end, or have ended untold
        self._untold: dict[Life, tuple[Running, float]] = {}
        self._custodian_due: float | None = None

    # --- wishes -------------------------------------------------------------------------------------------------------

    def adopt(self, life: KeptWorker, wanted: bool, quarantined: bool) -> None:
        """A worker of the supervisor before us goes on; or, not ``wanted`` any more, it ends."""
        running = Running(life.worker, life.incarnation, life.pid, life.pidfd)
        self._runs(running)
        self.used(life.worker, life.incarnation)
        if wanted:
            self._do(self.fleet.adopt(life.worker, life.incarnation, quarantined, time.monotonic()))
        else:
            _kill(running)

    def _runs(self, life: Running) -> None:
        self._running[life.pidfd] = self._lives[life.key] = life
        self._porter.watch_process(life.pidfd)

    def used(self, worker: int, incarnation: int) -> None:
        """Some life of this worker had this number."""
        self.fleet.used[worker] = max(self.fleet.used.get(worker, 0), incarnation)

    def start(self, worker: int, quarantined: bool = False) -> None:
        self._do(self.fleet.start(worker, time.monotonic(), quarantined))

    def renew(self, worker: int) -> None:
        """Its assignment has changed."""
        self._do(self.fleet.renew(worker, time.monotonic()))

    def leave(self, worker: int) -> None:
        self._do(self.fleet.leave(worker, time.monotonic()))

    def resume(self, worker: int) -> None:
        """End its quarantine. Raises BadInput if it is in none."""
        slot = self.fleet.slots.get(worker)
        if slot is None or not slot.quarantined:
            raise BadInput(f"client {worker} is not quarantined")
        self._tell("resumed", f"worker {worker}: quarantine ended by an operator", **_whose(worker, slot.incarnation))
        self._do(self.fleet.resume(worker, time.monotonic()))

    @property
    def resting(self) -> list[int]:
        """Quarantined workers that do not run: what their clients miss waits."""
        return [slot.worker for slot in self.fleet.slots.values() if slot.state == "resting"]

    def kill(self, worker: int, why: str) -> None:
        """The watchdog's word: SIGKILL, and the law of crashes takes its course."""
        for life in self._running.values():
            if life.worker == worker:
                self._causes[life.key] = f"watchdog: {why}"
                _kill(life)

    def explain(self, worker: int, why: str) -> None:
        """A worker's own last word: why it ends."""
        for life in self._running.values():
            if life.worker == worker:
                self._causes[life.key] = why

    # --- what status shows --------------------------------------------------------------------------------------------

    def pid(self, worker: int) -> int | None:
        slot = self.fleet.slots.get(worker)
        life = self._lives.get((worker, slot.incarnation)) if slot is not None else None
        return life.pid if life is not None else None

    def restarts_of(self, worker: int) -> int:
        """Of one worker."""
        slot = self.fleet.slots.get(worker)
        return slot.restarts if slot is not None else 0

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
                self._start_custodian(now)
            case CustodianReady():
                log.debug("custodian ready (pid %d)", message.pid)
            case WorkerForked():
                life = Running(message.worker, message.incarnation, message.pid, fds[0])
                self._runs(life)
                self._do(self.fleet.forked(message.worker, message.incarnation, now))
            case ForkFailed():
                text = f"worker {message.worker} could not be forked; it is tried again"
                self._tell("restart", text, **_whose(message.worker, message.incarnation), cause=message.reason)
                self._do(self.fleet.fork_failed(message.worker, message.incarnation, now))
            case WorkerExited():
                self._reaped(message)

    def _start_custodian(self, now: float) -> None:
        """Another in the place of the one that is gone. Where there is no room for it, it is tried again until there
        is: without it nobody could be replaced any more."""
        try:
            channel = self._custody.start()
        except OSError as error:
            if self._custodian_due is None:
                text = f"the custodian cannot be started: {error.strerror}; it is tried again"
                self._tell("restart", text, cause=str(error.strerror))
            self._custodian_due = now + AGAIN_SECONDS
            return
        self._custodian_due = None
        self._porter.watch_custodian(channel)
        self._tell_of_workers()
        self._do(self.fleet.custodian_lost(now))

    def _tell_of_workers(self) -> None:
        """The new custodian has not forked them: it is told what it needs to replace them when no supervisor lives."""
        for life in self._running.values():
            slot = self.fleet.slots.get(life.worker)
            if slot is not None and slot.state in ("starting", "running") and slot.incarnation == life.incarnation:
                keys, assignment = self._describe(life.worker, life.incarnation, slot.quarantined)
                self._custody.adopt(life.worker, life.incarnation, life.pid, life.pidfd, keys, encode(assignment))

    def hello(self, message: WorkerHello) -> None:
        self._do(self.fleet.hello(message.worker, message.incarnation, time.monotonic()))

    def process_ended(self, pidfd: int) -> bool:
        """A pidfd says that its process is gone: was it a worker's?"""
        life = self._running.pop(pidfd, None)
        if life is None:
            return False
        os.close(pidfd)
        if self._lives.get(life.key) is life:
            del self._lives[life.key]
        slot = self.fleet.slots.get(life.worker)
        now = time.monotonic()
        unasked = slot is not None and slot.state != "ending" and slot.incarnation == life.incarnation
        if unasked:
            self._news("restarting", life.worker)
            self._untold[life.key] = life, now + EXPLAIN_SECONDS
        self._do(self.fleet.exited(life.worker, life.incarnation, now))
        if life.key in self._causes:
            self._tell_end(life.key)
        return True

    def tick(self) -> None:
        self._custody.flush()
        now = time.monotonic()
        if self._custodian_due is not None and now >= self._custodian_due:
            self._start_custodian(now)
        for key in [key for key, (_, due) in self._untold.items() if now >= due]:
            self._tell_end(key)
        self._do(self.fleet.tick(now))

    def _reaped(self, message: WorkerExited) -> None:
        """The custodian's word on how a worker ended; it comes a moment before or after that of its pidfd."""
        code = os.waitstatus_to_exitcode(message.status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        log.debug("worker %d ended with %s", message.worker, how)
        key = message.worker, message.incarnation
        if key in self._untold or key in self._lives:
            self._causes.setdefault(key, how)  # the watchdog's word, or its own, says more
        if key in self._untold:
            self._tell_end(key)

    def _tell_end(self, key: Life) -> None:
        """A worker that nobody told to has ended: the event, with the cause as far as it is known."""
        cause = self._causes.pop(key, "unknown: nobody has reaped it")
        life, _ = self._untold.pop(key, (None, 0.0))
        if life is None:
            return  # it was to end
        slot = self.fleet.slots.get(life.worker)
        then = "it has no successor" if slot is not None and slot.state == "resting" else "a successor takes over"
        text = f"worker {life.worker} (pid {life.pid}) ended unasked: {cause}; {then}"
        where: dict[str, int | str] = {**_whose(*key), "pid": life.pid, "cause": cause}
        if slot is not None:
            where["restarts"] = slot.restarts
        self._tell("restart", text, **where)

    def _killed(self, life: Running) -> None:
        """By the law: when it was not to end, because it was too slow to start."""
        slot = self.fleet.slots.get(life.worker)
        if slot is not None and slot.state == "starting" and slot.incarnation == life.incarnation:
            why = f"says nothing for {self.fleet.policy.start_deadline:g} s"
            self._causes[life.key] = f"watchdog: {why}"
            text = f"worker {life.worker} (pid {life.pid}) {why} after its start; it is killed"
            self._tell("watchdog", text, **_whose(*life.key), pid=life.pid, cause=why)

    def _tell_quarantine(self, worker: int) -> None:
        slot, policy = self.fleet.slots[worker], self.fleet.policy
        cause = f"{len(slot.crashes)} crashes in {policy.interval:g} s, {policy.limit} are forgiven"
        text = f"worker {worker} crashed too often; its client's missing pages "
        text += "are poisoned" if policy.poison else f"wait for: postcopy resume {worker}"
        self._tell("quarantined", text, **_whose(worker, slot.incarnation), restarts=slot.restarts, cause=cause)

    # --- effects ------------------------------------------------------------------------------------------------------

    def _do(self, effects: list[lifecycle.Effect]) -> None:
        for effect in effects:
            match effect:
                case lifecycle.Fork(worker, incarnation):
                    quarantined = self.fleet.slots[worker].quarantined
                    keys, assignment = self._describe(worker, incarnation, quarantined)
                    self._custody.fork(worker, incarnation, keys, encode(assignment))
                case lifecycle.Kill(worker, incarnation):
                    for life in self._running.values():
                        if (life.worker, life.incarnation) == (worker, incarnation):
                            self._killed(life)
                            _kill(life)
                case lifecycle.Ready(worker):
                    self._news("ready", worker)
                case lifecycle.Gone(worker):
                    self._news("gone", worker)
                case lifecycle.Quarantine(worker):
                    self._tell_quarantine(worker)
                    self._news("quarantined", worker)
        self._porter.ring_at(0.0 if self._custody.behind else self.fleet.next_due())


def _whose(worker: int, incarnation: int) -> dict[str, int | str]:
    """The fields of an event about a worker; a client has its worker's number, worker zero has no client."""
    who: dict[str, int | str] = {"worker": worker, "incarnation": incarnation}
    return {"client": worker, **who} if worker else who


def _kill(life: Running) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself; its pidfd will say so
        process.pidfd_signal(life.pidfd, signal.SIGKILL)
