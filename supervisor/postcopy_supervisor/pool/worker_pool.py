"""The pool of worker processes: carries out what the lifecycle decides, and sends messages to workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from postcopy_kernel import process
from postcopy_protocol import messages
from postcopy_protocol.codec import encode
from postcopy_protocol.errors import BadInput
from postcopy_wire.transport import FULL, SENT, Router

from ..event_log import RecordEvent
from ..events import WorkerCrashed, WorkerEvent, WorkerGone, WorkerReady
from . import lifecycle
from .custodian_client import CustodianClient
from .lifecycle import Lifecycle, RestartPolicy

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # between two attempts to start a custodian
EXPLAIN_SECONDS = 1.0
"""The event of a restart waits this long for the custodian, which reaps the worker and reports how it ended."""


class Assignments(Protocol):
    """What a worker is given at its start."""

    def assign(self, worker: int, incarnation: int, quarantined: bool) -> tuple[list[str], messages.Assignment]:
        """The custodian's keys of its descriptors, in order, and its assignment."""
        ...


class QuarantineNotes(Protocol):
    """Where it is noted for a later supervisor that a client is quarantined."""

    def set_quarantined(self, number: int, quarantined: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Process:
    """One incarnation of a worker, running."""

    worker: int
    incarnation: int
    pid: int
    pidfd: int

    @property
    def key(self) -> IncarnationKey:
        return self.worker, self.incarnation


IncarnationKey = tuple[int, int]  # worker and incarnation


class Watcher(Protocol):
    """The listener, as far as the pool needs it."""

    def watch_process(self, pidfd: int) -> None: ...
    def watch_custodian(self, channel: socket.socket) -> None: ...
    def tick_at(self, due: float | None) -> None: ...


class WorkerPool:
    """All workers, including worker zero. ``events``: what the main loop has to dispatch."""

    def __init__(
        self,
        policy: RestartPolicy,
        custodian: CustodianClient,
        watcher: Watcher,
        router: Router,
        assignments: Assignments,
        notes: QuarantineNotes,
        event: RecordEvent,
    ) -> None:
        self.events: deque[WorkerEvent] = deque()
        self.policy = policy
        self._lifecycle = Lifecycle(policy)
        self.slots = self._lifecycle.slots
        self._custodian, self._watcher, self._router, self._assignments = custodian, watcher, router, assignments
        self._notes, self._event = notes, event
        self._by_pidfd: dict[int, Process] = {}
        self._by_key: dict[IncarnationKey, Process] = {}
        self._causes: dict[IncarnationKey, str] = {}  # why an incarnation ends, as far as it is known
        self._unreported: dict[IncarnationKey, tuple[Process, float]] = {}  # crashes, and when to report them
        self._custodian_due: float | None = None

    def adopt(self, running: Process, wanted: bool, quarantined: bool) -> None:
        """Continue a worker of the previous supervisor; kill it when it is not ``wanted``."""
        self._add(running)
        self.skip_incarnations(*running.key)
        if wanted:
            self._do(self._lifecycle.adopt(*running.key, quarantined, time.monotonic()))
        else:
            _kill(running)

    def _add(self, running: Process) -> None:
        self._by_pidfd[running.pidfd] = self._by_key[running.key] = running
        self._watcher.watch_process(running.pidfd)

    def skip_incarnations(self, worker: int, incarnation: int) -> None:
        """New incarnations of this worker get numbers above ``incarnation``."""
        used = self._lifecycle.used
        used[worker] = max(used.get(worker, 0), incarnation)

    def start(self, worker: int, quarantined: bool = False) -> None:
        self._do(self._lifecycle.start(worker, time.monotonic(), quarantined))

    def reassign(self, worker: int, needed: bool) -> None:
        """The client's regions have changed: start, replace or (not ``needed``) end its worker."""
        if worker not in self.slots:
            if needed:
                self.start(worker)
        elif needed:
            self._do(self._lifecycle.renew(worker, time.monotonic()))
        else:
            self.leave(worker)

    def leave(self, worker: int) -> None:
        self._do(self._lifecycle.leave(worker, time.monotonic()))

    def resume(self, worker: int) -> None:
        """End its quarantine. Raises BadInput if it is not quarantined."""
        slot = self.slots.get(worker)
        if slot is None or not slot.quarantined:
            raise BadInput(f"client {worker} is not quarantined")
        text = f"worker {worker}: quarantine ended by an operator"
        self._event("resumed", text, **_worker_fields(worker, slot.incarnation))
        self._do(self._lifecycle.resume(worker, time.monotonic()))

    @property
    def resting(self) -> list[int]:
        """Quarantined workers that do not run: missing pages of their clients wait."""
        return [slot.worker for slot in self.slots.values() if slot.state == "resting"]

    def kill(self, worker: int, why: str) -> None:
        """SIGKILL; its end counts as a crash."""
        for running in self._by_pidfd.values():
            if running.worker == worker:
                self._causes[running.key] = f"watchdog: {why}"
                _kill(running)

    def explain(self, worker: int, why: str) -> None:
        """A worker reports why it is about to end."""
        for running in self._by_pidfd.values():
            if running.worker == worker:
                self._causes[running.key] = why

    def send(self, worker: int, data: bytes) -> None:
        """Send an encoded message, such as Wake, by ``Router.send``; nothing is sent to a worker that is gone, or that
        has not connected yet. A worker whose queue is full is killed: a lost Wake would leave its client asleep, and a
        successor wakes every waiter."""
        slot = self.slots.get(worker)
        if slot is not None and self._router.send(slot.routing_id, data) == FULL:
            self.kill(worker, "does not read its messages")

    def try_send(self, worker: int, message: messages.Message) -> bool:
        """True when the router has taken the message, so it knows a connection to this worker."""
        slot = self.slots.get(worker)
        return slot is not None and self._router.send(slot.routing_id, encode(message)) == SENT

    def pid(self, worker: int) -> int | None:
        slot = self.slots.get(worker)
        running = self._by_key.get((worker, slot.incarnation)) if slot is not None else None
        return running.pid if running is not None else None

    def restarts_of(self, worker: int) -> int:
        """Of its client: also while it has no worker."""
        return self._lifecycle.restarts_of.get(worker, 0)

    def forget(self, worker: int) -> None:
        """Its client has left; another will have another number."""
        self._lifecycle.restarts_of.pop(worker, None)

    @property
    def restarts(self) -> int:
        return self._lifecycle.restarts

    @property
    def running(self) -> list[Process]:
        return list(self._by_pidfd.values())

    def unanswered(self, now: float) -> float:
        """Seconds for which the custodian has answered none of the open orders to fork."""
        return self._lifecycle.unanswered(now)

    def on_custodian_message(self, message: messages.Message | None, fds: tuple[int, ...]) -> None:
        now = time.monotonic()
        match message:
            case None:
                text = "the custodian died; another is started with everything it kept"
                self._event("restart", text, pid=self._custodian.pid, cause="its channel has ended")
                self._custodian.lost()
                self._start_custodian(now)
            case messages.CustodianReady():
                log.debug("custodian ready (pid %d)", message.pid)
            case messages.WorkerForked():
                self._add(Process(message.worker, message.incarnation, message.pid, fds[0]))
                self._do(self._lifecycle.forked(message.worker, message.incarnation, now))
            case messages.ForkFailed():
                text = f"worker {message.worker} could not be forked; it is tried again"
                self._event(
                    "restart", text, **_worker_fields(message.worker, message.incarnation), cause=message.reason
                )
                self._do(self._lifecycle.fork_failed(message.worker, message.incarnation, now))
            case messages.WorkerExited():
                self._on_reaped(message)

    def _start_custodian(self, now: float) -> None:
        """Start another in place of the lost one. Without it no worker could be replaced, so it is tried again until
        there is room."""
        try:
            channel = self._custodian.start()
        except OSError as error:
            if self._custodian_due is None:
                text = f"the custodian cannot be started: {error.strerror}; it is tried again"
                self._event("restart", text, cause=str(error.strerror))
            self._custodian_due = now + RETRY_SECONDS
            return
        self._custodian_due = None
        self._watcher.watch_custodian(channel)
        self._hand_over_workers()
        self._do(self._lifecycle.custodian_lost(now))

    def _hand_over_workers(self) -> None:
        """Give a new custodian, which has not forked the workers, what it needs to replace them without a
        supervisor."""
        for running in self._by_pidfd.values():
            slot = self.slots.get(running.worker)
            if slot is not None and slot.state in ("starting", "running") and slot.incarnation == running.incarnation:
                keys, assignment = self._assign(*running.key, slot.quarantined)
                self._custodian.adopt(*running.key, running.pid, running.pidfd, keys, assignment)

    def _assign(self, worker: int, incarnation: int, quarantined: bool) -> tuple[Sequence[str], bytes]:
        """Keys and assignment. The quarantine is noted first: a worker without a source must never have a client that a
        later supervisor believes to be trusted."""
        self._notes.set_quarantined(worker, quarantined)
        keys, assignment = self._assignments.assign(worker, incarnation, quarantined)
        return keys, encode(assignment)

    def on_hello(self, message: messages.WorkerHello) -> None:
        self._do(self._lifecycle.hello(message.worker, message.incarnation, time.monotonic()))

    def on_process_ended(self, pidfd: int) -> bool:
        """A pidfd says that its process has ended. False: it was no worker's."""
        ended = self._by_pidfd.pop(pidfd, None)
        if ended is None:
            return False
        os.close(pidfd)
        if self._by_key.get(ended.key) is ended:
            del self._by_key[ended.key]
        slot = self.slots.get(ended.worker)
        now = time.monotonic()
        if slot is not None and slot.state != "ending" and slot.incarnation == ended.incarnation:
            self.events.append(WorkerCrashed(ended.worker))
            self._unreported[ended.key] = ended, now + EXPLAIN_SECONDS
        self._do(self._lifecycle.exited(ended.worker, ended.incarnation, now))
        if ended.key in self._causes:
            self._report_end(ended.key)
        return True

    def tick(self, now: float) -> None:
        self._custodian.flush()
        if self._custodian_due is not None and now >= self._custodian_due:
            self._start_custodian(now)
        for key in [key for key, (_, due) in self._unreported.items() if now >= due]:
            self._report_end(key)
        self._do(self._lifecycle.tick(now))

    def _on_reaped(self, message: messages.WorkerExited) -> None:
        """The custodian reports how a worker ended, a moment before or after its pidfd is readable."""
        code = os.waitstatus_to_exitcode(message.status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        log.debug("worker %d ended with %s", message.worker, how)
        key = message.worker, message.incarnation
        if key in self._unreported or key in self._by_key:
            self._causes.setdefault(key, how)  # what the watchdog or the worker itself reported says more
        if key in self._unreported:
            self._report_end(key)

    def _report_end(self, key: IncarnationKey) -> None:
        """Report a crash as an event, with the cause as far as it is known."""
        cause = self._causes.pop(key, "unknown: the custodian did not report it")
        ended, _ = self._unreported.pop(key, (None, 0.0))
        if ended is None:
            return  # it was asked to end
        slot = self.slots.get(ended.worker)
        then = "it has no successor" if slot is not None and slot.state == "resting" else "a successor takes over"
        text = f"worker {ended.worker} (pid {ended.pid}) ended unexpectedly: {cause}; {then}"
        where: dict[str, int | str] = {**_worker_fields(*key), "pid": ended.pid, "cause": cause}
        if slot is not None:
            where["restarts"] = slot.restarts
        self._event("restart", text, **where)

    def _report_slow_start(self, running: Process) -> None:
        """Report a worker that is killed because it sent no hello in time."""
        slot = self.slots.get(running.worker)
        if slot is not None and slot.state == "starting" and slot.incarnation == running.incarnation:
            why = f"says nothing for {self.policy.start_deadline:g} s"
            self._causes[running.key] = f"watchdog: {why}"
            text = f"worker {running.worker} (pid {running.pid}) {why} after its start; it is killed"
            self._event("watchdog", text, **_worker_fields(*running.key), pid=running.pid, cause=why)

    def _report_quarantine(self, worker: int) -> None:
        slot, policy = self.slots[worker], self.policy
        cause = f"{len(slot.crashes)} crashes in {policy.interval:g} s, {policy.limit} are forgiven"
        text = f"worker {worker} crashed too often; its client's missing pages "
        text += "are poisoned" if policy.poison else f"wait for: postcopy resume {worker}"
        where = _worker_fields(worker, slot.incarnation)
        self._event("quarantined", text, **where, restarts=slot.restarts, cause=cause)

    def _do(self, effects: list[lifecycle.Effect]) -> None:
        for effect in effects:
            match effect:
                case lifecycle.Fork(worker, incarnation):
                    keys, assignment = self._assign(worker, incarnation, self.slots[worker].quarantined)
                    self._custodian.fork(worker, incarnation, keys, assignment)
                case lifecycle.Kill(worker, incarnation):
                    for running in self._by_pidfd.values():
                        if running.key == (worker, incarnation):
                            self._report_slow_start(running)
                            _kill(running)
                case lifecycle.Ready(worker):
                    self.events.append(WorkerReady(worker))
                case lifecycle.Gone(worker):
                    self.events.append(WorkerGone(worker))
                case lifecycle.Quarantine(worker):
                    self._report_quarantine(worker)
                    self._notes.set_quarantined(worker, True)
        self._watcher.tick_at(0.0 if self._custodian.behind else self._lifecycle.next_due())


def _worker_fields(worker: int, incarnation: int) -> dict[str, int | str]:
    """Fields of an event about a worker. A client has its worker's number; worker zero has no client."""
    fields: dict[str, int | str] = {"worker": worker, "incarnation": incarnation}
    return {"client": worker, **fields} if worker else fields


def _kill(running: Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already; its pidfd reports that
        process.pidfd_signal(running.pidfd, signal.SIGKILL)
