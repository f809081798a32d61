"""The supervisor's main loop: one ROUTER, one porter, and who is told what.

The main thread blocks in recv() of the router, where workers and the command line speak, and where the porter rings
when it has something in its box. All state is this thread's.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

from postcopy_kernel import descriptors, memory, process
from postcopy_kernel.userfaultfd import (
    PageFault,
    UserfaultfdUnavailable,
    open_device,
    open_userfaultfd,
)
from postcopy_protocol import statistics
from postcopy_protocol.codec import decode, encode, unpack_offsets
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import (
    ControlRefused,
    CustodianReady,
    Ending,
    Fetched,
    Message,
    Report,
    RequestPages,
    Wake,
    WorkerHello,
)

from . import briefing, control, ending, status, tracing
from .auditor import Auditor
from .blocks import RamBlock
from .client_zero import NUMBER as ZERO
from .client_zero import ClientZero
from .custody import Custody
from .ending import available_memory
from .exports import Exports
from .history import History
from .paging import Paging
from .porter import (
    ENDPOINT,
    IDENTITY,
    CoreFaults,
    CustodianSaid,
    DoorSaid,
    Happening,
    Porter,
    ProcessEnded,
    QuitAsked,
    SourceWatch,
    Tick,
    Visit,
)
from .reception import Reception
from .runtime import RuntimeDirectory, cgroup_procs, notify
from .settings import Settings
from .sources import Sources
from .watchdog import Watchdog
from .workforce import Workforce

log = logging.getLogger("postcopy")

FROM_ROUTER = (WorkerHello, Report, Fetched, RequestPages, *control.QUESTIONS)
SCARCE = 128 << 20
"""Bytes available on the machine below which only pages that are waited for are placed."""


class House:
    """Everything between the first descriptor and the last."""

    def __init__(self, settings: Settings, runtime: RuntimeDirectory) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.history = History()
        self.limit = descriptors.raise_descriptor_limit()
        self.runtime = runtime
        self.state = "starting"
        self._device = _device()
        self.has_device = self._device >= 0
        self._core = open_userfaultfd(device=self._device if self._device >= 0 else None)
        self._core.handshake()
        self.blocks: dict[str, RamBlock] = {}
        signal.signal(signal.SIGIO, self._lease_wanted)  # before the first lease: unheard, it would end us
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.setsockopt(zmq.MAX_SOCKETS, 16384)
        self._stop_bell = descriptors.create_eventfd()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: descriptors.signal_eventfd(self._stop_bell))
        self.sources = Sources(self._context, settings, self._event)
        advice = self.sources.ask(lambda: bool(select.select([self._stop_bell], [], [], 0)[0]))
        self.blocks = {
            name: RamBlock(number, name, source, settings.page_size, advice[name].size if name in advice else 0)
            for number, (name, source) in enumerate(settings.sources.items(), 1)
        }
        self._by_number = {block.number: block for block in self.blocks.values()}
        self._lease_wanted()
        for block in self.blocks.values():
            block.register(self._core)
        self._quit = descriptors.create_eventfd()
        self._house_fd = memory.create_memfd("postcopy-house", statistics.PAGE_BYTES)
        self._house = memoryview(mmap.mmap(self._house_fd, statistics.PAGE_BYTES)).cast("Q")
        self._house[statistics.WINDOW_LIMIT] = settings.fault_around
        self._router = self._bind()
        self._door = self._open_door()
        self.custody = Custody(runtime.path, device=self._device >= 0)
        self.exports = Exports()
        self._ticked = 0.0
        self._interrupted = False
        self.auditor = Auditor(list(self.blocks.values()), self._event)
        self._people()
        self.sources.connect(self._router, advice, self.blocks, self.paging, self._answer)

    def _people(self) -> None:
        """Porter, workforce, client zero and reception, in the order in which they need one another."""
        self.porter = Porter(self._context, self._core, self._stop_bell, self._door, SourceWatch(self.blocks.values()))
        describe = partial(briefing.brief, self)
        self.workforce = Workforce(self.custody, self.porter, describe, self._news, self._event)
        self.workforce.fleet.policy = self.settings.restart
        self._keep_what_workers_need()
        self.zero = ClientZero(self._core, self._by_number, self.custody, self._send_worker, self._event)
        self.paging = Paging(
            self._core,
            self._by_number,
            self.settings.fault_around,
            self.zero.fetch,
            self._send_worker,
            self.zero.release,
            self._event,
        )
        self.paging.poison_on_loss = self.settings.poison_on_loss
        self.zero.paging = self.paging
        allowed = frozenset({os.geteuid()}) | self.settings.allow_uids
        self.reception = Reception(
            self.blocks, self.custody, self.porter, self._device, allowed, self.limit, self._event
        )
        self.zero.workforce = self.reception.workforce = self.workforce
        self.reception.left = self.paging.left
        self.paging.clients_with = self.reception.with_block
        self.watchdog = Watchdog(
            self.workforce,
            self.reception,
            self.zero,
            self.paging.engine,
            self.settings.handler_timeout,
            self._event,
        )

    def _bind(self) -> zmq.Socket[bytes]:
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.SNDHWM, 1000),
            (zmq.RCVHWM, 10000),
            (zmq.BACKLOG, 1024),
            (zmq.MAXMSGSIZE, 1 << 20),
        ):
            router.setsockopt(option, value)
        router.bind(self.runtime.endpoint)
        router.bind(ENDPOINT)
        return router

    def _open_door(self) -> socket.socket:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.setblocking(False)
        door.bind(self.runtime.door)
        os.chmod(self.runtime.door, 0o666)
        door.listen(1024)
        return door

    def _keep_what_workers_need(self) -> None:
        house = (self._quit, self._house_fd) + ((self._device,) if self._device >= 0 else ())
        self.custody.keep("house", b"", house)
        if self.settings.worker_cgroups:
            self.custody.keep(briefing.CGROUPS, b"", [cgroup_procs(path) for path in self.settings.worker_cgroups])
        for block in self.blocks.values():
            self.custody.keep(f"block/{block.number}", block.name.encode(), block.grant(0)[1])

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to end. Signals wake the porter; nothing else happens in their handlers."""
        self.porter.start()
        self.porter.watch_custodian(self.custody.start())
        while self.state != "ending":
            frames = self._router.recv_multipart(copy=False)
            identity = frames[0].bytes
            if identity in self.sources.links:
                self._guarded(self._source_said, identity, frames)
            elif identity != IDENTITY and len(frames) > 1:
                self._guarded(self._heard, identity, frames[-1].bytes)
            while self.porter.box:
                self._guarded(self._happened, self.porter.box.popleft())
        self._end()

    def _lease_wanted(self, *_: object) -> None:
        """SIGIO: somebody waits in open(2) or truncate(2) for a lease of ours. He waits for us: it is done here."""
        for block in self.blocks.values():
            block.yield_lease()

    def _ready(self) -> None:
        """The first custodian is there: whoever attaches from now on does not wait for it."""
        self.state = "running"
        names = ", ".join(f"{block.name} ({block.size} bytes)" for block in self.blocks.values())
        log.info("ready: %s in %s (pid %d)", names, self.runtime.path, os.getpid())
        notify("READY=1")

    def _guarded(self, act: Callable[..., None], *what: Any) -> None:
        """One event that we cannot handle is a bug, said loudly; it must not take everybody else's memory with it."""
        try:
            act(*what)
        except Exception as error:
            log.exception("cannot handle %s", what[-1])
            self.history.tell("bug", f"{type(error).__name__}: {error}")

    def _source_said(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        if self.sources.heard(identity, frames):
            self.paging.background(self.settings.background_rate, self._memory_left(), time.monotonic())

    def _heard(self, identity: bytes, frame: bytes) -> None:
        try:
            message = decode(frame, expect=FROM_ROUTER)
            match message:
                case WorkerHello():
                    self._hello(message)
                case Report():
                    self._report(message)
                case Fetched():
                    self.zero.fetched(message)
                case RequestPages():
                    self._pages_requested(message)
                case _:
                    self._answer(identity, control.answer(self, message))
        except BadMessage as error:
            log.warning("router: what %r said is no message: %s", identity[:32], error)
            self._answer(identity, ControlRefused(f"not understood: {error}"))

    def _hello(self, message: WorkerHello) -> None:
        """A worker is there. Before its hello the road to it may not have been open, and answers to requests that it
        had sent on its other channel were lost: a wake of nothing tells it to ask anew."""
        self.workforce.hello(message)
        if message.worker in self.reception.clients and self.sources.links:
            self._send_worker(message.worker, Wake(0, b""))

    def _pages_requested(self, message: RequestPages) -> None:
        block = self._by_number.get(message.block)
        if block is None or message.worker not in self.reception.clients:
            return
        offsets = unpack_offsets(message.offsets)
        shift = block.page_size.bit_length() - 1
        self.paging.fault(message.worker, block, [offset >> shift for offset in offsets if offset < block.length])

    def _happened(self, happening: Happening) -> None:
        match happening:
            case CoreFaults(events):
                for event in events:
                    if isinstance(event, PageFault):
                        self.zero.fault(event)
                    else:
                        self._event("foreign-event", f"core userfaultfd: {event}")
            case QuitAsked():
                self.state = "ending"
            case CustodianSaid(message, fds):
                if message is None:
                    cause = "its channel has ended"
                    text = "the custodian died; another is started with everything it kept"
                    self._event("restart", text, pid=self.custody.pid, cause=cause)
                self.workforce.custodian_said(message, fds)
                if self.state == "starting" and isinstance(message, CustodianReady):
                    self._ready()
            case ProcessEnded(pidfd):
                if not self.workforce.process_ended(pidfd):
                    self.reception.process_ended(pidfd)
            case Visit(connection, at):
                self.reception.visit(connection, at)
            case DoorSaid(connection, message, fds):
                self.reception.said(connection, message, fds)
            case Tick(at):
                self._tick(time.monotonic(), at)

    # --- what happens by itself ---------------------------------------------------------------------------------------

    def _tick(self, now: float, at: float) -> None:
        self.workforce.tick()
        self._look_at_memory()
        self.porter.ring_at(self.zero.background(self.settings.background_rate, self.paging.roomy))
        self.sources.tick(now)
        self.paging.background(self.settings.background_rate, self._memory_left(), now)
        self.auditor.step(now)
        if now - self._ticked < 1.0:
            return
        self._ticked = now
        self.reception.tick(at)
        self.reception.wake_resting()
        self.watchdog.tick(now)
        for block in self.blocks.values():
            if self._interrupted and not block.complete:
                block.promote_interrupted()
            if not block.complete and block.look_complete():
                text = f"block {block.name}: every page is received; its clients are released"
                self._event("complete", text, block=block.name)
                if block.number in self.paging.links:
                    self.paging.links[block.number].complete(block.number)
            if block.complete:
                self.reception.release(block)
        self._interrupted = False
        for export in self.exports.unasked():
            export.cancel()
            self.zero.give_up(export.block)

    def _look_at_memory(self) -> None:
        """Under ``--max-memory``, and the machine is not about to run out: else only the pages that are waited for."""
        roomy = available_memory() > SCARCE and self._memory_left() >= self.settings.fault_around
        if roomy != self.paging.roomy:
            self.paging.roomy = roomy
            self._house[statistics.WINDOW_LIMIT] = self.settings.fault_around if roomy else 0
            self._event("memory", "enough again" if roomy else "scarce: fault-around and background work stop")

    def _memory_left(self) -> int:
        """Bytes that may still be placed unasked under ``--max-memory``, less what is on its way."""
        if not self.settings.max_memory:
            return 1 << 62
        placed = sum(os.fstat(block.memory).st_blocks * 512 for block in self.blocks.values())
        coming = sum(link.flow.bytes_in_flight for link in self.sources.links.values())
        return self.settings.max_memory - placed - coming

    # --- workers ------------------------------------------------------------------------------------------------------

    def _news(self, what: str, worker: int) -> None:
        self._interrupted |= what in ("restarting", "gone")
        if what == "ready":
            self.zero.worker_ready() if worker == ZERO else self.reception.worker_ready(worker)
        elif what == "restarting" and worker == ZERO:
            self.zero.worker_lost()
        elif what == "gone" and worker != ZERO:
            self.reception.worker_gone(worker)

    def _report(self, report: Report) -> None:
        """A worker's word: an event, with what it concerns."""
        if report.kind == "failed":
            self.workforce.explain(report.worker, report.detail)
        block = self._by_number.get(report.block)
        where: dict[str, int | str] = {"worker": report.worker, "cause": report.detail}
        if report.worker != ZERO:
            where["client"] = report.worker
        if block is None:
            return self._event(report.kind, f"worker {report.worker}: {report.detail}", **where)
        where["block"] = block.name
        if report.kind != "source-changed":  # which concerns every page that is missing
            where |= {"offset": max(0, report.offset), "length": block.page_size}
        text = f"worker {report.worker}: block {block.name} offset {report.offset} {report.detail}"
        return self._event(report.kind, text, **where)

    def _event(self, kind: str, detail: str, **where: int | str) -> None:
        self.history.tell(kind, detail, **where)

    def _send_worker(self, worker: int, message: Message) -> None:
        slot = self.workforce.fleet.slots.get(worker)
        if slot is not None:
            self._answer(b"w%d.%d" % (worker, slot.incarnation), message)

    def _answer(self, identity: bytes, message: Message) -> None:
        try:
            self._router.send_multipart([identity, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: gone, or not back yet; its successor asks or wakes by itself. EAGAIN: it does not listen.
            log.debug("router: %r does not hear: %s", identity, error)

    @property
    def state_shown(self) -> str:
        """As ``status`` says it: paused while a source is away."""
        paused = any(link.state == "paused" for link in self.paging.links.values())
        return "paused" if paused and self.state == "running" else self.state

    # --- control ------------------------------------------------------------------------------------------------------

    def ask_to_end(self) -> None:
        """As SIGTERM does."""
        descriptors.signal_eventfd(self._stop_bell)

    def document(self) -> bytes:
        blocks = list(self.blocks.values())
        return status.document(
            self.started, self.state, blocks, self.reception, self.workforce, self.zero, self.paging, self.history
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """In order: exports, workers, poison, word to the clients, descriptors."""
        log.info("ending: %d clients", len(self.reception.clients))
        notify("STOPPING=1")
        self._house[statistics.ENDING] = 1
        self._door.close()
        for export in self.exports.running:
            export.cancel()
            self.zero.give_up(export.block)
        ending.workers_leave(self.workforce, self._quit)
        ending.poison_holes(self.reception, self._by_number)
        self.reception.tell_all(Ending("the supervisor ends; pages that are missing cannot come any more"))
        for export in self.exports.running:
            export.join(2)
        self.porter.stop()
        self.custody.end()
        self._router.close()
        self._context.term()
        log.info("ended")


def _device() -> int:
    try:
        return open_device()
    except UserfaultfdUnavailable:
        return -1  # the syscall may do; clients then make theirs by it too


def serve(settings: Settings) -> None:
    """Build the house, live in it. Raises BadInput or UserfaultfdUnavailable when it cannot stand."""
    process.name_process("postcopy-superv")
    if settings.die_with_parent:
        process.die_with_parent(settings.die_with_parent, signal.SIGTERM)
    runtime = RuntimeDirectory(settings.directory)
    try:
        house = House(settings, runtime)
        if settings.trace:
            tracing.install(house, settings.trace)
        if settings.metrics is not None:
            from . import metrics

            metrics.start(house, settings.metrics)
        house.run()
    finally:
        runtime.close()
