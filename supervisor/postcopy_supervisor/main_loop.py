"""The supervisor's main loop: one ROUTER, one porter, and who is told what.

The main thread waits in a turn of the router, where workers, sources and the command line speak, and where the porter
rings when it has something in its box. All state is this thread's.
"""

from __future__ import annotations

import contextlib
import gc
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

from postcopy_kernel import crashpoints, descriptors, memory, process
from postcopy_kernel.userfaultfd import PageFault, UserfaultfdUnavailable, open_device, open_userfaultfd
from postcopy_protocol import counters, trace
from postcopy_protocol.codec import decode, encode, unpack_offsets
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import (
    ControlRefused,
    CustodianReady,
    Ending,
    Fetched,
    Message,
    Report,
    RequestPages,
    Wake,
    WhenOrphaned,
    WorkerHello,
)
from postcopy_protocol.templates import OFFSET_BYTES
from postcopy_protocol.zmtp import Message as Words
from postcopy_wire.factory import open_router
from postcopy_wire.transport import FULL, SENT, Router

from . import assignment, shutdown
from .adopt import PendingWorkers, adopt
from .blocks import RamBlock
from .clients.attach_server import AttachServer
from .clients.client_zero import NUMBER as ZERO
from .clients.client_zero import ClientZero
from .exports import Exports
from .listener import (
    ClientConnected,
    ClientMessage,
    CoreFaults,
    CustodianMessage,
    Listener,
    ListenerEvent,
    ProcessEnded,
    QuitAsked,
    SourceWatch,
    Tick,
)
from .observe import queries, status, trace_points
from .observe.audit import Auditor
from .observe.desk import Desk
from .observe.event_log import History
from .observe.recorder import Recorder
from .paging.engine import Engine
from .paging.paging import RemotePaging
from .paging.placer import Placer
from .paging.wakers import Wakers
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import WorkerPool
from .recovery import inventory
from .recovery.inventory import Custodian
from .recovery.plan import Plan
from .remote.advise import SourceAccess
from .remote.sources import Sources
from .runtime import RuntimeDirectory, SignOfLife, cgroup_procs, made, notify
from .settings import Settings
from .shutdown import available_memory
from .watchdog import Watchdog

log = logging.getLogger("postcopy")

FROM_ROUTER = (WorkerHello, Report, Fetched, RequestPages, *queries.QUESTIONS)
LARGE = 31 << 20
"""Bytes; just below the largest that glibc (any, 64 bit) learns its threshold from."""
NEWCOMER_SECONDS = 5.0
"""For so long a supervisor that takes over asks the sources of new blocks: who is on trial replaces no worker yet."""
RARELY = 20_000
"""Objects more than before at which Python looks for garbage."""
LINGER = 0.5
"""Seconds in which whoever has asked may still take its answer at the end."""
TURNS = 16
"""Messages after which pages in a slot have waited long enough."""
SCARCE = 128 << 20
"""Bytes available on the machine below which only pages that are waited for are placed."""


