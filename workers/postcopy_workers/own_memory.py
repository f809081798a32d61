"""Clients whose memory is their own: pages are copied from the block into it (virtual machines).

    fault    COPIED or REMOVED in the copied map     zeros: the client had given the page back
             received                                UFFDIO_COPY from the block, and a window behind it
             missing                                 placed in the block first, as for any client; then copied
    event    REMOVE                                  the pages are REMOVED, before any fault of this read is answered
             UNMAP                                   nothing: no thread can fault there

The copy goes through a buffer of ours. Read through our mapping, a page that was punched out of the block would be a
fault that waits for this very process; ``pread`` of a hole gives zeros, which the one who punched it has written.

Only the main thread copies, and it reads events before it copies on. So no copy can land behind a removal: that page
would be back. The thread that hears of remote pages only wakes, and the threads fault again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import UFFDIO_COPY, UFFDIO_ZEROPAGE
from postcopy_protocol.copied_map import COPIED, COPYING, FRESH, MAP_AT, REMOVED
from postcopy_protocol.counters import FAULTS
from postcopy_protocol.received_map import RECEIVED

from .client_ufd import ClientGone, ClientUserfaultfd, Region
from .fast_answers import Answer
from .placing import Calls, Structure

EVENT_REMOVE, EVENT_UNMAP = 0x15, 0x16
MESSAGE_FIELDS = 4
LARGEST_COPY = 256 << 10
"""Bytes that are copied at once, or one page. The client's memory is locked meanwhile."""
_FRESH = bytes((FRESH,))
_RECEIVED = bytes((RECEIVED,))

ReadInto = Callable[[int, memoryview, int], int]  # descriptor, buffer, offset; bytes read


def _read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """``preadv`` of one buffer."""
    return os.preadv(descriptor, (buffer,), offset)


class OwnMemory(ClientUserfaultfd):
    """The client's userfaultfd for the main thread. ``memory``: the messages read last, then the copied map. All
    regions show one block, and no page twice."""

    def __init__(
        self, descriptor: int, counters: memoryview, calls: Calls, memory: memoryview, read: ReadInto = _read_into
    ) -> None:
        super().__init__(descriptor, counters, calls)
        self.messages = memory[:MAP_AT]
        self.copied = memory[MAP_AT:]
        self._read = read
        self._copy = Structure(5)
        self._buffer: Mapping | None = None

    def note_removals(self, regions: list[Region], fields: memoryview, count: int) -> None:
        """Note what the first ``count`` messages of ``fields`` say was given back. Doing it twice does no harm."""
        for at in range(0, count * MESSAGE_FIELDS, MESSAGE_FIELDS):
            if fields[at] & 0xFF == EVENT_REMOVE:
                for region in regions:
                    self._remove(region, fields[at + 1], fields[at + 2])

    def _remove(self, region: Region, start: int, end: int) -> None:
        """Whole pages only: a part of a huge page cannot be dropped."""
        shift, size = region.block.shift, 1 << region.block.shift
        first = max(region.first_page, (start - region.base + size - 1) >> shift)
        last = min(region.end_page, (end - region.base) >> shift)
        if first < last:
            self.copied[first:last] = bytes((REMOVED,)) * (last - first)

    def handles(self, event: int) -> bool:
        """Whether an event needs nothing more than ``note_removals``."""
        return event in (EVENT_REMOVE, EVENT_UNMAP)

    def zero(self, region: Region, page: int) -> bool:
        """Answer a fault of a page that was given back. False: its threads were only woken."""
        if not region.block.huge:
            return self._done(self._call(UFFDIO_ZEROPAGE, region.address(page), 1 << region.block.shift), region, page)
        size = 1 << region.block.shift
        buffer = self._room(size)
        buffer.view(size)[:] = bytes(size)
        return self._done(self._copy_from(buffer, region.address(page), size)[0], region, page)

    def resume(self, region: Region, page: int, flags: int) -> bool:
        """Copy a page of the block, which is there, into the client's memory. False: its threads were only woken."""
        return self._done(self.map(region, page), region, page)

    def unpoison(self, region: Region, page: int) -> bool:
        """As for any client; a page that was given back has no poison any more."""
        return self.copied[page] == REMOVED or super().unpoison(region, page)

    def _done(self, failed: int, region: Region, page: int) -> bool:
        if failed == 0:
            return True
        if failed == errno.ESRCH:
            raise ClientGone
        self.wake_page(region, page)
        # After EAGAIN an event is unread: it is read next, and then the thread faults again.
        return failed == errno.EAGAIN

    def map(self, region: Region, page: int, count: int = 1) -> int:
        """Copy ``count`` pages of the block, which are there; 0 or the errno that stopped it. Wakes their threads, and
        takes a poison away. A page that the client has already is EEXIST."""
        shift = region.block.shift
        length = count << shift
        buffer = self._room(length)
        self.copied[page : page + count] = bytes((COPYING,)) * count
        self._read(region.block.memory, buffer.view(length), page << shift)
        failed, placed = self._copy_from(buffer, region.address(page), length)
        done = placed >> shift
        if failed == errno.EEXIST:  # a thread's second message, or what a dead predecessor copied
            done += 1
        if done:
            self.copied[page : page + done] = bytes((COPIED,)) * done
        if done < count:
            self.copied[page + done : page + count] = bytes((FRESH,)) * (count - done)
        return failed

    def _room(self, length: int) -> Mapping:
        if self._buffer is None or self._buffer.length < length:
            self._buffer = Mapping.anonymous(max(length, LARGEST_COPY))
        return self._buffer

    def _copy_from(self, buffer: Mapping, target: int, length: int) -> tuple[int, int]:
        fields = self._copy.fields
        fields[0], fields[1], fields[2], fields[3], fields[4] = target, buffer.address, length, 0, 0
        try:
            self._ioctl(self.descriptor, UFFDIO_COPY, self._copy.buffer)
        except OSError as error:
            return error.errno or errno.EIO, max(0, self._copy.result(4))
        return 0, length

    def map_received(self, region: Region, first: int, end: int) -> None:
        """Copy the pages of a window that are received and that the client never had; stops at the first failure."""
        block = region.block
        most = max(1, LARGEST_COPY >> block.shift)
        while first < end:
            count = min(most, end - first)
            states = bytes(block.received[first : first + count])
            count = len(states) - len(states.lstrip(_RECEIVED))
            fresh = bytes(self.copied[first : first + count])
            count = len(fresh) - len(fresh.lstrip(_FRESH))
            if not count or not block.all_present(first, first + count) or self.map(region, first, count):
                return
            first += count


class OnlyWakes(ClientUserfaultfd):
    """For the thread that hears of remote pages: the main thread copies them when the client's threads fault again."""

    def map(self, region: Region, page: int, count: int = 1) -> int:
        self.wake_page(region, page)
        return 0

    def unpoison(self, region: Region, page: int) -> bool:
        """A denied page stays so until a worker begins."""
        return False


def own_answer(region: Region, own: OwnMemory, counters: memoryview, rest: Answer) -> Answer:
    """Answers the faults of one region: pages that were given back here, all others by ``rest``."""
    base, shift, first, end, copied = region.base, region.block.shift, region.first_page, region.end_page, own.copied

    def answer_given_back(flags: int, address: int) -> None:
        page = address - base >> shift
        if first <= page < end and copied[page] >= COPIED:
            counters[FAULTS] += 1
            own.zero(region, page)
            return
        rest(flags, address)

    return answer_given_back
