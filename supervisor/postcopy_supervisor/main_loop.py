"""The main loop: one thread that waits in a turn of the router and dispatches messages and events to the parts.

All state belongs to this thread. The parts are ports (Protocols), so that the simulation of the tests runs this
dispatcher too."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from postcopy_kernel.log_queue import about
from postcopy_kernel.userfaultfd import PageFault
from postcopy_protocol import messages
from postcopy_protocol.codec import decode, encode, unpack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.zmtp import Message as WireMessage
from postcopy_wire.transport import Router

from .blocks import RamBlock
from .clients.attach_server import AttachServer
from .clients.client_zero import ClientZero
from .clients.worker_zero import NUMBER as ZERO
from .event_log import RecordEvent
from .events import (
    ClientConnected,
    ClientMessage,
    CoreFaults,
    CustodianMessage,
    ListenerEvent,
    PeersRefused,
    ProcessEnded,
    StopRequested,
    Tick,
    WorkerCrashed,
    WorkerEvent,
    WorkerGone,
    WorkerReady,
)
from .observe.queries import LONG, QUESTIONS, LongAnswers, Queries
from .paging.fast_path import SourceFastPath
from .paging.paging import RemotePaging
from .parts import RunState
from .runtime import notify

log = logging.getLogger("postcopy")

FROM_ROUTER = (messages.WorkerHello, messages.Report, messages.Fetched, messages.RequestPages, *QUESTIONS)
LARGE = 31 << 20  # bytes; just below the largest allocation from which glibc (64 bit) learns its threshold
GC_THRESHOLD = 20_000
"""New objects after which Python collects garbage. Nothing here is made of cycles, so it need not look often."""
SWITCH_SECONDS = 0.0002
"""How long another thread may keep the interpreter's lock while this one wants it. Python's own 5 ms would be added to
faults while many clients connect."""
TURNS = 16  # turns of the router after which pages in a staging slot have waited long enough


class Pool(Protocol):
    """The worker pool."""

    events: deque[WorkerEvent]

    def on_hello(self, message: messages.WorkerHello) -> None: ...
    def on_custodian_message(self, message: messages.Message | None, fds: tuple[int, ...]) -> None: ...
    def on_process_ended(self, pidfd: int) -> bool: ...
    def explain(self, worker: int, why: str) -> None: ...
    def send(self, worker: int, data: bytes) -> None: ...


class Release(Protocol):
    """The end of clients."""

    def on_process_ended(self, pidfd: int) -> None: ...
    def failure_reported(self, number: int) -> bool: ...
    def kill(self, number: int, offset: int) -> None: ...


class RemoteSources(Protocol):
    """The links to page sources."""

    @property
    def links(self) -> Mapping[bytes, object]: ...
    @property
    def fast_paths(self) -> Mapping[bytes, SourceFastPath]: ...
    @property
    def parked(self) -> deque[Any]: ...
    def on_message(self, name: bytes, frames: list[memoryview], /) -> bool: ...
    def place_parked(self) -> bool: ...


class Periodic(Protocol):
    """Work that depends on time."""

    def tick(self, now: float, at: float) -> None: ...
    def stream(self) -> None: ...
    def worker_ended(self) -> None: ...


class Replies:
    """Sends answers to the command line, and reports exceptions as bugs."""

    def __init__(self, router: Router, event: RecordEvent) -> None:
        self._router, self._event = router, event

    def send_answer(self, identity: bytes, answer: messages.Message) -> None:
        self._router.send(identity, encode(answer))

    def report_bug(self, what: object, error: Exception) -> None:
        """An event that cannot be handled is a bug. It is logged, and must not end the service of other clients."""
        log.error("cannot handle %.1000s", what, exc_info=error, extra=about("bug", type(error).__name__))
        self._event("bug", f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Ports:
    """What the main loop dispatches to. ``queue`` and ``wakeup`` are the listener's; ``clients``: their numbers."""

    state: RunState
    router: Router
    queue: deque[ListenerEvent]
    wakeup: int
    blocks: Mapping[int, RamBlock]
    clients: Container[int]
    pool: Pool
    attach: AttachServer
    release: Release
    zero: ClientZero
    paging: RemotePaging
    sources: RemoteSources
    periodic: Periodic
    answers: Queries
    long_answers: LongAnswers
    replies: Replies
    event: RecordEvent
    ready_text: str = ""


