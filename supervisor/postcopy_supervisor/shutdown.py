"""The orderly end: nobody is left with memory that would turn into zeros.

All stop placing (quit eventfd), workers leave, then exactly the holes of every client are poisoned through our
duplicates of the shared userfaultfds, in bounded steps; only then are the clients told and descriptors closed. A page
that is there stays there: the client's mapping holds the memory. Poison costs page tables (2 MiB a GiB and client), so
there is a budget of memory and of time; what exceeds it waits, for the client holds its own userfaultfd, and a page
that waits is not zeros.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from dataclasses import dataclass

from postcopy_kernel import descriptors, process
from postcopy_kernel.userfaultfd import Status, Userfaultfd
from postcopy_protocol.messages import RegionGrant

from .blocks import RamBlock
from .clients.attach_server import AttachServer
from .pool.worker_pool import WorkerPool

log = logging.getLogger(__name__)

LEAVE_SECONDS = 3.0
STEP = 64 << 20
TABLE_BYTES_PER_PAGE = 8
BUDGET_SHARE = 4
"""A quarter of the memory that is available may go into page tables of poison."""
POISON_SECONDS = 20.0
"""And as long may all of it take: some 30 ms a GiB and client (4K pages), within what service managers grant an end."""


def workers_leave(workforce: WorkerPool, quit_fd: int) -> None:
    """Tell all, wait a bounded time, then insist."""
    descriptors.signal_eventfd(quit_fd)
    deadline = time.monotonic() + LEAVE_SECONDS
    lives = workforce.alive
    while any(not process.pidfd_exited(life.pidfd) for life in lives) and time.monotonic() < deadline:
        time.sleep(0.002)
    for life in lives:
        if not process.pidfd_exited(life.pidfd):
            log.warning("worker %d (pid %d) does not leave; it is killed", life.worker, life.pid)
            with contextlib.suppress(ProcessLookupError):
                process.pidfd_signal(life.pidfd, signal.SIGKILL)
    deadline = time.monotonic() + LEAVE_SECONDS
    while any(not process.pidfd_exited(life.pidfd) for life in lives) and time.monotonic() < deadline:
        time.sleep(0.002)


@dataclass(slots=True)
class Budget:
    """What the end may cost: bytes of page tables, and a moment (monotonic seconds)."""

    bytes: int
    deadline: float

    def allows(self, pages: int) -> bool:
        """Take what ``pages`` of poison cost; False: it is used up."""
        self.bytes -= pages * TABLE_BYTES_PER_PAGE
        return self.bytes >= 0 and time.monotonic() < self.deadline


def poison_holes(reception: AttachServer, blocks: dict[int, RamBlock]) -> None:
    """Every page that is still missing becomes SIGBUS in every client that has it registered."""
    budget = Budget(available_memory() // BUDGET_SHARE, time.monotonic() + POISON_SECONDS)
    for client in list(reception.clients.values()):
        if client.userfaultfd is None or process.pidfd_exited(client.pidfd):
            continue
        for region in client.regions:
            block = blocks[region.block]
            if not _poison_region(client.userfaultfd, region, block, budget):
                log.error(
                    "client %d: no memory or time to poison all that is missing of block %s: what is not, waits",
                    client.number,
                    block.name,
                )
            try:
                client.userfaultfd.wake(region.address, region.length)  # whoever waits for a page that is there
            except OSError as error:
                log.debug("client %d: wake: %s", client.number, error)


def _poison_region(ufd: Userfaultfd, region: RegionGrant, block: RamBlock, budget: Budget) -> bool:
    """False: the budget is used up."""
    for start, length in block.hole_runs():
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
    """False: this client's memory is not what it was, or this kernel has no poison."""
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


def available_memory() -> int:
    """Bytes that the machine can still give without swapping (MemAvailable); a guess where that cannot be asked, as
    without a descriptor left."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 30
