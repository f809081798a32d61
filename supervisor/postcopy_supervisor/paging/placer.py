"""The placer puts pages into remote blocks: mark PLACING, UFFDIO_COPY on the core userfaultfd, mark RECEIVED.

Placing, zeros, huge pages, pages that are present already, and pages that are lost. Waiters are not its business."""

from __future__ import annotations

import errno
import os

from postcopy_kernel import crashpoints
from postcopy_kernel.memory import Mapping, is_present
from postcopy_kernel.userfaultfd import Status, Userfaultfd
from postcopy_protocol.geometry import PAGE_2M
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED, SHARED, runs_of

from ..blocks import RamBlock
from ..event_log import RecordEvent
from .ports import Alarm

ZERO_PIECE = 1 << 20
DROP_AFTER = 32 << 20
"""Bytes placed after which our page tables of the block are dropped: they count as our memory. The data stays."""
RECEIVED_BYTE = bytes((RECEIVED,))


def event_fields(block: RamBlock, first: int, end: int) -> dict[str, int | str]:
    """Fields of an event about pages of a block."""
    return {"block": block.name, "offset": first * block.page_size, "length": (end - first) * block.page_size}


class Placer:
    """Places pages through the core userfaultfd ``core``."""

    def __init__(self, core: Userfaultfd, alarm: Alarm, event: RecordEvent) -> None:
        self.core = crashpoints.watched(core, "copy", "page.arrived", "page.placed")
        self.placed = 0  # pages, since the start
        self._alarm, self._event = alarm, event
        self._undropped = 0
        self._zeros = Mapping.anonymous(ZERO_PIECE)

    def place(self, block: RamBlock, first: int, end: int, source: int) -> int:
        """Place pages from memory at ``source``; received ones stay as they are. Returns the first page for which there
        is no memory, or ``end``."""
        size, received = block.page_size, block.received
        if end - first == 1:
            return end if received[first] == RECEIVED else self._copy(block, first, end, source)
        states, at = received[first:end], 0
        while at < len(states):
            stop = states.find(RECEIVED_BYTE, at)
            stop = len(states) if stop < 0 else stop
            if stop > at:
                placed = self._copy(block, first + at, first + stop, source + at * size)
                if placed < first + stop:
                    return placed
            at = stop + 1
        return end

    def place_zeros(self, block: RamBlock, first: int, end: int) -> int:
        """As ``place``, with zeros."""
        step = max(1, ZERO_PIECE // block.page_size)
        if block.page_size > self._zeros.length:
            self._zeros = Mapping.anonymous(block.page_size)
        for at in range(first, end, step):
            stop = self.place(block, at, min(end, at + step), self._zeros.address)
            if stop < min(end, at + step):
                return stop
        return end

    def lose(self, block: RamBlock, first: int, end: int, reason: str) -> list[int]:
        """Mark the absent pages of a range as lost; returns them."""
        lost = [page for page in range(first, end) if block.received[page] in (MISSING, PLACING)]
        for page in lost:
            block.received[page] = LOST
        if lost:
            text = f"block {block.name}: {len(lost)} pages from page {lost[0]}: {reason}"
            self._event("lost", text, **event_fields(block, lost[0], lost[-1] + 1), cause=reason)
        return lost

    def count(self, block: RamBlock, pages: int) -> None:
        """Count placed pages."""
        self.placed += pages
        self._undropped += pages * block.page_size
        if self._undropped >= DROP_AFTER:
            self._undropped = 0
            self._alarm.call_soon(block.forget_own_pages)

    def _copy(self, block: RamBlock, first: int, end: int, source: int) -> int:
        size, received, base = block.page_size, block.received, block.mapping.address
        before = received[first:end]
        while first < end:
            received[first:end] = bytes((PLACING,)) * (end - first)
            outcome = self.core.copy(base + first * size, source, (end - first) * size)
            done = max(0, outcome.done) // size
            received[first : first + done] = RECEIVED_BYTE * done
            self.count(block, done)
            first, source = first + done, source + done * size
            present = outcome.status is Status.PRESENT
            if present and self._accept_present(block, first, source):
                first, source = first + 1, source + size
            elif present or outcome.status is Status.EXHAUSTED:
                self._restore_marks(block, first, before[first - end :])
                break
            elif outcome.status not in (Status.DONE, Status.PARTIAL, Status.RETRY):
                raise OSError(errno.EIO, f"UFFDIO_COPY into block {block.name}: {outcome.status.name}")
        return first

    def _restore_marks(self, block: RamBlock, first: int, states: bytes) -> None:
        """Mark pages from ``first`` on as they were before a COPY that did not place them. PLACING may have been stored
        for that COPY; it stays only where a page is present, which a killed predecessor placed."""
        block.received[first : first + len(states)] = states
        for low, high in runs_of(states, PLACING):
            for page in range(first + low, first + high):
                if not self._present(block, page):
                    block.received[page] = MISSING

    def _present(self, block: RamBlock, page: int) -> bool:
        """Is it in the page cache? The kernel does not say it of huge pages, and they are not audited."""
        return block.page_size != PAGE_2M and is_present(block.memory, page * block.page_size)

    def _accept_present(self, block: RamBlock, page: int, source: int) -> bool:
        """Mark a page received that COPY found present: a killed predecessor placed it, or an unregistered mapping made
        it (polluted), because only this process places pages of remote blocks. A polluted page is replaced unless a
        client may have written it: in a guarded block none has, because it is not RECEIVED. False: it is absent; an
        empty pool of huge pages gives EEXIST too."""
        size = block.page_size
        want = Mapping(source, size).view(size, writable=False)
        if size == PAGE_2M:
            if self.core.continue_(block.mapping.address + page * size, size).status is Status.UNREADABLE:
                return False
            found = bytes(block.mapping.view()[page * size : (page + 1) * size])  # present, and mapped now
        else:
            found = os.pread(block.memory, size, page * size)
        if found != want:
            if block.guarded or not block.received[block.pages + SHARED]:
                if size == PAGE_2M:
                    block.mapping.view()[page * size : (page + 1) * size] = want
                else:
                    os.pwrite(block.memory, want, page * size)
            text = f"block {block.name}: page {page} was made by an unregistered mapping"
            cause = "a mapping that is not registered made it"
            self._event("polluted", text, **event_fields(block, page, page + 1), cause=cause)
        block.received[page] = RECEIVED
        return True
