"""The fault handler: what to do about one message of a client's userfaultfd.

The questions, in the order in which they are asked (``docs/design.md`` has the argument):

    where?      in no region of ours      report it: only the client can have registered that memory. Never spin on it.
    how?        MINOR (guarded block)     the page is present. Received -> CONTINUE; else place it, CONTINUE
    received?   and present               WAKE (another worker's COPY raced this fault)
                but absent                it was punched, or "shared" memory was not the block: place in the block
    lost?                                 poison it for this client: SIGBUS, never zeros
    missing?    shared client             COPY on the client's ufd: places in the block, maps and wakes in one call
                private client            COPY through our own mapping; then on the client's ufd CONTINUE for a read,
                                          WAKE for a write (one more fault, to the client's copy, instead of two)
    then        fault-around              the window beyond the page, when the faults come in order

The common cases are in ``fast_answers``; this class is their ``SlowPath``. All system calls go through ``Calls``, so
the tests run this code on a simulated kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from time import monotonic_ns, perf_counter_ns
from typing import NoReturn

from postcopy_protocol.counters import (
    AROUND,
    AROUND_USED,
    BUSY_BLOCK,
    BUSY_SINCE_NS,
    DEDUPLICATED,
    FAILURES,
    FAULTS,
    HELD_UNTIL_NS,
    OUTSIDE,
    PLACED,
    WINDOW_LIMIT,
    bucket,
    deny,
    note_reason,
)
from postcopy_protocol.counters import LOST as LOST_PAGES
from postcopy_protocol.errors import PageLost
from postcopy_protocol.received_map import LOST, PLACING, RECEIVED
from postcopy_protocol.stages import PLACED as PLACED_STAGE
from postcopy_protocol.stages import WOKEN
from postcopy_protocol.window import placed_until

from .client_ufd import FAULT_MINOR, ClientGone, ClientUserfaultfd, Region, unpoison_denied
from .fast_answers import Answer, fast_answer, is_for_loop
from .fault_loop import ANSWERED, BASE_SHIFT, BEHIND, ELSEWHERE, EVENT_PAGEFAULT, MESSAGE_FIELDS, NOTHING_READ
from .own_memory import OwnMemory, own_answer
from .page_sources import Elsewhere, HandlerFailed, NoPages, RemotePages, SourceChanged
from .placing import COPY_DONTWAKE, Calls
from .recording import Recording
from .repeats import Pause, Repeats
from .reports import Reporter
from .requests import Requests
from .twin import FaultLoop, LocalRegion

HELD_SECONDS = 0.05  # of a client's wait, until its fault is read again, while a cgroup has no memory left
Idle = Callable[[], None]  # waits for a fault after a read gave nothing


class CannotContinue(Exception):
    """An answer of the kernel that our code does not provoke: the worker ends, a successor starts from scratch."""


class FaultHandler:
    """Resolves the faults of all regions of one client, on the worker's main thread. ``counters`` is the client's
    statistics page as u64; ``control`` is the supervisor's page (window limit)."""

    def __init__(
        self,
        userfaultfd: int,
        regions: list[Region],
        counters: memoryview,
        control: memoryview,
        report: Reporter,
        calls: Calls,
        pause: Pause,
        requests: Requests | None = None,
        recording: Recording | None = None,
        own: OwnMemory | None = None,
    ) -> None:
        self.own = own
        self.userfaultfd = own or ClientUserfaultfd(userfaultfd, counters, calls)
        self.regions = sorted(regions, key=lambda region: region.start)
        self._requests = requests
        self._counters = counters
        self.control = control
        self._report = report
        self._pause = pause
        self._shortages = 0
        self._repeats, self._only_woken, self._slowed = Repeats(pause), False, False
        common = [] if own is not None else [region for region in self.regions if is_for_loop(region)]
        local = [LocalRegion(region, userfaultfd, counters, control, calls) for region in common]
        self._loop = FaultLoop(userfaultfd, local, calls) if local else None
        self._elsewhere: Answer = self._dispatcher(calls)
        """Resolves what is not for the loop; of a remote block, where it is the only such region, it is
        ``_remote.answer_remote``."""
        answer: Answer = self._elsewhere if self._loop is None else self._answer_by_loop
        self.answer: Answer = answer if recording is None else recording.recorded(answer, self.regions)
        """Resolves one page fault (flags, address): ``_elsewhere`` or, with a loop, ``_answer_by_loop``."""
        self.reads = self._loop is not None and recording is None
        """Does ``serve`` read the messages? Else the caller does, and gives them to ``answer`` or ``messages``."""

    def _dispatcher(self, calls: Calls) -> Answer:
        """The closures of the regions that the loop does not answer. One region is the rule; its own answer checks
        whether the fault is inside."""
        ufd, requests = self.userfaultfd.descriptor, self._requests
        answers: list[tuple[int, int, Answer]] = []
        for region in self.regions:
            if self._loop is not None and is_for_loop(region):
                continue
            inside = fast_answer(region, ufd, self._counters, calls, self, requests)
            if self.own is not None:
                inside = own_answer(region, self.own, self._counters, inside)
            answers.append((region.start, region.end, inside))
        if not answers:
            return lambda flags, address: self.outside(address)
        if len(answers) == 1:
            return answers[0][2]

        def answer_of_region(flags: int, address: int) -> None:
            for start, end, inside in answers:
                if start <= address < end:
                    return inside(flags, address)
            return self.outside(address)

        return answer_of_region

    def serve(self, idle: Idle) -> NoReturn:
        """Read and answer for ever, where ``reads`` is true: for a client with common local blocks. Faults of its other
        blocks come back as ELSEWHERE and go to ``_elsewhere``. Raises ClientGone, CannotContinue or OSError."""
        loop = self._loop
        assert loop is not None
        fields = loop.messages
        while True:
            outcome = loop.run()
            if outcome == NOTHING_READ:
                idle()
                continue
            at, left = (loop.at - 1) * MESSAGE_FIELDS, loop.count - loop.at
            if outcome == BEHIND or (not left and fields[at] == EVENT_PAGEFAULT):
                self._go_on(outcome, fields[at + 1], fields[at + 2])
            else:
                loop.at = loop.count
                self.messages(fields[at:], left + 1)

    def _answer_by_loop(self, flags: int, address: int) -> None:
        assert self._loop is not None
        outcome = self._loop.answer(flags, address)
        if outcome != ANSWERED:
            self._go_on(outcome, flags, address)

    def _go_on(self, outcome: int, flags: int, address: int) -> None:
        """Do what the loop has left to us of a page fault."""
        if outcome == ELSEWHERE:
            return self._elsewhere(flags, address)
        loop = self._loop
        assert loop is not None
        local = loop.current
        region: Region = local.region
        page = address - region.base >> BASE_SHIFT
        if outcome != BEHIND:
            return self.resolve(region, page, flags, loop.begun or perf_counter_ns())
        pages = loop.pages or region.around.window(page)
        placed, local.placed = local.placed, 0
        region.block.tidy(placed)
        if pages > 1:
            self.widen(region, page, pages)

    def wake_everything(self) -> None:
        """First act of every worker: threads that waited for a dead predecessor fault again, and are read again."""
        self.userfaultfd.wake_all(self.regions)

    def messages(self, fields: memoryview, count: int) -> None:
        """Answer ``count`` messages of one read; each page is resolved once however many threads wait for it.
        Raises ClientGone or CannotContinue."""
        if count == 1:
            self.message(fields[0], fields[1], fields[2])
            return
        seen: set[int] = set()
        if self._requests is not None:
            self._requests.hold()
        for at in range(0, count * MESSAGE_FIELDS, MESSAGE_FIELDS):
            address = fields[at + 2]
            if fields[at] & 0xFF == EVENT_PAGEFAULT:
                if address in seen:
                    self._counters[DEDUPLICATED] += 1
                    continue  # answering the first has woken, or will wake, every thread on that page
                seen.add(address)
            self.message(fields[at], fields[at + 1], address)
        if self._requests is not None:
            self._requests.flush()

    def message(self, event: int, flags: int, address: int) -> None:
        """Answer one message of any kind; see ``messages``."""
        if event & 0xFF == EVENT_PAGEFAULT:
            return self.answer(flags, address)
        if self.own is not None and self.own.handles(event & 0xFF):
            return None
        what = f"event {event & 0xFF:#x} on the client's userfaultfd; not handled"
        self._report("foreign-event", -1, -1, what)
        self.unpoison_local()  # while an event is unread the kernel maps nothing (EAGAIN)
        return None

    def unpoison_local(self) -> None:
        """Place the denied pages of local blocks and take their poison away. A predecessor without a source poisoned
        them (quarantine); what still cannot be had stays SIGBUS. ``PageWaker`` does the same for remote blocks."""
        unpoison_denied(self._counters, self.regions, self._unpoison)

    def _unpoison(self, region: Region, page: int) -> bool:
        block = region.block
        if isinstance(block.pages, NoPages | RemotePages) or block.received[page] == LOST:
            return False
        if block.received[page] != RECEIVED or not block.present(page):
            self._counters[BUSY_SINCE_NS] = monotonic_ns()
            try:
                block.pages.check()
                if block.fill_own(page, 1):
                    return False
            except (PageLost, SourceChanged, HandlerFailed):
                return False
            finally:
                self._counters[BUSY_SINCE_NS] = 0
        return self.userfaultfd.unpoison(region, page)

    def outside(self, address: int) -> None:
        """Report a fault outside every region and leave its thread waiting: a WAKE would make it fault again, for ever.
        Only the client itself can have registered such memory."""
        self._counters[OUTSIDE] += 1
        self._report("outside", -1, -1, f"fault at {address:#x}, outside every region of this client")

    def resolve(self, region: Region, page: int, flags: int, begun: int) -> None:
        """Resolve a fault that is not a common one; ends with a wake, a poison, a request or a report. ``begun`` (ns)
        is when its message was read. Raises ClientGone or CannotContinue."""
        block, counters = region.block, self._counters
        state = block.received[page]
        counters[FAULTS] += 1
        counters[BUSY_BLOCK] = block.grant.block
        counters[BUSY_SINCE_NS] = monotonic_ns()
        pages = 1
        try:
            if flags & FAULT_MINOR:
                pages = self._resume_announced(region, page)
            elif state == RECEIVED and block.present(page):
                counters[DEDUPLICATED] += 1
                self._resume(region, page, flags)
                pages = region.around.window(page) if region.own else self._follow(region, page)
            elif state == LOST and not block.present(page):
                counters[LOST_PAGES] += 1
                self._poison(region, page)
            else:
                pages = self._place(region, page, flags, begun, in_block=region.in_block or state == RECEIVED)
        except PageLost as lost:
            self._lose(region, page, "lost", str(lost) or "its source says that it is lost")
        except SourceChanged as changed:
            self._lose(region, page, "source-changed", str(changed))
        except HandlerFailed as failed:
            self._deny(region, page, str(failed))
        except Elsewhere:
            # Marked received, but punched. The mark is withdrawn first, or the supervisor would answer that the page
            # is present.
            block.received[page] = PLACING
            assert self._requests is not None
            self._requests.ask(block.grant.block, page << block.shift)
        counters[BUSY_SINCE_NS] = 0
        taken = bucket(perf_counter_ns() - begun)
        counters[taken] += 1
        region.stages[taken + WOKEN] += 1
        if pages > 1:
            self.widen(region, page, pages)
        if self._only_woken:
            self._only_woken = False
            self._look_for_repeats(region, page)

    def _resume(self, region: Region, page: int, flags: int) -> None:
        self._only_woken = not self.userfaultfd.resume(region, page, flags)

    def _poison(self, region: Region, page: int) -> None:
        self._only_woken = not self.userfaultfd.poison(region, page)

    def _wake(self, region: Region, page: int) -> None:
        self.userfaultfd.wake_page(region, page)
        self._only_woken = True

    def _look_for_repeats(self, region: Region, page: int) -> None:
        """Slow down a client whose thread faults at this page again and again, and report it once."""
        address = region.address(page)
        if self._repeats.seen(address, region.block.shift) and not self._slowed:
            self._slowed = True
            what = f"{address:#x} faults again and again though the page is there: that memory is not this block's, or "
            region.block.report("repeating", page, what + "its client has protected it; its faults are answered slowly")

    def _resume_announced(self, region: Region, page: int) -> int:
        """The page is present but not mapped by this client: map it only if we placed it, or replaced it. Returns how
        many pages fault-around may fill."""
        block, state = region.block, region.block.received[page]
        if state == LOST:
            self._counters[LOST_PAGES] += 1
            self._poison(region, page)
            return 1
        if state != RECEIVED:
            if self._requests is not None and isinstance(block.pages, RemotePages):
                self._requests.ask(block.grant.block, page << block.shift)  # the supervisor replaces it
                return 1
            block.pages.check()
            failed = block.fill_own(page, 1) if block.guarded else block.accept_present(page)
            if failed:
                self._not_placed(region, page, failed)
                return 1
        self._resume(region, page, FAULT_MINOR)
        return region.around.window(page) if block.guarded else 1

    def _place(self, region: Region, page: int, flags: int, begun: int, *, in_block: bool) -> int:
        """Place one page and let its threads run; returns how many pages fault-around may fill."""
        block = region.block
        if in_block and not block.huge and monotonic_ns() < self.control[HELD_UNTIL_NS]:
            self._pause(HELD_SECONDS)
            self._wake(region, page)
            return 1
        block.pages.check()
        others = block.placed_by_others
        if in_block:
            failed = block.fill_own(page, 1)
        else:
            failed = block.fill(self.userfaultfd.descriptor, region.base, page, 1, 0)
        if failed:
            self._not_placed(region, page, failed)
            return 1
        self._shortages = 0
        placed_by_us = block.placed_by_others == others
        self._counters[PLACED if placed_by_us else DEDUPLICATED] += 1
        region.stages[bucket(perf_counter_ns() - begun) + PLACED_STAGE] += 1
        self.userfaultfd.resume(region, page, flags)
        return region.around.window(page) if placed_by_us else self._follow(region, page)

    def _follow(self, region: Region, page: int) -> int:
        """Another worker was first: its window is in this client's way. Returns how many pages, of which those of the
        other are the first, fault-around may fill."""
        around, block = region.around, region.block
        end = placed_until(page, bytes(block.received[page : min(region.end_page, page + around.largest_pages)]))
        ahead = around.follow(page, end)
        return end - page + ahead if ahead or block.guarded else 1

    def _not_placed(self, region: Region, page: int, failed: int) -> None:
        """React to the errno of a COPY of a single page."""
        block = region.block
        if failed == errno.ESRCH:
            raise ClientGone
        if failed == errno.ENOENT:
            if not region.stale:
                region.stale = True
                what = f"{region.address(page):#x} is not registered any more; no thread can wait there"
                block.report("stale-region", page, what)
            self._wake(region, page)
        elif failed == errno.EAGAIN:  # an event is unread: it is read next, then the fault comes again
            self._wake(region, page)
        elif failed == errno.EFAULT:
            block.pages.check()  # a cut file raises SourceChanged
            raise PageLost("its source cannot be read (input/output error)")
        elif failed in (errno.ENOMEM, errno.ENOSPC):
            self._wait_for_memory(region, page, failed)
        else:
            name = errno.errorcode.get(failed, failed)
            raise CannotContinue(f"UFFDIO_COPY of page {page} at {region.address(page):#x}: {name}")

    def _wait_for_memory(self, region: Region, page: int, failed: int) -> None:
        """Without memory this client waits, ever longer up to a second, and faults again; other clients go on."""
        if self._shortages == 0:
            what = f"{errno.errorcode[failed]} while placing; tried again until it fits"
            region.block.report("no-memory", page, what)
        self._pause(min(1.0, 0.01 * 2**self._shortages))
        self._shortages = min(self._shortages + 1, 10)
        self.userfaultfd.wake_page(region, page)

    def _lose(self, region: Region, page: int, kind: str, reason: str) -> None:
        """The source cannot supply this page, now or ever."""
        block = region.block
        if self._resume_if_present(region, page):
            return
        # Where no lock keeps others out, it may be placed, and marked, between the look and the store.
        if block.lose(page) and not block.guarded and self._resume_if_present(region, page, LOST):
            return
        self._counters[LOST_PAGES] += 1
        note_reason(self._counters, reason, block.grant.block, page)
        block.report(kind, page, reason)  # before the client may die of it, and this worker with it
        self._poison(region, page)

    def _deny(self, region: Region, page: int, reason: str) -> None:
        """A handler function failed: poison the page for this client only; another worker calls the function again."""
        block = region.block
        note_reason(self._counters, reason, block.grant.block, page)
        self._counters[FAILURES] += 1
        block.report("handler-failed", page, reason)
        if not self._resume_if_present(region, page):
            # Noted first: a poison that a successor does not know of would stay.
            deny(self._counters, block.grant.block, page)
            self._poison(region, page)

    def refuse(self, number: int, offsets: tuple[int, ...], reason: str) -> None:
        """Poison pages that no supervisor brings any more."""
        for region in self.regions:
            for offset in offsets if region.block.grant.block == number else ():
                page = offset >> region.block.shift
                if region.first_page <= page < region.end_page:
                    self._deny(region, page, reason)

    def _resume_if_present(self, region: Region, page: int, *more_states: int) -> bool:
        """The source has nothing for this page: let the threads run if another worker has placed it. A present page
        with another mark is a foreign page of zeros, which cannot be replaced now: it is not let through."""
        block = region.block
        if not block.present(page) or block.received[page] not in (*block.believed, *more_states):
            return False
        block.received[page] = RECEIVED
        self._resume(region, page, 0)
        return True

    def widen(self, region: Region, page: int, pages: int) -> None:
        """Fault-around: place the pages behind ``page``, clipped to region, block and the supervisor's window limit."""
        block, counters = region.block, self._counters
        limit = self.control[WINDOW_LIMIT] >> block.shift
        end = min(page + min(pages, limit), region.end_page)
        if end <= page + 1:
            return
        counters[BUSY_SINCE_NS] = monotonic_ns()
        try:
            placed = 0
            if isinstance(block.pages, RemotePages):
                pass  # the supervisor has requested what is worth it
            elif region.in_block:
                placed = block.widen(block.own.userfaultfd, block.own.address, page + 1, end, COPY_DONTWAKE)
            else:
                placed = block.widen(self.userfaultfd.descriptor, region.base, page + 1, end, 0)
            if block.guarded or region.own:
                self.userfaultfd.map_received(region, page + 1, end)
        except (PageLost, SourceChanged, HandlerFailed):
            return  # a later fault on that page meets the same error and reports it
        finally:
            counters[BUSY_SINCE_NS] = 0
        block.tidy(placed)
        counters[PLACED] += placed
        counters[AROUND] += placed
        # A window counts as wide as it was meant to be, also where other workers had placed some of it.
        counters[AROUND_USED] = min(counters[AROUND_USED] + region.around.used, counters[AROUND])
        region.around.used = 0
