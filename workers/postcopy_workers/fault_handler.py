"""The fault handler: what to do about one message of a client's userfaultfd.

The law, in the order in which it is asked (``docs/design.md`` has the argument):

    where?      no region of ours         report; nobody but the client itself can have registered it. Do not spin on
    it.
    how?        MINOR (announced client)  somebody made the page: ours -> CONTINUE, nobody's -> repair or report,
    CONTINUE
    received?   and present               WAKE (another worker's COPY raced this fault)
                but absent                somebody punched it, or "shared" memory was not the block: place in the block
                itself
    lost?                                 poison it for this client: SIGBUS, never zeros
    missing?    shared client             COPY on the client's ufd: places in the block, maps and wakes in one call
                private client            COPY through our own mapping, then CONTINUE (read) or WAKE (write: one fault
                to
                                          the client's copy instead of two) on the client's ufd
    then        fault-around              the window beyond the page, when the faults come in order

Handlers run in the fault path of their client, so the common case is one flat closure over local names: 16 % of the
latency of a C handler, where methods and attribute reads cost 30 %. Everything uncommon leaves it at once.
All system calls come through ``Calls``: the tests run this very code on a simulated kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from time import monotonic_ns, perf_counter_ns

from postcopy_kernel.userfaultfd import (
    UFFDIO_CONTINUE,
    UFFDIO_COPY,
    UFFDIO_POISON,
    UFFDIO_WAKE,
)
from postcopy_protocol import statistics
from postcopy_protocol.errors import PageLost
from postcopy_protocol.messages import RegionGrant
from postcopy_protocol.received import LOST, MISSING, PLACING, RECEIVED
from postcopy_protocol.window import FaultAround

from .page_sources import HandlerFailed, SourceChanged
from .placing import COPY_DONTWAKE, Block, Calls, Structure

FAULT_WRITE = 1
FAULT_MINOR = 4
EVENT_PAGEFAULT = 0x12
MESSAGE_WORDS = 4
SEEK_END = 2

Window = tuple["Region", int, int]
"""Region, page that was placed, pages from it on: what fault-around may do once the client runs again."""
Resolve = Callable[[int, int], "Window | None"]


class ClientGone(Exception):
    """The client's memory does not exist any more (ESRCH): its worker has nothing left to do."""


class CannotGoOn(Exception):
    """An answer of the kernel that our code does not provoke: the worker ends, its successor starts afresh."""


class Region:
    """One registered range of the client: its address space side of a block."""

    def __init__(self, grant: RegionGrant, block: Block, around: FaultAround) -> None:
        self.grant = grant
        self.around = around
        self.block = block
        self.start = grant.address
        self.end = grant.address + grant.length
        self.base = grant.address - grant.offset
        """Address that offset 0 of the block has, or would have, in the client."""
        self.first_page = grant.offset >> block.shift
        self.end_page = min(block.grant.pages, (grant.offset + grant.length) >> block.shift)
        self.private = grant.mode == "private"
        self.stale = False


