"""The orderly end: no client is left with memory that would turn into zeros.

All placing stops (quit eventfd) and the workers leave. Then exactly the holes of every client are poisoned through our
duplicates of the shared userfaultfds, in bounded steps. Only then are the clients informed and descriptors closed. A
present page stays: the client's mapping holds the memory. Poison costs page tables (2 MiB for each GiB and client), so
memory and time are bounded. Pages beyond that wait, because the client holds its own userfaultfd; they are not
zeros."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from postcopy_kernel import descriptors, process
from postcopy_kernel.userfaultfd import Status, Userfaultfd
from postcopy_protocol import counters
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import Ending, RegionGrant
from postcopy_wire.transport import Router

from .blocks import RamBlock
from .clients.client import Clients
from .clients.client_zero import ClientZero
from .exports import Exports
from .listener import Listener
from .memory_budget import available_memory
from .observe.queries import LongAnswers
from .parts import RunState
from .pool.custodian_client import CustodianClient
from .pool.worker_pool import Process, WorkerPool
from .runtime import RuntimeDirectory, notify

log = logging.getLogger("postcopy")

LEAVE_SECONDS = 3.0
STEP = 64 << 20
TABLE_BYTES_PER_PAGE = 8
BUDGET_SHARE = 4  # at most a quarter of the available memory may go into page tables of poison
POISON_SECONDS = 20.0
"""For all of it. It takes some 30 ms for each GiB and client (4K pages); service managers kill after some 90 s."""
LINGER_SECONDS = 0.5  # time in which answers to the last questions can still be sent


class StopRequest:
    """How the supervisor is asked to end: the eventfd that SIGTERM signals too, and whether workers stay."""

    def __init__(self, eventfd: int, state: RunState, custodian: CustodianClient) -> None:
        self.keep_workers = False
        self._eventfd, self._state, self._custodian = eventfd, state, custodian

    def ask(self, keep_workers: bool = False) -> None:
        """End as SIGTERM does; ``keep_workers``: end only the supervisor. Raises BadInput when no custodian could keep
        the workers."""
        custodian = self._custodian
        if keep_workers and (self._state.phase != "running" or custodian.channel is None or custodian.behind):
            raise BadInput("the custodian does not answer just now, so clients cannot be kept: nothing is ended")
        self.keep_workers = keep_workers
        descriptors.signal_eventfd(self._eventfd)


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The parts that the end concerns. ``run`` is called once, by the main thread, after the last turn."""

    request: StopRequest
    blocks: Mapping[int, RamBlock]
    clients: Clients
    pool: WorkerPool
    zero: ClientZero
    custodian: CustodianClient
    exports: Exports
    answers: LongAnswers
    listener: Listener
    router: Router
    runtime: RuntimeDirectory
    attach_socket: socket.socket
    control_page: memoryview
    quit_eventfd: int

    def run(self) -> None:
        """In order: questions, exports, workers, poison, Ending to the clients, descriptors."""
        self.answers.finish()
        log.info("ending: %d clients", len(self.clients.by_number))
        notify("STOPPING=1")
        self.attach_socket.close()
        for export in self.exports.running:
            export.cancel()
            self.zero.give_up(export.block)
        if self.request.keep_workers:
            return self._step_aside()
        self.control_page[counters.ENDING] = 1
        end_workers(self.pool, self.quit_eventfd)
        poison_holes(self.clients, self.blocks)
        self.clients.tell_all(Ending("the supervisor ends; pages that are missing cannot come any more"))
        self._join()
        self.custodian.end()
        self.runtime.remove_custodian_socket()
        self._close()
        log.info("ended")

    def _step_aside(self) -> None:
        """End only the supervisor. Clients, workers and custodian wait for the next one."""
        self._join()
        self.custodian.step_aside()
        self._close()
        log.info("ended; %d clients go on: serve --recover takes them over", len(self.clients.by_number))

    def _join(self) -> None:
        for export in self.exports.running:
            export.join(2)
        self.listener.stop()

    def _close(self) -> None:
        self.router.close(LINGER_SECONDS)


def end_workers(pool: WorkerPool, quit_eventfd: int) -> None:
    """Signal all workers to leave, and kill those that have not left after LEAVE_SECONDS."""
    descriptors.signal_eventfd(quit_eventfd)
    workers = pool.running
    _wait_for_end(workers)
    for worker in workers:
        if not process.pidfd_exited(worker.pidfd):
            log.warning("worker %d (pid %d) does not leave; it is killed", worker.worker, worker.pid)
            with contextlib.suppress(ProcessLookupError):
                process.pidfd_signal(worker.pidfd, signal.SIGKILL)
    _wait_for_end(workers)


def _wait_for_end(workers: list[Process]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    while any(not process.pidfd_exited(worker.pidfd) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.002)


@dataclass(slots=True)
class Budget:
    """Bytes of page tables, and a deadline (monotonic seconds)."""

    bytes: int
    deadline: float

    def allows(self, pages: int) -> bool:
        """Take the cost of poisoning ``pages``; False: the budget is used up."""
        self.bytes -= pages * TABLE_BYTES_PER_PAGE
        return self.bytes >= 0 and time.monotonic() < self.deadline


def poison_holes(clients: Clients, blocks: Mapping[int, RamBlock]) -> None:
    """Make every missing page SIGBUS in every client that has it registered."""
    budget = Budget(available_memory() // BUDGET_SHARE, time.monotonic() + POISON_SECONDS)
    for client in list(clients.by_number.values()):
        if client.userfaultfd is None or process.pidfd_exited(client.pidfd):
            continue
        for region in client.regions:
            block = blocks[region.block]
            if not _poison_region(client.userfaultfd, region, block, budget):
                log.error(
                    "client %d: no memory or time to poison every missing page of block %s: the others wait",
                    client.number,
                    block.name,
                )
            try:
                client.userfaultfd.wake(region.address, region.length)  # waiters of present pages go on
            except OSError as error:
                log.debug("client %d: wake: %s", client.number, error)


def _poison_region(ufd: Userfaultfd, region: RegionGrant, block: RamBlock, budget: Budget) -> bool:
    """False: the budget is used up."""
    # Memory of its own has holes where the block has none; pages that are there stop the poison, and are left.
    holes = [(region.offset, region.length)] if region.mode in OWN else block.hole_runs()
    for start, length in holes:
        first, end = max(start, region.offset), min(start + length, region.offset + region.length)
        while first < end:
            step = min(STEP, end - first)
            if not budget.allows(step // block.page_size):
                return False
            if not _poison(ufd, region.address + first - region.offset, step, block.page_size):
                return True
            first += step
    return True


def _poison(ufd: Userfaultfd, start: int, length: int, page_size: int) -> bool:
    """False: this client's memory has changed, or this kernel has no UFFDIO_POISON."""
    end = start + length
    while start < end:
        try:
            outcome = ufd.poison(start, end - start)
        except OSError as error:
            log.error("cannot poison: %s; its readers wait", error)
            return False
        if outcome.status is Status.DONE:
            return True
        if outcome.status in (Status.GONE, Status.STALE):
            return False
        # Stopped at a page that the client has mapped or poisoned already.
        start += max(outcome.done, 0) or page_size
    return True
