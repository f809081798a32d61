"""What every worker process is made of: blocks, the channel to the supervisor, reports, and the sandbox.

``client_worker`` serves one client with it, ``worker_zero`` the supervisor itself.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import IntEnum
from functools import partial

from postcopy_kernel import descriptors, landlock, process, seccomp
from postcopy_kernel.filedigest import PageDigests
from postcopy_kernel.filewatch import give_up_lease, lease_wanted
from postcopy_kernel.memory import DONTFORK, DONTNEED, Mapping
from postcopy_kernel.userfaultfd import RegisterMode, Userfaultfd, open_userfaultfd
from postcopy_protocol import counters, stages
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Assignment, BlockGrant, WorkerHello
from postcopy_protocol.received_map import CHANGED, GUARDED, LEASED, WATCHED
from postcopy_wire.factory import open_channel
from postcopy_wire.transport import Channel

from .fault_handler import CannotContinue
from .guarded_block import GuardedBlock
from .handlers import CannotImport, load_handler, report_output
from .page_sources import FilePages, HandlerPages, NoPages, PageSource, RemotePages, SourceChanged, ZeroPages
from .placing import Block, OwnMapping, system_calls
from .reports import Reports

HELD_SECONDS = 0.01  # between two tries to send what the supervisor does not take
SOURCE_CHECK_SECONDS = 1.0
SPARE_DESCRIPTORS = 64  # beyond those that a worker was given: its channel, its eventfd and its mappings need a few
_FILTER = seccomp.prepare()  # before the fork: every worker inherits it


class ExitStatus(IntEnum):
    """How a worker ends. After CLIENT_GONE a custodian without a supervisor forks no successor."""

    CLIENT_GONE = 0
    FAILED = 3
    QUIT = 4


class Worker:
    """What an assignment and its descriptors make. Raises CannotContinue and OSError. ``privileged``: the custodian has
    kept its capabilities, because a userfaultfd cannot be opened without them."""

    def __init__(self, assignment: Assignment, fds: list[int], *, privileged: bool) -> None:
        self.assignment = assignment
        self.reports = Reports(assignment.worker)
        self.fds = fds  # the assignment has their indices
        self.counters = _page(fds[assignment.statistics_page])
        self.control = _page(fds[assignment.control_page])
        self.counters[counters.WORKER_PID] = os.getpid()
        self.counters[counters.INCARNATION] = assignment.incarnation
        self.counters[counters.BUSY_SINCE_NS] = 0
        self._own = self._own_userfaultfd()
        self._page_tables = process.PageTables()
        if privileged:
            process.drop_privileges()
        self.blocks = {grant.block: self._block(grant) for grant in assignment.blocks}
        self.stages = _stages(fds[assignment.statistics_page], self.blocks)
        self._enter_sandbox()

    def _enter_sandbox(self) -> None:
        """Give up what this worker does not need, now that everything is open that will ever be. There is one thread:
        those that come later inherit it.

        A worker reads the faults of a client that may be hostile, and places bytes of a source that may be. Should one
        of them take it over, it holds its client's and its block's descriptors and nothing else: no capability, no
        path, no program to start, no socket but Unix sockets. Only its author knows what a user's handler function
        needs: its worker keeps what its user may do (never a capability), unless ``--walls all`` says that it needs
        none of that once its module is imported.
        """
        assignment, active = self.assignment, counters.NO_CAPABILITIES | counters.NO_NEW_PRIVILEGES
        if assignment.cgroup >= 0:
            active |= counters.CGROUP
            try:
                for procs in self.fds[assignment.cgroup :]:
                    os.write(procs, b"0\n")
                    os.close(procs)
            except OSError as error:
                raise CannotContinue(f"cannot enter its cgroup: {error}") from None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would be a copy of the client's memory
        runs_handler = any(grant.kind == "handler" for grant in assignment.blocks)
        if assignment.sandbox == "all" or (assignment.sandbox == "auto" and not runs_handler):
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            limit = min(hard, len(self.fds) + len(self.blocks) + SPARE_DESCRIPTORS)  # mmap duplicates each map's
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            active |= self._restrict("Landlock", landlock.restrict, counters.LANDLOCK)
            if _FILTER is not None:
                active |= self._restrict("the seccomp filter", _FILTER.restrict, counters.SECCOMP)
        self.counters[counters.SANDBOX] = active

    def _restrict(self, name: str, restrict: Callable[[], int], bit: int) -> int:
        """The bit of a restriction that is in force now; 0 where this machine has none of its kind."""
        try:
            return bit if restrict() else 0
        except OSError as error:
            self.reports("no-wall", -1, -1, f"{name} is not in force: {error}")
            return 0

    def _own_userfaultfd(self) -> Userfaultfd:
        device = self.assignment.device
        own = open_userfaultfd(device=self.fds[device] if device >= 0 else None)
        own.handshake()
        return own

    def _block(self, grant: BlockGrant) -> Block:
        length = grant.pages * grant.page_size
        memory = self.fds[grant.memory]
        mapping = Mapping.of(memory, length)
        mapping.advise(DONTFORK)
        self._own.register(mapping.address, length, RegisterMode.MISSING)
        received = memoryview(mmap.mmap(self.fds[grant.received], 0))
        own = OwnMapping(self._own.fileno(), mapping.address, partial(mapping.advise, DONTNEED))
        calls = replace(system_calls(), page_tables=self._page_tables.size)
        kind = GuardedBlock if received[grant.pages + GUARDED] else Block
        locks = self.fds[self.assignment.control_page]
        return kind(grant, memory, received, self._pages(grant, received), own, self.reports, calls, locks)

    def _pages(self, grant: BlockGrant, received: memoryview) -> PageSource:
        stretch = max(grant.page_size, self.assignment.fault_around)
        match grant.kind:
            case "file":
                digests = PageDigests(self.fds[grant.source + 1]) if grant.detail == "digests" else None
                return FilePages(grant, self.fds[grant.source], received, digests)
            case "zero":
                return ZeroPages(grant, stretch)
            case "handler":
                return self._handler_pages(grant, stretch)
            case "remote":
                return RemotePages(grant)
            case "orphaned":
                return NoPages(grant, grant.detail)
            case "quarantined":
                return NoPages(grant, "the client is quarantined: its worker crashed too often")
            case _:
                raise CannotContinue(f"block {grant.name}: kind {grant.kind} is unknown to this worker")

    def _handler_pages(self, grant: BlockGrant, stretch: int) -> PageSource:
        report_output(self.reports)
        try:
            return HandlerPages(grant, load_handler(grant.detail, self.assignment.handler_path), stretch)
        except CannotImport as error:
            self.reports("handler-failed", grant.block, 0, str(error))
            return NoPages(grant, str(error))

    @property
    def remote(self) -> bool:
        """Does any block come over a return path?"""
        return any(isinstance(block.pages, RemotePages) for block in self.blocks.values())

    def channel(self) -> Channel:
        """The channel to the supervisor; not connected yet."""
        worker, incarnation = self.assignment.worker, self.assignment.incarnation
        hello = encode(WorkerHello(worker, incarnation, os.getpid()))
        held = partial(descriptors.signal_eventfd, self.reports.wakeup)
        identity = b"w%d.%d" % (worker, incarnation)
        return open_channel(self.assignment.transport, self.assignment.endpoint, identity, hello, held)

    def send_waiting(self, channel: Channel) -> float:
        """Send the queued reports and what the channel holds back; seconds until that must be done again."""
        if channel.connected:
            for frame in self.reports.take():
                channel.send(frame)
            channel.flush()
        return HELD_SECONDS if channel.holds() else SOURCE_CHECK_SECONDS

    def check_sources(self) -> None:
        """Has a file changed since it is served? Mark that for every worker, and report it once. Without a supervisor
        also give up the lease of a file that another process wants to write to."""
        for number, block in self.blocks.items():
            trust, descriptor = block.received[block.trust_at], block.pages.descriptor
            if trust == CHANGED or descriptor < 0:
                continue
            if trust == LEASED and lease_wanted(descriptor):
                block.received[block.trust_at] = WATCHED
                give_up_lease(descriptor)
            try:
                block.pages.check()
            except SourceChanged as changed:
                block.received[block.trust_at] = CHANGED
                self.reports("source-changed", number, 0, f"{changed}; pages that are missing by now are lost")


def _page(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, counters.PAGE_BYTES)).cast("Q")


def _stages(fd: int, blocks: Iterable[int]) -> dict[int, memoryview]:
    """The stage histograms of each block. A supervisor of an older version left no room for them: then they are
    written where no process reads them."""
    size = os.fstat(fd).st_size
    if size < stages.END:
        return {block: stages.scratch() for block in blocks}
    figures = memoryview(mmap.mmap(fd, stages.END))
    starts = {block: stages.position(block) for block in blocks}
    return {
        block: figures[start : start + stages.BYTES].cast("Q") if start is not None else stages.scratch()
        for block, start in starts.items()
    }
