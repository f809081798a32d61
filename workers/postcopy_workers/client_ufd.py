"""Operations on the client's userfaultfd: wake, continue, poison and unpoison pages of its regions."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_POISON, UFFDIO_WAKE
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.counters import POISONED, WAKES, allow, denied, entry
from postcopy_protocol.messages import RegionGrant
from postcopy_protocol.received_map import RECEIVED
from postcopy_protocol.stages import scratch
from postcopy_protocol.window import FaultAround

from .placing import Block, Calls, Structure

FAULT_WRITE = 1
FAULT_MINOR = 4


class ClientGone(Exception):
    """The client's memory does not exist any more (ESRCH): its worker has nothing left to do."""


class Region:
    """One registered range of the client's address space, and the block that it maps."""

    def __init__(self, grant: RegionGrant, block: Block, around: FaultAround, stages: memoryview | None = None) -> None:
        self.grant = grant
        self.stages = stages if stages is not None else scratch()
        self.around = around
        self.block = block
        self.start = grant.address
        self.end = grant.address + grant.length
        self.base = grant.address - grant.offset  # address that offset 0 of the block has, or would have, in the client
        self.first_page = grant.offset >> block.shift
        self.end_page = min(block.grant.pages, (grant.offset + grant.length) >> block.shift)
        self.own = grant.mode in OWN  # see ``own_memory``
        self.when_lost = grant.mode.partition("-")[2]  # of a machine: wait, kill, or nothing: SIGBUS
        self.in_block = grant.mode != "shared" or block.guarded
        """Pages are placed through the worker's own mapping: COPY on the client's userfaultfd would fill its copy, or
        show it a page before that is marked received."""
        self.stale = False  # a page of it is not registered any more, and that was reported

    def address(self, page: int) -> int:
        """Address of a page of the block in the client."""
        return self.base + (page << self.block.shift)


class ClientUserfaultfd:
    """The client's userfaultfd. Not shared between threads: each call fills the same structures."""

    def __init__(self, descriptor: int, counters: memoryview, calls: Calls) -> None:
        self.descriptor = descriptor
        self._counters = counters
        self._ioctl = calls.ioctl
        self._range = Structure(2)
        self._range_mode_result = Structure(4)

    def wake(self, start: int, length: int) -> None:
        """Wake every thread that waits in this range; a thread whose page is still missing faults again."""
        self._range.fields[0], self._range.fields[1] = start, length
        self._counters[WAKES] += 1
        self._ioctl(self.descriptor, UFFDIO_WAKE, self._range.buffer)

    def wake_all(self, regions: Sequence[Region]) -> None:
        """Wake every thread of the client: those whose pages are missing fault again, and are read again."""
        for region in regions:
            self.wake(region.start, region.end - region.start)

    def wake_page(self, region: Region, page: int) -> None:
        """Wake every thread that waits for this page."""
        self.wake(region.address(page), 1 << region.block.shift)

    def resume(self, region: Region, page: int, flags: int) -> bool:
        """Let the threads that wait for a present page run: by CONTINUE where every page is announced (True: it is
        mapped now), else by WAKE. Raises ClientGone."""
        if flags & FAULT_MINOR or region.block.guarded:
            failed = self.map(region, page)
            if failed == errno.ESRCH:
                raise ClientGone
            if failed == 0:
                return True
        self.wake_page(region, page)
        return False

    def map(self, region: Region, page: int, count: int = 1) -> int:
        """Map present pages for the client and wake its threads (CONTINUE); 0 or the errno. Takes a poison away."""
        shift = region.block.shift
        return self._call(UFFDIO_CONTINUE, region.address(page), count << shift)

    def map_received(self, region: Region, first: int, end: int) -> None:
        """Map the pages of a window of a guarded block, which saves the client a fault for each. It stops at the first
        page that is not marked received: what CONTINUE has mapped is never checked again."""
        states = bytes(region.block.received[first:end])
        count = len(states) - len(states.lstrip(bytes((RECEIVED,))))
        if count:
            self.map(region, first, count)

    def poison(self, region: Region, page: int) -> bool:
        """Give this client SIGBUS at this page until it is unpoisoned. False: its threads were only woken. Raises
        ClientGone."""
        if region.when_lost:
            if region.when_lost == "kill":
                region.block.report("kill", page, "its machine is not to go on without it")
            return True
        self._counters[POISONED] = entry(region.block.grant.block, page)  # first: the client may die of it at once
        failed = self._call(UFFDIO_POISON, region.address(page), 1 << region.block.shift)
        if failed == errno.ESRCH:
            raise ClientGone
        if failed in (errno.EEXIST, errno.EAGAIN, errno.ENOENT):
            # Mapped or poisoned already, an unread event, not registered any more: the thread's next fault shows it.
            self.wake_page(region, page)
            return False
        if failed:
            # Linux before 6.6 cannot poison. The threads wait: zeros would be wrong bytes.
            region.block.report("lost", page, "this kernel cannot poison a page: its readers wait")
        return True

    def unpoison(self, region: Region, page: int) -> bool:
        """Replace the poison of a present page by its bytes; False when that must be tried again."""
        return self.map(region, page) in (0, errno.EEXIST, errno.ENOENT)

    def _call(self, request: int, start: int, length: int) -> int:
        fields = self._range_mode_result.fields
        fields[0], fields[1], fields[2], fields[3] = start, length, 0, 0
        try:
            self._ioctl(self.descriptor, request, self._range_mode_result.buffer)
        except OSError as error:
            return error.errno or errno.EIO
        return 0


TryUnpoison = Callable[[Region, int], bool]  # unpoisons a page if that is possible now


def unpoison_denied(counters: memoryview, regions: Sequence[Region], unpoison: TryUnpoison) -> None:
    """Try each page that is noted as denied to this client, and remove the note where no region needs it any more."""
    for number, page in denied(counters):
        concerned = [
            region
            for region in regions
            if region.block.grant.block == number and region.first_page <= page < region.end_page
        ]
        done = [unpoison(region, page) for region in concerned]
        if all(done):
            allow(counters, number, page)