class FaultHandler:
    """All regions of one client. ``words`` is its statistics page as u64, ``house`` the supervisor's (window limit)."""

    def __init__(
        self,
        userfaultfd: int,
        regions: list[Region],
        words: memoryview,
        house: memoryview,
        report: Callable[[str, int, int, str], None],
        calls: Calls,
        pause: Callable[[float], None],
    ) -> None:
        self.userfaultfd = userfaultfd
        self.regions = sorted(regions, key=lambda region: region.start)
        self._words = words
        self._house = house
        self._report = report
        self._calls = calls
        self._pause = pause
        self._range = Structure(2)
        self._ranged = Structure(4)
        self._shortage = 0
        self._handlers = [(region.start, region.end, self._resolver(region)) for region in self.regions]

    # --- what the loop calls ------------------------------------------------------------------------------------------

    def wake_everything(self) -> None:
        """First act of every worker: whoever waited for a predecessor faults again, and the kernel tells us
        everything."""
        for region in self.regions:
            self._wake(region.start, region.end - region.start)

    def messages(self, words: memoryview, count: int) -> None:
        """Answer ``count`` messages (4 words each) that one read gave; a page is resolved once however many wait."""
        if count == 1:
            self.message(words[0], words[1], words[2])
            return
        seen: set[int] = set()
        for at in range(0, count * MESSAGE_WORDS, MESSAGE_WORDS):
            address = words[at + 2]
            if words[at] & 0xFF == EVENT_PAGEFAULT and address in seen:
                self._words[statistics.DEDUPLICATED] += 1
                continue  # answering the first has woken, or will wake, every thread on that page
            seen.add(address)
            self.message(words[at], words[at + 1], address)

    def message(self, event: int, flags: int, address: int) -> None:
        """Answer one message; raises ClientGone or CannotGoOn."""
        if event & 0xFF != EVENT_PAGEFAULT:
            self._report(
                "foreign-event", 0, address, f"event {event & 0xFF:#x} on the client's userfaultfd; not handled"
            )
            return
        self._words[statistics.FAULTS] += 1
        begun = perf_counter_ns()
        for start, end, resolve in self._handlers:
            if start <= address < end:
                window = resolve(address, flags)
                break
        else:
            # Left waiting on purpose: a WAKE would make it fault again, for ever.
            return self._report("outside", 0, address, f"fault at {address:#x}, outside every region of this client")
        self._words[statistics.bucket(perf_counter_ns() - begun)] += 1
        if window:
            self._widen(*window)

    def distrust(self) -> None:
        """A file was cut or written to: from now on every single page is checked, which takes the careful way. Called
        by the worker's second thread; the list is exchanged whole."""
        for region in self.regions:
            region.block.pages.linear = 0
        self._handlers = [(region.start, region.end, self._resolver(region)) for region in self.regions]

    # --- the common case ----------------------------------------------------------------------------------------------

    def _resolver(self, region: Region) -> Resolve:
        return self._private_resolver(region) if region.private else self._shared_resolver(region)

    def _shared_resolver(self, region: Region) -> Resolve:
        block, base, words = region.block, region.base, self._words
        userfaultfd, ioctl, lseek = self.userfaultfd, self._calls.ioctl, self._calls.lseek
        received, shift, linear = block.received, block.shift, block.pages.linear
        descriptor, size = block.pages.descriptor, block.pages.size
        structure = Structure(5, 0, 0, 1 << shift)
        copy, buffer = structure.words, structure.buffer
        window, uncommon = region.around.window, self._uncommon
        placed, page_start = statistics.PLACED, -1 << shift

        def resolve(address: int, flags: int) -> Window | None:
            offset = address - base & page_start
            page = offset >> shift
            if received[page] != MISSING or not linear or lseek(descriptor, 0, SEEK_END) != size or flags & FAULT_MINOR:
                return uncommon(region, page, flags)
            copy[0] = base + offset
            copy[1] = linear + offset
            received[page] = PLACING
            try:
                ioctl(userfaultfd, UFFDIO_COPY, buffer)
            except OSError:
                return uncommon(region, page, flags)
            received[page] = RECEIVED
            words[placed] += 1
            pages = window(page)
            return (region, page, pages) if pages > 1 else None

        return resolve

    def _private_resolver(self, region: Region) -> Resolve:
        block, base, words = region.block, region.base, self._words
        client, own, ioctl, lseek = self.userfaultfd, block.own, self._calls.ioctl, self._calls.lseek
        received, shift, linear = block.received, block.shift, block.pages.linear
        descriptor, size, own_base, own_fd = block.pages.descriptor, block.pages.size, own.address, own.userfaultfd
        copy_structure = Structure(5, 0, 0, 1 << shift, COPY_DONTWAKE)
        copy, copy_buffer = copy_structure.words, copy_structure.buffer
        release_structure = Structure(4, 0, 1 << shift)
        release, release_buffer = release_structure.words, release_structure.buffer
        window, uncommon, placed_own = region.around.window, self._uncommon, block.placed_own
        placed, page_start, announced = statistics.PLACED, -1 << shift, region.grant.announced

        def resolve(address: int, flags: int) -> Window | None:
            offset = address - base & page_start
            page = offset >> shift
            if received[page] != MISSING or not linear or lseek(descriptor, 0, SEEK_END) != size or flags & FAULT_MINOR:
                return uncommon(region, page, flags)
            copy[0] = own_base + offset
            copy[1] = linear + offset
            received[page] = PLACING
            try:
                ioctl(own_fd, UFFDIO_COPY, copy_buffer)
                received[page] = RECEIVED
                release[0] = base + offset
                # A write is let fault again: it goes to the client's own copy at once, without a read-only mapping
                # first.
                ioctl(client, UFFDIO_WAKE if flags & FAULT_WRITE and not announced else UFFDIO_CONTINUE, release_buffer)
            except OSError:
                return uncommon(region, page, flags)
            words[placed] += 1
            placed_own(1)
            pages = window(page)
            return (region, page, pages) if pages > 1 else None

        return resolve

    # --- everything uncommon ------------------------------------------------------------------------------------------

    def _uncommon(self, region: Region, page: int, flags: int) -> Window | None:
        """A page whose state, source or kernel's answer is not the common one; ends with a wake, a poison or a
        report."""
        block = region.block
        state = block.received[page]
        try:
            if flags & FAULT_MINOR:
                self._announced_page(region, page)
            elif state == RECEIVED and block.present(page):
                self._words[statistics.DEDUPLICATED] += 1
                self._release(region, page, flags)
            elif state == LOST and not block.present(page):
                self._poison(region, page)
            else:
                return self._place(region, page, flags, in_block=region.private or state == RECEIVED)
        except PageLost as lost:
            self._lose(region, page, "lost", str(lost) or "its source says that it is lost")
        except SourceChanged as changed:
            self._lose(region, page, "source-changed", str(changed))
        except HandlerFailed as failed:
            self._words[statistics.FAILURES] += 1
            self._poison(region, page)  # for this client only; another client's worker asks the handler again
            block.report("handler-failed", page, str(failed))
        return None

    def _place(self, region: Region, page: int, flags: int, in_block: bool) -> Window | None:
        """Place one page the careful way and release its waiters."""
        block = region.block
        self._words[statistics.BUSY_SINCE_NS] = monotonic_ns()
        block.pages.check()
        others = block.settled
        if in_block:
            failed = block.fill_own(page, 1)
        else:
            failed = block.fill(self.userfaultfd, region.base, page, 1, 0)
        self._words[statistics.BUSY_SINCE_NS] = 0
        if failed:
            self._failed(region, page, failed)
            return None
        self._shortage = 0
        self._words[statistics.PLACED if block.settled == others else statistics.DEDUPLICATED] += 1
        self._release(region, page, flags)
        pages = region.around.window(page)
        return (region, page, pages) if pages > 1 else None

    def _failed(self, region: Region, page: int, failed: int) -> None:
        """COPY of a single page was refused with this errno."""
        block, address = region.block, region.base + (page << region.block.shift)
        if failed == errno.ESRCH:
            raise ClientGone
        if failed == errno.ENOENT:
            if not region.stale:
                region.stale = True
                block.report("stale-region", page, f"{address:#x} is not registered any more; nobody can wait there")
            self._wake(address, 1 << block.shift)
        elif failed == errno.EAGAIN:
            self._wake(address, 1 << block.shift)  # an event is in the way: it is read next, then the fault comes again
        elif failed == errno.EFAULT:
            block.pages.check()  # a cut file raises SourceChanged
            raise PageLost("its source cannot be read (input/output error)")
        elif failed in (errno.ENOMEM, errno.ENOSPC):
            self._starved(region, page, failed)
        else:
            raise CannotGoOn(f"UFFDIO_COPY of page {page} at {address:#x}: {errno.errorcode.get(failed, failed)}")

    def _starved(self, region: Region, page: int, failed: int) -> None:
        """No memory: this client waits, ever longer up to a second, and faults again; everybody else goes on."""
        if self._shortage == 0:
            region.block.report(
                "no-memory", page, f"{errno.errorcode[failed]} while placing; tried again until it fits"
            )
        self._pause(min(1.0, 0.01 * 2**self._shortage))
        self._shortage = min(self._shortage + 1, 10)
        self._wake(region.base + (page << region.block.shift), 1 << region.block.shift)

    def _announced_page(self, region: Region, page: int) -> None:
        """A page that is in the block but not yet this client's: let it through only if it is ours (or made ours)."""
        block = region.block
        if block.received[page] != RECEIVED:
            failed = block.settle(page)
            if failed:
                return self._failed(region, page, failed)
        self._release(region, page, FAULT_MINOR)

    def _lose(self, region: Region, page: int, kind: str, reason: str) -> None:
        block = region.block
        if block.present(page):  # somebody else was in time
            block.received[page] = RECEIVED
            return self._release(region, page, 0)
        block.received[page] = LOST
        self._words[statistics.LOST] += 1
        self._poison(region, page)
        block.report(kind, page, reason)

    def _widen(self, region: Region, page: int, pages: int) -> None:
        """Fault-around from the page behind ``page``, clipped to region, block and what memory allows now."""
        block = region.block
        limit = self._house[statistics.WINDOW_LIMIT] >> block.shift
        end = min(page + min(pages, limit), region.end_page)
        if end <= page + 1:
            return
        self._words[statistics.BUSY_SINCE_NS] = monotonic_ns()
        try:
            if region.private:
                placed = block.widen(block.own.userfaultfd, block.own.address, page + 1, end, COPY_DONTWAKE)
                block.placed_own(placed)
                if region.grant.announced and placed:
                    self._continue(region.base + (page + 1 << block.shift), end - page - 1 << block.shift)
            else:
                placed = block.widen(self.userfaultfd, region.base, page + 1, end, 0)
        except (PageLost, SourceChanged, HandlerFailed):
            return  # the fault of the page itself will say it, to whoever needs it
        finally:
            self._words[statistics.BUSY_SINCE_NS] = 0
        self._words[statistics.PLACED] += placed
        self._words[statistics.AROUND] += placed

    # --- the client's userfaultfd -------------------------------------------------------------------------------------

    def _release(self, region: Region, page: int, flags: int) -> None:
        """Let the waiters of a present page run: by WAKE, or by CONTINUE where the page is announced or was
        poisoned."""
        address, length = region.base + (page << region.block.shift), 1 << region.block.shift
        if flags & FAULT_MINOR or region.grant.announced:
            failed = self._continue(address, length)
            if failed == errno.ESRCH:
                raise ClientGone
            if failed == 0:
                return
        self._wake(address, length)

    def _wake(self, start: int, length: int) -> None:
        self._range.words[0], self._range.words[1] = start, length
        self._words[statistics.WAKES] += 1
        self._calls.ioctl(self.userfaultfd, UFFDIO_WAKE, self._range.buffer)

    def _continue(self, start: int, length: int) -> int:
        words = self._ranged.words
        words[0], words[1], words[2], words[3] = start, length, 0, 0
        try:
            self._calls.ioctl(self.userfaultfd, UFFDIO_CONTINUE, self._ranged.buffer)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _poison(self, region: Region, page: int) -> None:
        """SIGBUS for this client at this page, now and until it is healed."""
        address, length = region.base + (page << region.block.shift), 1 << region.block.shift
        words = self._ranged.words
        words[0], words[1], words[2], words[3] = address, length, 0, 0
        try:
            self._calls.ioctl(self.userfaultfd, UFFDIO_POISON, self._ranged.buffer)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise ClientGone from None
            if error.errno in (errno.EEXIST, errno.EAGAIN):
                self._wake(address, length)  # mapped or poisoned already: the waiter will see for itself
            else:
                # Before Linux 6.6 there is no poison. Waiting is honest, zeros would not be.
                region.block.report("lost", page, "this kernel cannot poison a page: its readers wait")
