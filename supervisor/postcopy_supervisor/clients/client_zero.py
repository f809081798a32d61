"""Client zero: the supervisor itself, whose system calls fault on its own mapping of the blocks.

A fault is read from the core userfaultfd, and its page is requested like any client's: from worker zero for a local
block, from the source for a remote one. A wake (or a poison) on the core userfaultfd lets the system call go on."""

from __future__ import annotations

from collections.abc import Mapping

from postcopy_kernel.userfaultfd import PageFault, Status, Userfaultfd
from postcopy_protocol.codec import unpack_offsets
from postcopy_protocol.geometry import AddressSpace, Region
from postcopy_protocol.messages import Fetched
from postcopy_protocol.received_map import RECEIVED

from ..blocks import RamBlock
from ..event_log import RecordEvent
from ..paging.engine import Ask
from ..paging.paging import RemotePaging
from .worker_zero import NUMBER, WorkerZero

RECEIVED_BYTE = bytes((RECEIVED,))
PIECE = 1 << 20  # bytes requested from worker zero at a time: more would delay an urgent page behind them


class OwnMapping:
    """Releases the supervisor's own system calls, which wait for pages of its mapping."""

    def __init__(self, core: Userfaultfd) -> None:
        self._core = core
        self._poisoned: set[tuple[int, int]] = set()

    def release(self, block: RamBlock, page: int, lost: bool) -> None:
        """Let a system call of ours go on; ``lost``: it fails with EFAULT."""
        address = block.mapping.address + page * block.page_size
        if lost:
            self._poisoned.add((block.number, page))
            self._core.poison(address, block.page_size)
        elif block.guarded:
            # Each present page is a message too (MINOR): map it, and the received ones behind it, for one.
            states = block.received[page : page + max(1, PIECE // block.page_size)]
            count = len(states) - len(states.lstrip(RECEIVED_BYTE))
            if count and self._core.continue_(address, count * block.page_size).status is Status.DONE:
                return
        self._core.wake(address, block.page_size)

    def unpoison(self, block: RamBlock) -> None:
        """Drop our own poison marks, because lost pages may have arrived since."""
        if any(number == block.number for number, _ in self._poisoned):
            self._poisoned = {key for key in self._poisoned if key[0] != block.number}
            block.forget_own_pages()


class ClientZero:
    """Waiter 0 of paging. Only the main thread calls it."""

    def __init__(
        self,
        blocks: Mapping[int, RamBlock],
        paging: RemotePaging,
        worker: WorkerZero,
        mapping: OwnMapping,
        event: RecordEvent,
    ) -> None:
        self.faults = 0
        self.counters = worker.counters
        self._blocks, self._paging, self._worker, self._mapping, self._event = blocks, paging, worker, mapping, event
        self._outside = 0
        self._space = AddressSpace(
            Region(block.number, "shared", block.mapping.address, block.length, 0) for block in blocks.values()
        )

    def fault(self, fault: PageFault) -> None:
        """Handle a message of the core userfaultfd."""
        found = self._space.find(fault.address)
        if found is None:
            self._outside += 1
            if self._outside & (self._outside - 1) == 0:
                text = f"core fault at {fault.address:#x}, outside every block ({self._outside} so far)"
                self._event("outside", text)
            return
        region, offset = found
        block = self._blocks[region.block]
        self.faults += 1
        page = offset // block.page_size
        self._paging.fault(NUMBER, block, [page], self._piece_end(block, page) - page)

    def _piece_end(self, block: RamBlock, page: int) -> int:
        return min(block.pages, page + max(1, PIECE // block.page_size))

    def on_worker_ready(self) -> None:
        """Worker zero serves, for the first time or again: ask for everything that is outstanding."""
        self._worker.ready = True
        for ask in self.outstanding():
            self._worker.fetch(ask)

    def on_worker_crashed(self) -> None:
        self._worker.ready = False

    def outstanding(self) -> list[Ask]:
        """What worker zero has been asked for and has not answered."""
        return [ask for ask in self._paging.engine.outstanding() if self._blocks[ask.block].kind == "local"]

    def on_fetched(self, answer: Fetched) -> None:
        block = self._blocks.get(answer.block)
        if block is None:
            return
        first, end = answer.offset // block.page_size, -(-(answer.offset + answer.length) // block.page_size)
        lost = [offset // block.page_size for offset in unpack_offsets(answer.lost)]
        self._paging.do(self._paging.engine.answered(block.number, first, end, lost))

    def prepare_export(self, block: RamBlock) -> None:
        self._mapping.unpoison(block)

    def give_up(self, block: RamBlock) -> None:
        """Poison the pages of this block that client zero waits for: the system call of a cancelled export fails."""
        for number, page in self._paging.engine.leave(NUMBER):
            if number == block.number:
                self._mapping.release(block, page, lost=True)
            else:  # another export's
                self._paging.fault(NUMBER, self._blocks[number], [page])
