"""The composition root: builds every part of the supervisor in order. No attribute of a part is set afterwards.

A module imports only modules that stand before it here:

    memory_budget, runtime, event_log, admission, events, pool.lifecycle, settings
    remote.programs, remote.advise, recovery.*, blocks      what is served, and what is taken over
    paging.*, remote.staging, remote.sources    faults of remote blocks
    pool.*, listener                            the custodian, the workers, events
    clients.*                                   client, identity, losses, release, attach_server, worker_zero, ...
    exports, waits, watchdog, adopt, assignment, parts, keeping
    observe.*                                   recorder, audit, status, page_history, queries, scrapes, metrics
    shutdown, periodic, main_loop, trace_points, assembly, __main__
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from postcopy_kernel import crashpoints, descriptors, memory, process
from postcopy_kernel.userfaultfd import DEVICE, Userfaultfd, UserfaultfdUnavailable, open_device, open_userfaultfd
from postcopy_protocol import counters, stages, trace
from postcopy_protocol.sources import Advice
from postcopy_wire.factory import open_router
from postcopy_wire.transport import Router

from . import trace_points
from .admission import Admission
from .adopt import PendingWorkers, adopt
from .assignment import WorkerAssignments
from .blocks import RamBlock
from .clients.attach_server import AttachServer
from .clients.client import Clients
from .clients.client_zero import ClientZero, OwnMapping
from .clients.losses import Losses
from .clients.release import ClientRelease
from .clients.worker_zero import WorkerZero
from .entrances import Entrances, listen_for_clients, listen_for_workers
from .event_log import EventLog
from .exports import Exports
from .handlers import check_handlers
from .keeping import keep_for_workers, open_custodian
from .listener import FileWatches, Listener
from .main_loop import MainLoop, Ports, Replies
from .memory_budget import MemoryBudget
from .memory_cgroup import own_cgroups, worker_cgroups
from .observe import metrics
from .observe.audit import Auditor
from .observe.queries import LongAnswers, Queries
from .observe.recorder import Recorder
from .paging.engine import Engine
from .paging.paging import RemotePaging
from .paging.placer import Placer
from .paging.wakers import Wakers
from .parts import Parts, RunState
from .periodic import PeriodicWork
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import WorkerPool
from .recovery import inventory, watchers
from .recovery.descriptor_store import DescriptorStore, taken
from .recovery.inventory import Custodian
from .recovery.plan import Plan
from .recovery.watchers import Orphans
from .remote.advise import AskedToEnd, SourceAccess
from .remote.programs import SourceProgram
from .remote.sources import Sources
from .runtime import Heartbeat, RuntimeDirectory
from .settings import Settings
from .shutdown import Shutdown, StopRequest
from .waits import Waits
from .watchdog import Watchdog

log = logging.getLogger("postcopy")

NEW_SOURCE_SECONDS = 5.0
"""Timeout for asking new sources during a take-over. Dead workers are not replaced until it is done, so it is short."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The supervisor's own. ``device``: /dev/userfaultfd, or -1; ``stop``: readable when it is asked to end;
    ``lifeline``: see ``plan.LIFELINE``."""

    core: Userfaultfd
    quit: int
    control: int
    device: int
    stop: int
    lifeline: int


@dataclass(frozen=True, slots=True)
class Supervisor:
    """All parts, built and adopted, before the first turn."""

    main_loop: MainLoop
    listener: Listener
    custodian: CustodianClient
    shutdown: Shutdown
    parts: Parts
    recorder: Recorder | None

    def run(self) -> None:
        """Serve until asked to end, then end in order."""
        self.listener.start()
        if self.custodian.channel is not None:
            self.listener.watch_custodian(self.custodian.channel)
            self.main_loop.ready()
            crashpoints.at("takeover.ready")
        else:
            self.listener.watch_custodian(self.custodian.start())
        self.main_loop.run()
        self.shutdown.run()


def serve(settings: Settings) -> None:
    """Build the supervisor and run it. Raises BadInput or UserfaultfdUnavailable when it cannot be built."""
    process.name_process("postcopy-superv")
    process.title_process(f"postcopy_supervisor in {settings.directory}")
    if settings.die_with_parent:
        process.die_with_parent(settings.die_with_parent, signal.SIGTERM)
    runtime, program = RuntimeDirectory(settings.directory), SourceProgram(settings)
    settings = program.settings
    try:
        descriptors.raise_descriptor_limit()
        stored, keys = taken(os.environ)
        store = DescriptorStore.wanted(os.environ, keys)
        custodian, plan = inventory.enter(runtime.custodian, settings, stored)
        with program, contextlib.ExitStack() as stack:
            supervisor = assemble(settings, runtime, plan, custodian, store, program)
            if settings.metrics is not None:
                metrics.start(supervisor.parts, settings.metrics, public=settings.metrics_public)
            if supervisor.recorder is not None:
                supervisor.recorder.start()
                stack.callback(supervisor.recorder.close)
            supervisor.run()
    except AskedToEnd:
        log.info("ended while waiting for a source")
    finally:
        runtime.close()


def assemble(
    settings: Settings,
    runtime: RuntimeDirectory,
    plan: Plan,
    inherited: Custodian | None,
    store: DescriptorStore | None,
    program: SourceProgram,
) -> Supervisor:
    """Build everything. ``inherited``: the custodian of the previous supervisor, from which ``plan`` was made;
    ``store``: that of the service manager."""
    main_loop = trace_points.TracedMainLoop(settings.trace) if settings.trace else MainLoop()
    base = _base(settings, runtime, plan, inherited, store, main_loop, program)
    service = _service(settings, runtime, plan, base, main_loop)
    own, router, listener, custodian = base.own, base.router, base.listener, base.custodian
    blocks, clients, pool, event = base.blocks, service.clients, service.pool, base.event_log.record
    exports, auditor, pending = Exports(), Auditor(list(blocks.values()), event), PendingWorkers(pool)
    parts = Parts(
        base.state,
        blocks,
        clients,
        pool,
        service.zero,
        service.paging,
        base.event_log,
        Waits(base.by_number, clients, service.paging.engine),
        base.admission.refusals,
        base.control_page,
        service.recorder,
        settings.transport,
    )
    periodic = _periodic(settings, runtime, base, service, parts, exports, auditor, pending, program)
    stop, replies = StopRequest(own.stop, base.state, custodian), Replies(router, event)
    queries = Queries(parts, exports, auditor, stop)
    answers = LongAnswers(queries, replies)
    ports = _ports(runtime, base, service, periodic, queries, answers, replies)
    main_loop.start(ports)
    router.watch(listener.wakeup, main_loop.on_wakeup)
    adopt(plan, custodian, pool, clients, service.attach, service.orphans)
    custodian.tidy_stores()
    pending.expect({number for block in service.paging.links for number in clients.with_block(block)})
    if plan.recovers:
        crashpoints.at("takeover.moved")
        _recovered(plan, parts, service.sources)
    shutdown = Shutdown(
        stop,
        base.by_number,
        clients,
        pool,
        service.zero,
        custodian,
        exports,
        answers,
        listener,
        router,
        runtime,
        base.attach_socket,
        base.control_page,
        own.quit,
    )
    return Supervisor(main_loop, listener, custodian, shutdown, parts, service.recorder)


@dataclass(frozen=True, slots=True)
class Base:
    """Descriptors, blocks, and the ways in: router, attach socket, listener, custodian."""

    state: RunState
    event_log: EventLog
    own: Descriptors
    access: SourceAccess
    advice: Mapping[str, Advice]
    blocks: dict[str, RamBlock]
    by_number: dict[int, RamBlock]
    control_page: memoryview
    router: Router
    attach_socket: socket.socket
    custodian: CustodianClient
    admission: Admission
    listener: Listener


def _base(
    settings: Settings,
    runtime: RuntimeDirectory,
    plan: Plan,
    inherited: Custodian | None,
    store: DescriptorStore | None,
    main_loop: MainLoop,
    program: SourceProgram,
) -> Base:
    state = RunState(time.monotonic())
    own = _descriptors(plan)
    access, advice, blocks = _blocks(settings, plan, own, state, program)
    by_number = {block.number: block for block in blocks.values()}
    control_page = _control_page(settings, own)
    router = open_router(settings.transport, main_loop.on_message)
    listen_for_workers(router, runtime)
    attach_socket = listen_for_clients(runtime)
    custodian = open_custodian(settings, runtime, plan, own, by_number, store, inherited)
    admission = Admission(settings.allow_list())
    listener = Listener(own.core, own.stop, attach_socket, FileWatches(blocks.values()), admission, runtime.door)
    return Base(
        state,
        EventLog(),
        own,
        access,
        advice,
        blocks,
        by_number,
        control_page,
        router,
        attach_socket,
        custodian,
        admission,
        listener,
    )


@dataclass(frozen=True, slots=True)
class Service:
    """Workers, paging and clients."""

    clients: Clients
    pool: WorkerPool
    paging: RemotePaging
    zero: ClientZero
    release: ClientRelease
    attach: AttachServer
    sources: Sources
    recorder: Recorder | None
    orphans: Orphans


def _service(settings: Settings, runtime: RuntimeDirectory, plan: Plan, base: Base, main_loop: MainLoop) -> Service:
    own, blocks, custodian, listener = base.own, base.by_number, base.custodian, base.listener
    event = base.event_log.record
    clients = Clients(blocks, custodian, plan.first_client, base.event_log.names)
    assignments = WorkerAssignments(settings, runtime.endpoint, own.device >= 0, blocks, clients)
    pool = WorkerPool(settings.restart, custodian, listener, base.router, assignments, clients, event)
    keep_for_workers(settings, custodian, own, blocks)
    worker_zero, own_mapping = WorkerZero(blocks, pool, custodian), OwnMapping(own.core)
    paging = _paging(settings, base, clients, pool, worker_zero, own_mapping)
    zero = ClientZero(blocks, paging, worker_zero, own_mapping, event)
    release = ClientRelease(blocks, clients, pool, listener, paging, event)
    recorder = _recorder(settings, blocks, clients)
    figures = trace.FIGURES_BYTES if recorder is not None else stages.END
    losses = Losses(blocks, clients, base.event_log)
    orphans = Orphans(settings.orphan_timeout if settings.poison_orphans else None, own.lifeline)
    attach = AttachServer(base.blocks, clients, pool, listener, release, losses, own.device, figures, recorder, orphans)
    receive = main_loop.on_source_message
    sources = Sources(settings, base.access, base.router, base.advice, base.blocks, paging, receive, event)
    return Service(clients, pool, paging, zero, release, attach, sources, recorder, orphans)


def _recorder(settings: Settings, blocks: Mapping[int, RamBlock], clients: Clients) -> Recorder | None:
    if not settings.record:
        return None
    present, overwrite = clients.by_number.keys(), settings.record_overwrite
    return Recorder(settings.record, blocks.values(), present, overwrite=overwrite)


def _paging(
    settings: Settings, base: Base, clients: Clients, pool: WorkerPool, worker_zero: WorkerZero, own_mapping: OwnMapping
) -> RemotePaging:
    """Paging, with the trace points that are asked for."""
    points, blocks, listener, event = settings.trace, base.by_number, base.listener, base.event_log.record
    plain = not points & trace_points.ON_FAULTS
    kind = RemotePaging if plain else trace_points.TracedPaging if "request" in points else trace_points.SlowPaging
    placer = (trace_points.TracedPlacer if "place" in points else Placer)(base.own.core, listener, event)
    sender = trace_points.TracedSender(pool, blocks) if "wake" in points else pool
    return kind(
        blocks,
        Engine(),
        placer,
        Wakers(blocks, sender, own_mapping, clients, event),
        worker_zero,
        listener,
        event,
        fault_around=settings.fault_around,
        background_rate=settings.background_rate,
        poison_on_loss=settings.poison_on_loss,
    )


def _periodic(
    settings: Settings,
    runtime: RuntimeDirectory,
    base: Base,
    service: Service,
    parts: Parts,
    exports: Exports,
    auditor: Auditor,
    pending: PendingWorkers,
    program: SourceProgram,
) -> PeriodicWork:
    memories = [block.memory for block in base.blocks.values()]
    payers = own_cgroups(), worker_cgroups(settings.worker_cgroups)
    budget = MemoryBudget(memories, settings.max_memory, settings.fault_around, *payers)
    return PeriodicWork(
        parts,
        budget,
        settings.fault_around,
        service.sources,
        program,
        pending,
        service.release,
        Watchdog(
            service.pool,
            base.custodian,
            service.clients,
            service.zero,
            service.paging.engine,
            parts.waits,
            settings.handler_timeout,
            base.event_log.record,
        ),
        auditor,
        exports,
        Heartbeat(),
        Entrances(runtime, base.router, base.attach_socket, base.listener, base.custodian, base.event_log.record),
        base.listener,
    )


def _ports(
    runtime: RuntimeDirectory,
    base: Base,
    service: Service,
    periodic: PeriodicWork,
    queries: Queries,
    answers: LongAnswers,
    replies: Replies,
) -> Ports:
    names = ", ".join(f"{block.name} ({block.size} bytes)" for block in base.blocks.values())
    return Ports(
        base.state,
        base.router,
        base.listener.queue,
        base.listener.wakeup,
        base.by_number,
        service.clients.by_number,
        service.pool,
        service.attach,
        service.release,
        service.zero,
        service.paging,
        service.sources,
        periodic,
        queries,
        answers,
        replies,
        base.event_log.record,
        f"{names} in {runtime.path} (pid {os.getpid()})",
    )


def _descriptors(plan: Plan) -> Descriptors:
    """Quit eventfd, control page and device are those of the previous supervisor, which its workers hold, or new."""
    kept = plan.shared
    if kept:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(kept[0])  # it may have been killed while it ended
        quit_eventfd, control, device = kept[0], kept[1], kept[2] if len(kept) > 2 else -1
    else:
        try:
            device = open_device()
        except UserfaultfdUnavailable:
            device = -1  # the system call may work
        quit_eventfd, control = (
            descriptors.create_eventfd(),
            memory.create_memfd("postcopy-control", counters.PAGE_BYTES),
        )
    core = open_userfaultfd(device=device if device >= 0 else None)
    core.handshake()
    if device < 0:
        log.warning("%s cannot be opened, so it cannot be passed on: each client needs a right of its own", DEVICE)
    stop = descriptors.create_eventfd()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: descriptors.signal_eventfd(stop))
    lifeline = plan.lifeline[0] if plan.lifeline else watchers.new_lifeline()
    return Descriptors(core, quit_eventfd, control, device, stop, lifeline)


def _blocks(
    settings: Settings, plan: Plan, own: Descriptors, state: RunState, program: SourceProgram
) -> tuple[SourceAccess, dict[str, Advice], dict[str, RamBlock]]:
    """Ask the sources of remote blocks, then make or adopt all blocks."""
    blocks: dict[str, RamBlock] = {}

    def yield_leases(*_: object) -> None:
        """SIGIO: a program waits in open(2) or truncate(2) until a lease of ours is given up."""
        for block in blocks.values():
            block.yield_lease()

    def give_up() -> str:
        """Why a source that does not answer is waited for no longer, or nothing."""
        if select.select([own.stop], [], [], 0)[0]:
            raise AskedToEnd
        program.check_started()
        if plan.recovers and time.monotonic() - state.started > NEW_SOURCE_SECONDS:
            return "the clients that are taken over cannot wait for a new block; nothing is changed: start it first"
        return ""

    signal.signal(signal.SIGIO, yield_leases)  # before the first lease: without a handler the signal ends the process
    access = SourceAccess(settings)
    advice = access.ask(plan.advice, give_up)
    guarded = settings.foreign_clients
    new = [source for name, source in settings.sources.items() if name not in plan.blocks]
    check_handlers(new, settings.handler_path, settings.handler_timeout)
    for name, source in settings.sources.items():
        number, kept = plan.numbers[name], plan.blocks.get(name)
        copy = settings.copy_on_serve
        blocks[name] = RamBlock(
            number, name, source, settings.page_size, advice.get(name), kept, guarded=guarded, copy=copy
        )
    yield_leases()
    for block in blocks.values():
        block.register(own.core)
    return access, advice, blocks


def _control_page(settings: Settings, own: Descriptors) -> memoryview:
    """The page of settings and figures that all workers share."""
    page = memoryview(mmap.mmap(own.control, counters.PAGE_BYTES)).cast("Q")
    page[counters.WINDOW_LIMIT] = settings.fault_around
    page[counters.ORPHAN_MS] = max(1, int(settings.orphan_timeout * 1000)) if settings.poison_orphans else 0
    page[counters.ENDING] = 0  # the previous supervisor may have been killed while it ended
    return page


def _recovered(plan: Plan, parts: Parts, sources: Sources) -> None:
    """Count and report the take-over."""
    parts.control_page[counters.RECOVERED] += 1
    for link in sources.links.values():
        link.inherited = True
    took = (time.monotonic() - parts.state.started) * 1000
    text = f"{len(plan.clients)} clients, {len(plan.workers)} workers and {len(plan.blocks)} blocks of the supervisor"
    parts.event_log.record("recover", f"{text} before this one are taken over, in {took:.0f} ms")
