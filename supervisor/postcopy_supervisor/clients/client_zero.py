"""Client zero: the supervisor itself, whose own system calls fault on its own mapping of the blocks.

A fault is read from the core userfaultfd, turned into block and page, given to the engine like any waiter's, fetched
(through worker zero where the block is local), and released by a wake (or a poison) on the core userfaultfd.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable

from postcopy_kernel import memory
from postcopy_kernel.userfaultfd import PageFault, Userfaultfd
from postcopy_protocol import counters
from postcopy_protocol.codec import unpack_offsets
from postcopy_protocol.geometry import AddressSpace, Region
from postcopy_protocol.messages import Fetch, Fetched, Message

from ..blocks import RamBlock
from ..paging.engine import Ask
from ..paging.paging import RemotePaging
from ..pool.custodian_client import CustodianClient
from ..pool.worker_pool import WorkerPool

log = logging.getLogger(__name__)

NUMBER = 0
KEY = "client/0"
PIECE = 1 << 20
"""Bytes asked of worker zero at a time: more would keep an urgent page behind them waiting."""


class ClientZero:
    """Waiter 0 of the engine. Only the main thread calls it."""

    def __init__(
        self,
        core: Userfaultfd,
        blocks: dict[int, RamBlock],
        custody: CustodianClient,
        send: Callable[[int, Message], None],
        event: Callable[[str, str], None],
    ) -> None:
        self.workforce: WorkerPool
        self.paging: RemotePaging
        self.faults = 0
        self._core = core
        self._blocks = blocks
        self._send = send
        self._event = event
        self._ready = False
        self._outside = 0
        self._poisoned: set[tuple[int, int]] = set()
        self.statistics = memory.create_memfd("postcopy-zero", counters.PAGE_BYTES)
        self.words = memoryview(mmap.mmap(self.statistics, counters.PAGE_BYTES)).cast("Q")
        custody.keep(KEY, b"", (self.statistics,))
        self._space = AddressSpace(
            Region(block.number, "shared", block.mapping.address, block.length, 0) for block in blocks.values()
        )

    # --- faults -------------------------------------------------------------------------------------------------------

    def fault(self, fault: PageFault) -> None:
        """A message of the core userfaultfd."""
        found = self._space.find(fault.address)
        if found is None:
            self._outside += 1
            if self._outside & (self._outside - 1) == 0:
                self._event(
                    "outside", f"core fault at {fault.address:#x}, outside every block ({self._outside} so far)"
                )
            return
        region, offset = found
        block = self._blocks[region.block]
        self.faults += 1
        page = offset // block.page_size
        self.paging.fault(NUMBER, block, [page], self._piece_end(block, page) - page)

    def _piece_end(self, block: RamBlock, page: int) -> int:
        return min(block.pages, page + max(1, PIECE // block.page_size))

    def fetch(self, ask: Ask) -> None:
        """Ask worker zero for pages of a local block; it is started when it is first needed."""
        if NUMBER not in self.workforce.fleet.slots:
            self.workforce.start(NUMBER)
        if self._ready:
            size = self._blocks[ask.block].page_size
            self._send(NUMBER, Fetch(ask.block, ask.first * size, (ask.end - ask.first) * size))

    def release(self, block: RamBlock, page: int, lost: bool) -> None:
        """Let our own system call run on; ``lost``: with EFAULT."""
        address = block.mapping.address + page * block.page_size
        if lost:
            self._poisoned.add((block.number, page))
            self._core.poison(address, block.page_size)
        self._core.wake(address, block.page_size)

    # --- worker zero --------------------------------------------------------------------------------------------------

    def worker_ready(self) -> None:
        """Worker zero is there, for the first time or again: what is in flight is asked (anew)."""
        self._ready = True
        for ask in self.outstanding():
            self.fetch(ask)

    def outstanding(self) -> list[Ask]:
        """What worker zero has been asked for and has not answered."""
        return [ask for ask in self.paging.engine.outstanding() if self._blocks[ask.block].kind == "local"]

    def worker_lost(self) -> None:
        self._ready = False

    def fetched(self, answer: Fetched) -> None:
        block = self._blocks.get(answer.block)
        if block is None:
            return
        first, end = answer.offset // block.page_size, -(-(answer.offset + answer.length) // block.page_size)
        lost = [offset // block.page_size for offset in unpack_offsets(answer.lost)]
        self.paging.do(self.paging.engine.answered(block.number, first, end, lost))

    # --- for exports --------------------------------------------------------------------------------------------------

    def heal(self, block: RamBlock) -> None:
        """Drop our own poison marks: what was lost may be there by now."""
        if any(number == block.number for number, _ in self._poisoned):
            self._poisoned = {key for key in self._poisoned if key[0] != block.number}
            block.forget_own_pages()

    def give_up(self, block: RamBlock) -> None:
        """Poison whatever client zero waits for in this block: its system call ends with EFAULT."""
        for number, page in self.paging.engine.leave(NUMBER):
            self.release(self._blocks[number], page, lost=True)

    def close(self) -> None:
        os.close(self.statistics)
