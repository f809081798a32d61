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
from collections.abc import Callable, Sequence
from time import monotonic_ns, perf_counter_ns

from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_POISON, UFFDIO_WAKE
from postcopy_protocol.counters import (
    AROUND,
    AROUND_USED,
    BUSY_SINCE_NS,
    DEDUPLICATED,
    FAILURES,
    FAULTS,
    OUTSIDE,
    PLACED,
    PLAIN,
    WAKES,
    WINDOW_LIMIT,
    allow,
    bucket,
    denied,
    deny,
)
from postcopy_protocol.counters import LOST as LOST_PAGES
from postcopy_protocol.errors import PageLost
from postcopy_protocol.messages import RegionGrant
from postcopy_protocol.received_map import CHANGED, LOST, PLACING, RECEIVED
from postcopy_protocol.stages import PLACED as PLACED_STAGE
from postcopy_protocol.stages import WOKEN, scratch
from postcopy_protocol.window import FaultAround

from .page_sources import Elsewhere, HandlerFailed, NoPages, RemotePages, SourceChanged
from .placing import COPY_DONTWAKE, Block, Calls, Structure
from .requests import Requests

FAULT_WRITE = 1
FAULT_MINOR = 4
EVENT_PAGEFAULT = 0x12
MESSAGE_WORDS = 4
SEEK_END = 2
TIMED = 17
"""Of the common faults one in so many is timed, and counts for as many: clocks and histograms cost 2 us each time. It
is the first, too, which counts for itself alone: nothing is warm then. A prime, because programs go in turns through
two, three, four or eight arrays or threads: each gets its share."""
BASE_SHIFT = 12

Answer = Callable[[int, int], None]
"""(flags, address) of a fault in one region."""


class ClientGone(Exception):
    """The client's memory does not exist any more (ESRCH): its worker has nothing left to do."""


class CannotGoOn(Exception):
    """An answer of the kernel that our code does not provoke: the worker ends, its successor starts afresh."""