class MainLoop:
    """Everything between the first descriptor and the last."""

    def __init__(
        self, settings: Settings, runtime: RuntimeDirectory, plan: Plan, custodian: Custodian | None = None
    ) -> None:
        """``custodian``: that of the supervisor before us, from which ``plan`` was made."""
        self.settings = settings
        self.started = time.monotonic()
        self.history = History()
        self.limit = descriptors.raise_descriptor_limit()
        self.runtime = runtime
        self.state = "starting"
        self._quit, self._house_fd, self._device = _furniture(plan.house)
        self.has_device = self._device >= 0
        self._core = open_userfaultfd(device=self._device if self._device >= 0 else None)
        self._core.handshake()
        self.blocks: dict[str, RamBlock] = {}
        signal.signal(signal.SIGIO, self._lease_wanted)  # before the first lease: unheard, it would end us
        self._stop_bell = descriptors.create_eventfd()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: descriptors.signal_eventfd(self._stop_bell))
        self._access = SourceAccess(settings)
        advice = self._access.ask(plan.advice, partial(self._cannot_wait, plan.recovers))
        self.blocks = {
            name: RamBlock(
                plan.numbers[name], name, source, settings.page_size, advice.get(name), plan.blocks.get(name)
            )
            for name, source in settings.sources.items()
        }
        self._by_number = {block.number: block for block in self.blocks.values()}
        self._lease_wanted()
        for block in self.blocks.values():
            block.register(self._core)
        self._house = memoryview(mmap.mmap(self._house_fd, counters.PAGE_BYTES)).cast("Q")
        self._house[counters.WINDOW_LIMIT] = settings.fault_around
        self._house[counters.ENDING] = 0  # a predecessor may have been killed at its end
        self._router = self._bind()
        self._door = self._open_door()
        orphans = WhenOrphaned(int(settings.orphan_timeout * 1000), settings.poison_orphans)
        self.custody = CustodianClient(runtime.path, orphans, device=self.has_device)
        if custodian is not None:
            self.custody.take_over(custodian.channel, custodian.pid, custodian.pidfd)
        self.exports = Exports()
        self._ticked = 0.0
        self._interrupted = False
        self._keep_workers = False
        self._alive = SignOfLife()
        self.returning = PendingWorkers(self._reach)
        self.auditor = Auditor(list(self.blocks.values()), self._event)
        self.desk = Desk(partial(queries.long_answer, self), self._answer, self._bug)
        self._people()
        self.recorder = self._recording()
        self._router.watch(self.porter.bell, self._rung)
        self.sources = Sources(
            settings, self._access, self._router, advice, self.blocks, self.paging, self._source_said, self._event
        )
        adopt(plan, self.custody, self.workforce, self.reception)
        self.returning.expect({number for block in self.paging.links for number in self.reception.with_block(block)})
        if plan.recovers:
            crashpoints.at("takeover.moved")
            self._recovered(plan)

    def _cannot_wait(self, recovers: bool) -> str:
        """Why a source that does not answer is waited for no longer, or nothing."""
        if select.select([self._stop_bell], [], [], 0)[0]:
            return "told to end"
        if recovers and time.monotonic() - self.started > NEWCOMER_SECONDS:
            return "the clients that are taken over cannot wait for a new block; nothing is changed: start it first"
        return ""

    def _recovered(self, plan: Plan) -> None:
        self._house[counters.RECOVERED] += 1
        for link in self.sources.links.values():
            link.inherited = True
        took = (time.monotonic() - self.started) * 1000
        text = (
            f"{len(plan.clients)} clients, {len(plan.workers)} workers and {len(plan.blocks)} blocks of the supervisor"
        )
        self._event("recover", f"{text} before us are taken over, in {took:.0f} ms")

    @property
    def recovered(self) -> int:
        """How many supervisors have taken over from one that was gone."""
        return int(self._house[counters.RECOVERED])

    def _recording(self) -> Recorder | None:
        """Where faults are recorded, clients' figures have room for it, and somebody to take it out."""
        if not self.settings.record:
            return None
        recorder = Recorder(self.settings.record, self.blocks.values(), self.reception.clients.keys())
        self.reception.figures_bytes, self.reception.figures_made = trace.FIGURES_BYTES, recorder.add
        return recorder

    def _people(self) -> None:
        """Listener, workforce, client zero and reception, in the order in which they need one another."""
        self.porter = Listener(self._core, self._stop_bell, self._door, SourceWatch(self.blocks.values()))
        describe = partial(assignment.brief, self)
        self.workforce = WorkerPool(self.custody, self.porter, describe, self._news, self._event)
        self.workforce.fleet.policy = self.settings.restart
        self._keep_what_workers_need()
        self.zero = ClientZero(self._core, self._by_number, self.custody, self._send_worker, self._event)
        allowed = frozenset({os.geteuid()}) | self.settings.allow_uids
        self.reception = AttachServer(
            self.blocks, self.custody, self.porter, self._device, allowed, self.limit, self._event
        )
        self.reception.allowed_groups = self.settings.allow_gids
        self.zero.workforce = self.reception.workforce = self.workforce
        engine, send = Engine(), _SendToWorker(self._tell_worker)
        self.paging = RemotePaging(
            self._by_number,
            engine,
            Placer(self._core, self.porter, self._event),
            Wakers(self._by_number, send, self.zero, self.reception, self._event),
            self.zero,
            self.porter,
            self._event,
            fault_around=self.settings.fault_around,
            background_rate=self.settings.background_rate,
            poison_on_loss=self.settings.poison_on_loss,
        )
        self.zero.paging = self.paging
        self.reception.left = self.paging.left
        self.watchdog = Watchdog(
            self.workforce,
            self.custody,
            self.reception,
            self.zero,
            self.paging.engine,
            self.settings.handler_timeout,
            self._event,
        )

    def _bind(self) -> Router:
        router = open_router(self.settings.transport, self._said)
        with made(self.runtime.endpoint.removeprefix("ipc://")):
            router.listen(self.runtime.endpoint)
        return router

    def _open_door(self) -> socket.socket:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.setblocking(False)
        with made(self.runtime.door):
            door.bind(self.runtime.door)
            os.chmod(self.runtime.door, 0o666)
        door.listen(1024)
        return door

    def _keep_what_workers_need(self) -> None:
        house = (self._quit, self._house_fd) + ((self._device,) if self._device >= 0 else ())
        self.custody.keep("house", b"", house)
        if self.settings.worker_cgroups:
            self.custody.keep(assignment.CGROUPS, b"", [cgroup_procs(path) for path in self.settings.worker_cgroups])
        for block in self.blocks.values():
            self.custody.keep(f"block/{block.number}", encode(block.note()), block.grant(0)[1])

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to end. Signals wake the porter; nothing else happens in their handlers."""
        self.porter.start()
        if self.custody.channel is not None:
            self.porter.watch_custodian(self.custody.channel)
            self._ready()
            crashpoints.at("takeover.ready")
        else:
            self.porter.watch_custodian(self.custody.start())
        # glibc gives every freed piece back to the kernel, to fault it in again for the next one, until a block as
        # large as this has been freed once. Nothing of it is touched.
        bytearray(LARGE)
        # Nothing here is made of cycles; what is collected at all need not be looked for at every hundredth fault.
        gc.freeze()
        gc.set_threshold(RARELY)
        router, box = self._router, self.porter.box
        staged, desk, turn = self.sources.parked, self.desk, 0
        while self.state != "ending":
            # Last of all: pages in a slot wait there, whoever faults does not.
            while staged and (turn > TURNS or not router.waiting()):
                turn = 0
                self._guarded(self._place_parked, staged[0])
            turn += 1
            if desk.open:
                desk.work(router.waiting)
            router.turn()
            while box:
                self._guarded(self._happened, box.popleft())
        self._end()

    def _rung(self) -> None:
        """The porter's box is looked into after each turn."""
        os.eventfd_read(self.porter.bell)

    def _said(self, identity: bytes, message: Words) -> None:
        """A word of the router. Most take the fast path; the others are decoded."""
        try:
            data = message if isinstance(message, bytes) else message[-1]
            fast_path = self.paging.fast_paths.get(data[:-OFFSET_BYTES])
            if fast_path is not None:
                fast_path(data)
            else:
                self._heard(identity, data)
        except Exception as error:
            self._bug(identity, error)

    def _source_said(self, identity: bytes, frames: list[memoryview]) -> None:
        """A message of a source: here, too, most take the fast path."""
        try:
            more = self.sources.fast_paths[identity](bytes(frames[0]), frames[1]) if len(frames) == 2 else None
            if more is None:
                more = self.sources.on_message(identity, frames)
            if more:
                self._stream()
        except Exception as error:
            self._bug(identity, error)

    def _place_parked(self, _: object) -> None:
        if self.sources.place_parked():
            self._stream()

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
            self._bug(what[-1], error)

    def _bug(self, what: object, error: Exception) -> None:
        log.error("cannot handle %s", what, exc_info=error)
        self.history.tell("bug", f"{type(error).__name__}: {error}")

    def _stream(self) -> None:
        if self.settings.background_rate:
            self.porter.ring_at(self.paging.stream(self._memory_left()))

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
                    self._pages_requested(message, frame)
                case _ if isinstance(message, queries.LONG):
                    self.desk.ask(identity, message)
                case _:
                    self._answer(identity, queries.answer(self, message))
        except BadMessage as error:
            log.warning("router: what %r said is no message: %s", identity[:32], error)
            self._answer(identity, ControlRefused(f"not understood: {error}"))

    def _hello(self, message: WorkerHello) -> None:
        """A worker is there. Before its hello the road to it may not have been open, and answers to requests that it
        had sent on its other channel were lost: a wake of nothing tells it to ask anew."""
        self.workforce.hello(message)
        if message.worker in self.reception.clients and self.sources.links:
            self._send_worker(message.worker, Wake(0, b""))

    def _pages_requested(self, message: RequestPages, data: bytes) -> None:
        block = self._by_number.get(message.block)
        if block is None or message.worker not in self.reception.clients:
            return
        offsets = unpack_offsets(message.offsets)
        if len(offsets) == 1:
            self.paging.learn(data, message.worker, block)
        shift = block.page_size.bit_length() - 1
        self.paging.fault(message.worker, block, [offset >> shift for offset in offsets if offset < block.length])

    def _happened(self, happening: ListenerEvent) -> None:
        match happening:
            case CoreFaults(events):
                for event in events:
                    if isinstance(event, PageFault):
                        self.zero.fault(event)
                    else:
                        self._event("foreign-event", f"core userfaultfd: {event}")
            case QuitAsked():
                self.state = "ending"
            case CustodianMessage(message, fds):
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
            case ClientConnected(connection, at):
                self.reception.visit(connection, at)
            case ClientMessage(connection, message, fds):
                self.reception.said(connection, message, fds)
            case Tick(at):
                self._tick(time.monotonic(), at)

    # --- what happens by itself ---------------------------------------------------------------------------------------

    def _tick(self, now: float, at: float) -> None:
        self.workforce.tick()
        self._look_at_memory()
        self.porter.ring_at(self.sources.tick(now))
        self.porter.ring_at(self.returning.knock(self.workforce.fleet.slots.__contains__, now))
        self._alive.tick(now)
        self._stream()
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
            self._house[counters.WINDOW_LIMIT] = self.settings.fault_around if roomy else 0
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
        elif what == assignment.QUARANTINED and worker != ZERO:
            self.reception.quarantine(worker, True)
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
        self._tell_worker(worker, encode(message))

    def _tell_worker(self, worker: int, data: bytes) -> None:
        slot = self.workforce.fleet.slots.get(worker)
        # UNREACHABLE: it is gone, or not back yet; its successor asks or wakes by itself.
        if slot is not None and self._router.send(slot.name, data) == FULL:
            # A wake that it never hears is a client that waits for ever; a successor wakes everybody.
            self.workforce.kill(worker, "takes no more words")

    def _reach(self, worker: int, message: Message) -> bool:
        """Has the router taken it: does it know a way to this worker?"""
        slot = self.workforce.fleet.slots.get(worker)
        if slot is None:
            return False
        return self._router.send(slot.name, encode(message)) == SENT

    def _answer(self, identity: bytes, message: Message) -> None:
        self._router.send(identity, encode(message))

    @property
    def state_shown(self) -> str:
        """As ``status`` says it: paused while a source is away."""
        paused = any(link.state == "paused" for link in self.paging.links.values())
        return "paused" if paused and self.state == "running" else self.state

    # --- control ------------------------------------------------------------------------------------------------------

    def ask_to_end(self, keep_workers: bool = False) -> None:
        """As SIGTERM does; ``keep_workers``: only we end. Raises BadInput when nobody would keep them."""
        if keep_workers and (self.state != "running" or self.custody.channel is None or self.custody.behind):
            raise BadInput("the custodian does not listen just now, so clients cannot be kept: nothing is ended")
        self._keep_workers = keep_workers
        descriptors.signal_eventfd(self._stop_bell)

    def document(self) -> status.Steps:
        """The status, from now on."""
        blocks = list(self.blocks.values())
        return status.document(
            self.started,
            self.state,
            blocks,
            self.reception,
            self.workforce,
            self.zero,
            self.paging,
            self.history,
            self.recovered,
            self.recorder.document() if self.recorder is not None else None,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """In order: exports, workers, poison, word to the clients, descriptors."""
        self.desk.finish()
        log.info("ending: %d clients", len(self.reception.clients))
        notify("STOPPING=1")
        self._door.close()
        for export in self.exports.running:
            export.cancel()
            self.zero.give_up(export.block)
        if self._keep_workers:
            return self._step_aside()
        self._house[counters.ENDING] = 1
        shutdown.workers_leave(self.workforce, self._quit)
        shutdown.poison_holes(self.reception, self._by_number)
        self.reception.tell_all(Ending("the supervisor ends; pages that are missing cannot come any more"))
        for export in self.exports.running:
            export.join(2)
        self.porter.stop()
        self.custody.end()
        self.runtime.nobody_stays()
        self._router.close(LINGER)
        self._access.close()
        log.info("ended")

    def _step_aside(self) -> None:
        """Only we go. Clients, workers and custodian go on, and wait for a successor."""
        for export in self.exports.running:
            export.join(2)
        self.porter.stop()
        self.custody.step_aside()
        self._router.close(LINGER)
        self._access.close()
        log.info("ended; %d clients go on: serve --recover takes them over", len(self.reception.clients))


class _SendToWorker:
    """The port of the wakers to the workers."""

    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        self.send = send


def _furniture(kept: tuple[int, ...]) -> tuple[int, int, int]:
    """Quit eventfd, house page and device (-1: there is none): a predecessor's, which its workers hold, or new ones."""
    if kept:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(kept[0])  # it may have been killed at its end
        return kept[0], kept[1], kept[2] if len(kept) > 2 else -1
    try:
        device = open_device()
    except UserfaultfdUnavailable:
        device = -1  # the syscall may do; clients then make theirs by it too
    return descriptors.create_eventfd(), memory.create_memfd("postcopy-house", counters.PAGE_BYTES), device


def serve(settings: Settings) -> None:
    """Build the house, live in it. Raises BadInput or UserfaultfdUnavailable when it cannot stand."""
    process.name_process("postcopy-superv")
    if settings.die_with_parent:
        process.die_with_parent(settings.die_with_parent, signal.SIGTERM)
    runtime = RuntimeDirectory(settings.directory)
    try:
        descriptors.raise_descriptor_limit()
        custodian, plan = inventory.enter(runtime.custodian, settings)
        house = MainLoop(settings, runtime, plan, custodian)
        if settings.trace:
            trace_points.install(house, settings.trace)
        if settings.metrics is not None:
            from .observe import metrics

            metrics.start(house, settings.metrics)
        if house.recorder is not None:
            house.recorder.start()
        try:
            house.run()
        finally:
            if house.recorder is not None:
                house.recorder.close()
    finally:
        runtime.close()