class MainLoop:
    """Dispatches until the supervisor is asked to end.

    The router takes its handler when it is made, and every part that sends needs the router. So the loop is made first,
    as that handler, and ``start`` gives it the ports before the first turn."""

    _ports: Ports

    def start(self, ports: Ports) -> None:
        """Dispatch to these ports from now on."""
        self._ports = ports
        self._state = ports.state
        self._fast_paths = ports.paging.fast_paths  # filled by ``RemotePaging.learn``
        self._pool = ports.pool
        self._sources = ports.sources
        self._source_fast_paths = ports.sources.fast_paths  # filled by ``Sources``, by ``source_fast_path``

    def run(self) -> None:
        """Serve until the phase is ``ending``. Signal handlers only signal the listener."""
        ports, router, queue = self._ports, self._ports.router, self._ports.queue
        # glibc returns every freed buffer to the kernel, and faults it in again for the next one, until a block of this
        # size has been freed once. None of it is touched.
        bytearray(LARGE)
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        parked, answers, turns = self._sources.parked, ports.long_answers, 0
        while self._state.phase != "ending":
            # Last of all: pages in a slot wait there, clients that fault do not.
            while parked and (turns > TURNS or not router.waiting()):
                turns = 0
                self._place_parked()
            turns += 1
            if answers.open:
                answers.work(router.waiting)
            router.turn()
            while queue:
                self.on_event(queue.popleft())
                if queue and router.waiting():  # many clients that come and go must not keep a fault waiting
                    break

    def on_wakeup(self) -> None:
        """The listener has queued something; ``run`` looks after each turn."""
        os.eventfd_read(self._ports.wakeup)

    def ready(self) -> None:
        """The custodian is there, so an attach does not wait for it."""
        self._state.phase = "running"
        log.info("ready: %s", self._ports.ready_text)
        notify("READY=1")

    def on_message(self, identity: bytes, message: WireMessage) -> None:
        """A message of a worker or of the command line. Most are RequestPages of one page, which take a fast path:
        ``worker_fast_path.on_request``."""
        try:
            data = message if isinstance(message, bytes) else message[-1]
            fast_path = self._fast_paths.get(data[:-OFFSET_BYTES])
            if fast_path is not None:
                fast_path(data)
            else:
                self._decode(identity, data)
        except Exception as error:
            self._ports.replies.report_bug(identity, error)

    def on_source_message(self, name: bytes, frames: list[memoryview]) -> None:
        """A message of a page source. Most are the expected Pages with one frame, which take a fast path:
        ``source_fast_path.on_answer``. All others go to ``Sources.on_message``."""
        try:
            more = self._source_fast_paths[name](bytes(frames[0]), frames[1]) if len(frames) == 2 else None
            if more is None:
                more = self._sources.on_message(name, frames)
            if more:
                self._ports.periodic.stream()
        except Exception as error:
            self._ports.replies.report_bug(name, error)

    def _place_parked(self) -> None:
        try:
            if self._sources.place_parked():
                self._ports.periodic.stream()
        except Exception as error:
            self._ports.replies.report_bug("pages in a staging slot", error)

    def _decode(self, identity: bytes, data: bytes) -> None:
        replies = self._ports.replies
        try:
            message = decode(data, expect=FROM_ROUTER)
            match message:
                case messages.WorkerHello():
                    self._on_hello(message)
                case messages.Report():
                    self._on_report(message)
                case messages.Fetched():
                    self._ports.zero.on_fetched(message)
                case messages.RequestPages():
                    self._on_request(message, data)
                case _ if isinstance(message, LONG):
                    self._ports.long_answers.ask(identity, message)
                case _:
                    replies.send_answer(identity, self._ports.answers.answer(message))
        except BadMessage as error:
            what = "router: what %r sent is no message: %s"
            log.warning(what, identity[:32], error, extra=about("router-nonsense", repr(identity[:32])))
            replies.send_answer(identity, messages.ControlRefused(f"not understood: {error}"))
        self._dispatch_worker_events()

    def _on_hello(self, message: messages.WorkerHello) -> None:
        """A worker has connected. Wakes that were sent to it before are lost, so an empty Wake makes it request
        everything again."""
        self._pool.on_hello(message)
        if message.worker in self._ports.clients and self._sources.links:
            self._pool.send(message.worker, encode(messages.Wake(0, b"")))

    def _on_request(self, message: messages.RequestPages, data: bytes) -> None:
        ports = self._ports
        block = ports.blocks.get(message.block)
        if block is None or message.worker not in ports.clients:
            return
        offsets = unpack_offsets(message.offsets)
        if len(offsets) == 1:
            ports.paging.learn(data, message.worker, block)
        shift = block.page_size.bit_length() - 1
        ports.paging.fault(message.worker, block, [offset >> shift for offset in offsets if offset < block.length])

    def _on_report(self, report: messages.Report) -> None:
        """A worker reports an event."""
        if report.kind == "failed":
            self._pool.explain(report.worker, report.detail)
        if report.kind == "kill":
            self._ports.release.kill(report.worker, report.offset)
        failed = report.kind == "handler-failed" and report.worker != ZERO
        if failed and not self._ports.release.failure_reported(report.worker):
            return None
        block = self._ports.blocks.get(report.block)
        where: dict[str, int | str] = {"worker": report.worker, "cause": report.detail}
        if report.worker != ZERO:
            where["client"] = report.worker
        if block is None:
            return self._ports.event(report.kind, f"worker {report.worker}: {report.detail}", **where)
        where["block"] = block.name
        if report.kind != "source-changed":  # that concerns every missing page
            where |= {"offset": max(0, report.offset), "length": block.page_size}
        text = f"worker {report.worker}: block {block.name} offset {report.offset} {report.detail}"
        return self._ports.event(report.kind, text, **where)

    def on_event(self, event: ListenerEvent) -> None:
        """Dispatch an event of the listener, and the worker events that follow from it."""
        try:
            self._dispatch(event)
            self._dispatch_worker_events()
        except Exception as error:
            self._ports.replies.report_bug(event, error)

    def _dispatch(self, event: ListenerEvent) -> None:
        ports = self._ports
        match event:
            case CoreFaults(faults):
                for message in faults:
                    if isinstance(message, PageFault):
                        ports.zero.fault(message)
                    else:
                        ports.event("foreign-event", f"core userfaultfd: {message}")
            case StopRequested():
                self._state.phase = "ending"
            case CustodianMessage(message, fds):
                ports.pool.on_custodian_message(message, fds)
                if self._state.phase == "starting" and isinstance(message, messages.CustodianReady):
                    self.ready()
            case ProcessEnded(pidfd):
                if not ports.pool.on_process_ended(pidfd):
                    ports.release.on_process_ended(pidfd)
            case ClientConnected(connection, peer, at):
                ports.attach.on_connect(connection, peer, at)
            case PeersRefused(uid, reason, count):
                times = f" ({count} times)" if count > 1 else ""
                ports.event("denied", f"attach socket: {reason}{times}", uid=uid)
            case ClientMessage(connection, uid, message, fds):
                ports.attach.on_message(connection, uid, message, fds)
            case Tick(at):
                ports.periodic.tick(time.monotonic(), at)

    def _dispatch_worker_events(self) -> None:
        ports, queue = self._ports, self._pool.events
        while queue:
            match queue.popleft():
                case WorkerReady(worker) if worker == ZERO:
                    ports.zero.on_worker_ready()
                case WorkerReady(worker):
                    ports.attach.on_worker_ready(worker)
                case WorkerCrashed(worker):
                    ports.periodic.worker_ended()
                    if worker == ZERO:
                        ports.zero.on_worker_crashed()
                case WorkerGone(worker):
                    ports.periodic.worker_ended()
                    if worker != ZERO:
                        ports.attach.on_worker_gone(worker)