class Region:
    """One registered range of the client: its address space side of a block."""

    def __init__(self, grant: RegionGrant, block: Block, around: FaultAround, stages: memoryview | None = None) -> None:
        self.grant = grant
        self.stages = stages if stages is not None else scratch()
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
        requests: Requests | None = None,
    ) -> None:
        self.userfaultfd = userfaultfd
        self._requests = requests
        self.regions = sorted(regions, key=lambda region: region.start)
        self._words = words
        self._house = house
        self._report = report
        self._calls = calls
        self._pause = pause
        self._range = Structure(2)
        self._ranged = Structure(4)
        self._shortage = 0
        self.answer = self._dispatcher()
        """(flags, address) of a page fault: the whole answer, for the loop's common case."""

    # --- what the loop calls ------------------------------------------------------------------------------------------

    def wake_everything(self) -> None:
        """First act of every worker: whoever waited for a predecessor faults again, and the kernel tells us
        everything."""
        for region in self.regions:
            self._wake(region.start, region.end - region.start)

    def heal(self, ask: Callable[[int, int], None] | None = None) -> None:
        """Pages that were poisoned because a predecessor had no source (quarantine): place them and let CONTINUE take
        the poison away; what cannot be had stays SIGBUS. With ``ask`` (block, offset) it is about remote blocks, by the
        waker, each time that the supervisor has heard its hello: before, the answer might not find the way."""
        for number, page in denied(self._words):
            mine = [
                region
                for region in self.regions
                if region.block.grant.block == number and region.first_page <= page < region.end_page
            ]
            healed = [self._heal(region, page, ask) for region in mine]
            if all(healed):
                allow(self._words, number, page)

    def _heal(self, region: Region, page: int, ask: Callable[[int, int], None] | None) -> bool:
        block = region.block
        remote = isinstance(block.pages, RemotePages)
        if isinstance(block.pages, NoPages) or block.received[page] == LOST or remote != (ask is not None):
            return False
        if ask is not None and block.received[page] != RECEIVED:
            ask(block.grant.block, page << block.shift)  # its wake heals it
            return False
        if ask is None and (block.received[page] != RECEIVED or not block.present(page)):
            self._words[BUSY_SINCE_NS] = monotonic_ns()
            try:
                block.pages.check()
                if block.fill_own(page, 1):
                    return False
            except (PageLost, SourceChanged, HandlerFailed):
                return False
            finally:
                self._words[BUSY_SINCE_NS] = 0
        failed = self._continue(region.base + (page << block.shift), 1 << block.shift)
        return failed in (0, errno.EEXIST, errno.ENOENT)

    def messages(self, words: memoryview, count: int) -> None:
        """Answer ``count`` messages (4 words each) that one read gave; a page is resolved once however many wait."""
        if count == 1:
            self.message(words[0], words[1], words[2])
            return
        seen: set[int] = set()
        if self._requests is not None:
            self._requests.hold()
        for at in range(0, count * MESSAGE_WORDS, MESSAGE_WORDS):
            address = words[at + 2]
            if words[at] & 0xFF == EVENT_PAGEFAULT and address in seen:
                self._words[DEDUPLICATED] += 1
                continue  # answering the first has woken, or will wake, every thread on that page
            seen.add(address)
            self.message(words[at], words[at + 1], address)
        if self._requests is not None:
            self._requests.flush()

    def woken(self, number: int, offsets: Sequence[int], *, lost: bool) -> None:
        """The supervisor's word on pages of a remote block that this client waits for: placed, or not to be had.
        Called by the waker, on a handler of its own: the two threads share nothing but regions and maps."""
        for region in self.regions:
            block = region.block
            if block.grant.block != number:
                continue
            for offset in offsets:
                page = offset >> block.shift
                if not region.first_page <= page < region.end_page:
                    continue
                if lost:
                    self._words[LOST_PAGES] += 1
                    self._poison(region, page)
                elif self._continue(region.base + offset, 1 << block.shift):
                    self._release(region, page, 0)
                else:
                    self._words[WAKES] += 1

    def waking(self, number: int) -> Callable[[int], None]:
        """``woken`` for one placed page of a block, by its offset: a closure over what never changes, as the answers
        are."""
        regions = [region for region in self.regions if region.block.grant.block == number]
        careful = self.woken
        if len(regions) != 1:
            return lambda offset: careful(number, (offset,), lost=False)
        region, words = regions[0], self._words
        base, shift, first, end = region.base, region.block.shift, region.first_page, region.end_page
        userfaultfd, ioctl = self.userfaultfd, self._calls.ioctl
        structure = Structure(4, 0, 1 << shift)
        place, buffer = structure.words, structure.buffer

        def wake(offset: int) -> None:
            if not first <= offset >> shift < end:
                return
            place[0] = base + offset
            try:
                ioctl(userfaultfd, UFFDIO_CONTINUE, buffer)
            except OSError:  # mapped already, an event in the way, the client is gone: it knows
                return careful(number, (offset,), lost=False)
            words[WAKES] += 1

        return wake

    def message(self, event: int, flags: int, address: int) -> None:
        """Answer one message of any kind; raises ClientGone or CannotGoOn."""
        if event & 0xFF == EVENT_PAGEFAULT:
            return self.answer(flags, address)
        what = f"event {event & 0xFF:#x} on the client's userfaultfd; not handled"
        self._report("foreign-event", -1, -1, what)
        self.heal()  # while an event is unread the kernel maps nothing (EAGAIN)
        return None

    def _outside(self, address: int) -> None:
        """Left waiting on purpose: a WAKE would make it fault again, for ever. Only the client itself can have
        registered such memory."""
        self._words[OUTSIDE] += 1
        self._report("outside", -1, -1, f"fault at {address:#x}, outside every region of this client")

    def _dispatcher(self) -> Answer:
        """One region is the rule, and its own answer looks whether the fault is inside."""
        if len(self.regions) == 1:
            return self._answer(self.regions[0])
        answers = [(region.start, region.end, self._answer(region)) for region in self.regions]

        def answer(flags: int, address: int) -> None:
            for start, end, inside in answers:
                if start <= address < end:
                    return inside(flags, address)
            return self._outside(address)

        return answer

    # --- the common case ----------------------------------------------------------------------------------------------

    def _answer(self, region: Region) -> Answer:
        """What a fault in this region is answered by. Lean closures are for what is common and worth it: 4K pages
        whose bytes lie in a file; a huge page, or one that a function makes, costs far more than the way there."""
        if isinstance(region.block.pages, RemotePages):
            return self._remote_answer(region)
        if not region.block.pages.linear or region.block.shift != BASE_SHIFT:
            return self._careful_answer(region)
        return self._private_answer(region) if region.private else self._shared_answer(region)

    def _careful_answer(self, region: Region) -> Answer:
        base, shift, uncommon = region.base, region.block.shift, self._uncommon
        first, end, outside = region.first_page, region.end_page, self._outside

        def answer(flags: int, address: int) -> None:
            page = address - base >> shift
            if not first <= page < end:
                return outside(address)
            return uncommon(region, page, flags, perf_counter_ns())

        return answer

    def _remote_answer(self, region: Region) -> Answer:
        base, shift, words, uncommon = region.base, region.block.shift, self._words, self._uncommon
        first, end, outside = region.first_page, region.end_page, self._outside
        received, number = region.block.received, region.block.grant.block
        assert self._requests is not None
        ask = self._requests.ask

        def answer(flags: int, address: int) -> None:
            page = address - base >> shift
            if not first <= page < end:
                return outside(address)
            if received[page] >= RECEIVED or flags & FAULT_MINOR:
                return uncommon(region, page, flags, perf_counter_ns())
            words[FAULTS] += 1
            return ask(number, page << shift)

        return answer

    def _shared_answer(self, region: Region) -> Answer:
        block, base, words, clock = region.block, region.base, self._words, perf_counter_ns
        userfaultfd, ioctl, received, trust_at = self.userfaultfd, self._calls.ioctl, block.received, block.trust_at
        lseek, descriptor, size = self._calls.lseek, block.pages.descriptor, block.pages.size
        source = block.pages.linear - base  # from an address of the client to the bytes that belong there
        structure = Structure(5, 0, 0, 1 << BASE_SHIFT)
        copy, buffer = structure.words, structure.buffer
        window, uncommon, widen, tidy = region.around.window, self._uncommon, self._widen, block.tidy
        first, end, outside = region.first_page, region.end_page, self._outside
        stages = region.stages

        def answer(flags: int, address: int) -> None:
            page = address - base >> BASE_SHIFT
            if not first <= page < end:
                return outside(address)
            plain = words[PLAIN]
            begun = 0 if plain % TIMED else clock()
            if received[page] or flags & FAULT_MINOR:
                return uncommon(region, page, flags, begun or clock())
            if received[trust_at] and (received[trust_at] == CHANGED or lseek(descriptor, 0, SEEK_END) != size):
                return uncommon(region, page, flags, begun or clock())
            copy[0] = address
            copy[1] = address + source
            received[page] = PLACING
            try:
                ioctl(userfaultfd, UFFDIO_COPY, buffer)
            except OSError:
                return uncommon(region, page, flags, begun or clock())
            received[page] = RECEIVED
            words[PLAIN] = plain + 1
            if begun:  # placed and woken are one call
                taken, weight = bucket(clock() - begun), TIMED if plain else 1
                words[taken] += weight
                stages[taken + PLACED_STAGE] += weight
                stages[taken + WOKEN] += weight
                tidy(TIMED)
            pages = window(page)
            if pages > 1:
                widen(region, page, pages)

        return answer

    def _private_answer(self, region: Region) -> Answer:
        block, base, words, clock = region.block, region.base, self._words, perf_counter_ns
        client, ioctl, received, trust_at = self.userfaultfd, self._calls.ioctl, block.received, block.trust_at
        lseek, descriptor, size = self._calls.lseek, block.pages.descriptor, block.pages.size
        own_fd, own = block.own.userfaultfd, block.own.address - base
        source = block.pages.linear - base
        copy_structure = Structure(5, 0, 0, 1 << BASE_SHIFT, COPY_DONTWAKE)
        copy, copy_buffer = copy_structure.words, copy_structure.buffer
        release_structure = Structure(4, 0, 1 << BASE_SHIFT)
        release, release_buffer = release_structure.words, release_structure.buffer
        window, uncommon, widen, tidy = region.around.window, self._uncommon, self._widen, block.tidy
        first, end, outside = region.first_page, region.end_page, self._outside
        stages = region.stages
        # A write is let fault again: it goes to the client's own copy at once, without a read-only mapping first.
        waking = 0 if region.grant.announced else FAULT_WRITE

        def answer(flags: int, address: int) -> None:
            page = address - base >> BASE_SHIFT
            if not first <= page < end:
                return outside(address)
            plain = words[PLAIN]
            begun = 0 if plain % TIMED else clock()
            if received[page] or flags & FAULT_MINOR:
                return uncommon(region, page, flags, begun or clock())
            if received[trust_at] and (received[trust_at] == CHANGED or lseek(descriptor, 0, SEEK_END) != size):
                return uncommon(region, page, flags, begun or clock())
            copy[0] = address + own
            copy[1] = address + source
            received[page] = PLACING
            try:
                ioctl(own_fd, UFFDIO_COPY, copy_buffer)
                received[page] = RECEIVED
                if begun:
                    weight = TIMED if plain else 1
                    stages[bucket(clock() - begun) + PLACED_STAGE] += weight
                release[0] = address
                ioctl(client, UFFDIO_WAKE if flags & waking else UFFDIO_CONTINUE, release_buffer)
            except OSError:
                return uncommon(region, page, flags, begun or clock())
            words[PLAIN] = plain + 1
            if begun:
                taken = bucket(clock() - begun)
                words[taken] += weight
                stages[taken + WOKEN] += weight
                tidy(TIMED)
            pages = window(page)
            if pages > 1:
                widen(region, page, pages)

        return answer

    # --- everything uncommon ------------------------------------------------------------------------------------------

    def _uncommon(self, region: Region, page: int, flags: int, begun: int) -> None:
        """A page whose state, source or kernel's answer is not the common one; ends with a wake, a poison or a
        report. ``begun`` (ns) is when its message was taken up."""
        block, words = region.block, self._words
        state = block.received[page]
        words[FAULTS] += 1
        words[BUSY_SINCE_NS] = monotonic_ns()
        pages = 1
        try:
            if flags & FAULT_MINOR:
                self._announced_page(region, page)
            elif state == RECEIVED and block.present(page):
                words[DEDUPLICATED] += 1
                self._release(region, page, flags)
            elif state == LOST and not block.present(page):
                self._poison(region, page)
            else:
                pages = self._place(region, page, flags, begun, in_block=region.private or state == RECEIVED)
        except PageLost as lost:
            self._lose(region, page, "lost", str(lost) or "its source says that it is lost")
        except SourceChanged as changed:
            self._lose(region, page, "source-changed", str(changed))
        except HandlerFailed as failed:
            words[FAILURES] += 1
            block.report("handler-failed", page, str(failed))
            if not self._released_after_all(region, page):
                # For this client only; another client's worker asks the handler again. Noted first: a poison that a
                # successor does not know of would stay.
                deny(words, block.grant.block, page)
                self._poison(region, page)
        except Elsewhere:
            # Marked received, but punched: the mark is withdrawn first, or we would be told that the page is there.
            block.received[page] = PLACING
            assert self._requests is not None
            self._requests.ask(block.grant.block, page << block.shift)
        words[BUSY_SINCE_NS] = 0
        taken = bucket(perf_counter_ns() - begun)
        words[taken] += 1
        region.stages[taken + WOKEN] += 1
        if pages > 1:
            self._widen(region, page, pages)

    def _place(self, region: Region, page: int, flags: int, begun: int, *, in_block: bool) -> int:
        """Place one page the careful way and release its waiters; returns the window that fault-around may fill."""
        block = region.block
        block.pages.check()
        others = block.settled
        if in_block:
            failed = block.fill_own(page, 1)
        else:
            failed = block.fill(self.userfaultfd, region.base, page, 1, 0)
        if failed:
            self._failed(region, page, failed)
            return 1
        self._shortage = 0
        self._words[PLACED if block.settled == others else DEDUPLICATED] += 1
        region.stages[bucket(perf_counter_ns() - begun) + PLACED_STAGE] += 1
        self._release(region, page, flags)
        return region.around.window(page)

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
        if self._released_after_all(region, page):
            return
        if not block.present(page):
            block.received[page] = LOST
            if self._released_after_all(region, page, LOST):  # placed, and marked, between our look and our store
                return
        self._words[LOST_PAGES] += 1
        block.report(kind, page, reason)  # before the client may die of it, and this worker with it
        self._poison(region, page)

    def _released_after_all(self, region: Region, page: int, *ours: int) -> bool:
        """The source has nothing for this page; was another worker in time? What is present though nobody of ours
        stored PLACING is a stranger's page of zeros, which nothing can mend now: it is not let through. Nor is one that
        an announced client may have made while somebody was about to, where there is no source to compare it with."""
        block = region.block
        trusted = (RECEIVED,) if region.grant.announced and isinstance(block.pages, NoPages) else (PLACING, RECEIVED)
        if not block.present(page) or block.received[page] not in (*trusted, *ours):
            return False
        block.received[page] = RECEIVED
        self._release(region, page, 0)
        return True

    def _widen(self, region: Region, page: int, pages: int) -> None:
        """Fault-around from the page behind ``page``, clipped to region, block and what memory allows now."""
        block = region.block
        limit = self._house[WINDOW_LIMIT] >> block.shift
        end = min(page + min(pages, limit), region.end_page)
        if end <= page + 1:
            return
        self._words[BUSY_SINCE_NS] = monotonic_ns()
        try:
            if region.private:
                placed = block.widen(block.own.userfaultfd, block.own.address, page + 1, end, COPY_DONTWAKE)
                if region.grant.announced and placed:
                    self._continue_received(region, page + 1, end)
            else:
                placed = block.widen(self.userfaultfd, region.base, page + 1, end, 0)
        except (PageLost, SourceChanged, HandlerFailed):
            return  # the fault of the page itself will say it, to whoever needs it
        finally:
            self._words[BUSY_SINCE_NS] = 0
        block.tidy(placed)
        self._words[PLACED] += placed
        self._words[AROUND] += placed
        # A window counts as wide as it was meant to be, also where others had placed some of it.
        self._words[AROUND_USED] = min(self._words[AROUND_USED] + region.around.used, self._words[AROUND])
        region.around.used = 0

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
        self._words[WAKES] += 1
        self._calls.ioctl(self.userfaultfd, UFFDIO_WAKE, self._range.buffer)

    def _continue(self, start: int, length: int) -> int:
        words = self._ranged.words
        words[0], words[1], words[2], words[3] = start, length, 0, 0
        try:
            self._calls.ioctl(self.userfaultfd, UFFDIO_CONTINUE, self._ranged.buffer)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _continue_received(self, region: Region, first: int, end: int) -> None:
        """Let an announced client have pages of a window without a fault for each: ours only, up to the first that is
        not, since what CONTINUE maps is never looked at again."""
        block = region.block
        states = bytes(block.received[first:end])
        count = len(states) - len(states.lstrip(bytes((RECEIVED,))))
        if count:
            self._continue(region.base + (first << block.shift), count << block.shift)

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
            if error.errno in (errno.EEXIST, errno.EAGAIN, errno.ENOENT):
                # Mapped or poisoned already, an event in the way, not registered any more: the waiter will see itself.
                self._wake(address, length)
            else:
                # Before Linux 6.6 there is no poison. Waiting is honest, zeros would not be.
                region.block.report("lost", page, "this kernel cannot poison a page: its readers wait")
