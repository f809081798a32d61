"""Placing pages in a RAM block: the only safe order, and what every answer of the kernel means.

    store PLACING -> UFFDIO_COPY -> store RECEIVED -> (the caller wakes)

A page is never marked MISSING again. A worker that finds a wrong mark stores PLACING just before it places the page
again: so no store undoes another worker's RECEIVED, and *present and MISSING* stays the proof of pollution. The page
cache of the kernel is the arbiter between workers: the second COPY of a page gives EEXIST, which means that another
worker has placed it.

All system calls go through ``Calls``, so the same code runs on the simulated kernel of the tests.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from postcopy_kernel import crashpoints
from postcopy_kernel.memory import exchange
from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE
from postcopy_protocol.messages import BlockGrant
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED, SHARED, TRUST

from .page_sources import PageSource
from .reports import Reporter

COPY_DONTWAKE = 1
MISSING_BYTE = bytes((MISSING,))
TIDY_AFTER = 1 << 20
"""After so many placed bytes the page-table entries of the worker's own mapping are dropped. They would count as the
worker's private memory (64 MiB after 64 MiB placed); the data stays in the block."""
BLOCK_SHIFT = 33
"""Locks of block N begin at N << BLOCK_SHIFT: more than the largest block has pages, and less than an off_t can say."""
PAGE_TABLES = 2560 << 10
"""Page tables of a worker, in bytes, above which it drops those of its source files, too: 2 MiB are those of 1 GiB.
They are kept as long as possible: without them every later page is a minor fault of the worker (1.7 x of C at
16,000 pages)."""

Ioctl = Callable[[int, int, bytearray], Any]  # ``fcntl.ioctl`` with a structure that the kernel may change
Lseek = Callable[[int, int, int], int]  # ``os.lseek``

Lockf = Callable[[int, int, int, int], object]  # ``fcntl.lockf``: descriptor, operation, length, start
Exchange = Callable[[int, bytes], bytes]  # ``memory.exchange``: writes to an address, returns what was there

Pread = Callable[[int, int, int], bytes]  # ``os.pread``
Pwrite = Callable[[int, bytes, int], int]  # ``os.pwrite``

Drop = Callable[[], object]  # drops the page-table entries of a mapping
PageTableSize = Callable[[], int]  # bytes of page tables that this process has


def _no_page_tables() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Calls:
    """The system calls of the fault path; a simulated kernel can take their place."""

    ioctl: Ioctl = fcntl.ioctl
    lseek: Lseek = os.lseek
    pread: Pread = os.pread
    pwrite: Pwrite = os.pwrite
    page_tables: PageTableSize = _no_page_tables
    lockf: Lockf = fcntl.lockf
    exchange: Exchange = exchange


def system_calls() -> Calls:
    """The system calls of a worker, with crash points between them where this process is to die at one of these."""
    if crashpoints.armed("worker.read", "worker.copied", "worker.marked", "worker.woken"):
        return Calls(ioctl=_CrashingIoctl())
    return Calls()


class _CrashingIoctl:
    """A wake counts only after a page was placed: every worker begins by waking every thread of its client."""

    def __init__(self) -> None:
        self._placed = False

    def __call__(self, fd: int, request: int, buffer: bytearray, /) -> Any:
        if request == UFFDIO_COPY:
            crashpoints.at("worker.read")
            answer = fcntl.ioctl(fd, request, buffer)
            crashpoints.at("worker.copied")
            self._placed = True
            return answer
        if request not in (UFFDIO_WAKE, UFFDIO_CONTINUE) or not self._placed:
            return fcntl.ioctl(fd, request, buffer)
        crashpoints.at("worker.marked")
        answer = fcntl.ioctl(fd, request, buffer)
        crashpoints.at("worker.woken")
        self._placed = False
        return answer


@dataclass(frozen=True, slots=True)
class OwnMapping:
    """The worker's own shared mapping of a block and the userfaultfd that it is registered with. It is never read or
    written: a touch of a missing page would wait for this very process."""

    userfaultfd: int
    address: int
    drop: Drop


class Structure:
    """A preset ioctl argument: ``buffer`` goes to the kernel, its ``fields`` (u64) are filled in place."""

    __slots__ = ("buffer", "fields")

    def __init__(self, fields: int, *preset: int) -> None:
        self.buffer = bytearray(8 * fields)
        self.fields = memoryview(self.buffer).cast("Q")
        for number, value in enumerate(preset):
            self.fields[number] = value

    def result(self, field: int) -> int:
        """The signed result field: bytes done, or a negative errno."""
        value = self.fields[field]
        return value - (1 << 64) if value >> 63 else value


class Block:
    """One RAM block as a worker places into it. Pages are numbered from 0; ``received`` has one byte for each."""

    guarded = False
    """May a user attach whom we do not trust? Then it is a ``GuardedBlock``."""
    believed: tuple[int, ...] = (PLACING, RECEIVED)
    """Marks that prove of a present page that a worker of ours placed it."""

    def __init__(
        self,
        grant: BlockGrant,
        memory: int,
        received: memoryview,
        pages: PageSource,
        own: OwnMapping,
        report: Reporter,
        calls: Calls,
        locks: int = -1,
    ) -> None:
        """``locks``: descriptor of a file that only workers have, and lock (see ``GuardedBlock``)."""
        self.grant = grant
        self.locks, self.lock_at = locks, grant.block << BLOCK_SHIFT
        self.memory = memory
        self.received = received
        self.shared_at, self.trust_at = grant.pages + SHARED, grant.pages + TRUST
        self.pages = pages
        self.own = own
        self.calls = calls
        self.shift = grant.page_size.bit_length() - 1
        self.huge = grant.page_size > 4096
        self._report = report
        self._copy = Structure(5)
        self._continue = Structure(4)
        self._untidy = 0
        self._page_tables = PAGE_TABLES
        self.placed_by_others = 0  # pages that another worker placed just before our COPY

    def report(self, kind: str, page: int, detail: str) -> None:
        """Report something about a page to the supervisor."""
        self._report(kind, self.grant.block, page << self.shift, detail)

    def present(self, page: int) -> bool:
        """Is the page in the block? Asks the kernel, about 1 us. On hugetlb SEEK_DATA finds data everywhere, so
        CONTINUE on our own registered mapping is used there: EFAULT means absent."""
        offset = page << self.shift
        if not self.huge:
            try:
                return self.calls.lseek(self.memory, offset, os.SEEK_DATA) == offset
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data up to the end
                    raise
                return False
        fields = self._continue.fields
        fields[0], fields[1], fields[2], fields[3] = self.own.address + offset, 1 << self.shift, COPY_DONTWAKE, 0
        try:
            self.calls.ioctl(self.own.userfaultfd, UFFDIO_CONTINUE, self._continue.buffer)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return False
            if error.errno != errno.EEXIST:
                raise
        return True

    def all_present(self, first: int, end: int) -> bool:
        """Are all pages from ``first`` to ``end`` in the block? One system call for any number of them; see present."""
        if self.huge:
            return all(self.present(page) for page in range(first, end))
        return self.calls.lseek(self.memory, first << self.shift, os.SEEK_HOLE) >= end << self.shift

    def fill_own(self, first: int, count: int) -> int:
        """Place pages through the worker's own mapping; see fill."""
        failed = self.fill(self.own.userfaultfd, self.own.address, first, count, COPY_DONTWAKE)
        self.tidy(count)
        return failed

    def tidy(self, count: int) -> None:
        """Count placed pages and, every TIDY_AFTER bytes, drop the page tables of our own mapping. Those of the file's
        mapping stay until they are too large."""
        self._untidy += count << self.shift
        if self._untidy >= TIDY_AFTER:
            self._untidy = 0
            self.own.drop()
            if self.calls.page_tables() > self._page_tables:
                self.pages.forget()
                # Before Linux 6.14 empty tables are kept: to drop them again and again would not make them smaller.
                self._page_tables = max(PAGE_TABLES, 2 * self.calls.page_tables())

    def fill(self, userfaultfd: int, base: int, first: int, count: int, mode: int) -> int:
        """Place ``count`` pages from page ``first`` by COPY to ``base`` + offset on ``userfaultfd``. Returns 0 when all
        are present and marked, else the errno that stopped it (the pages before are marked). Raises what the source
        raises: PageLost, SourceChanged, HandlerFailed, Elsewhere."""
        shift, received = self.shift, self.received
        while count:
            source = self.pages.locate(first << shift, count << shift)
            if count == 1:
                received[first] = PLACING
            else:
                received[first : first + count] = bytes((PLACING,)) * count
            failed, length = self.copy_range(userfaultfd, base + (first << shift), source, count << shift, mode)
            done = length >> shift
            if done:
                received[first : first + done] = bytes((RECEIVED,)) * done
                first, count = first + done, count - done
            if failed == errno.EEXIST:
                failed = self.accept_present(first)
                first, count = first + 1, count - 1
            if failed and not (failed == errno.EAGAIN and done):  # after a partial COPY the next one gives the reason
                return failed
        return 0

    def copy_range(self, userfaultfd: int, target: int, source: int, length: int, mode: int) -> tuple[int, int]:
        fields = self._copy.fields
        fields[0], fields[1], fields[2], fields[3], fields[4] = target, source, length, mode, 0
        try:
            self.calls.ioctl(userfaultfd, UFFDIO_COPY, self._copy.buffer)
        except OSError as error:
            return error.errno or errno.EIO, max(0, self._copy.result(4))
        return 0, length

    def accept_present(self, page: int) -> int:
        """Decide whose page this is: we believed it missing, and it is present (EEXIST).

        Nearly always another worker placed it between our look and our COPY. Its RECEIVED may have come before our
        PLACING, so we store it again. While no client may write to the block, a page that differs from its source was
        made by an unregistered mapping: it is repaired and reported. Where shared clients may write, a difference
        proves nothing, and their bytes must not be overwritten. A page still marked MISSING is foreign even so: it is
        reported and never marked received. Returns 0, or ENOSPC: on hugetlb an empty pool gives EEXIST too.
        """
        if self.huge and not self.present(page):
            return errno.ENOSPC
        self.placed_by_others += 1
        state = self.received[page]
        if state != RECEIVED:
            if not self.received[self.shared_at]:
                # A function that gives different bytes each time proves nothing against another worker's page, unless
                # that is zeros. A page still marked MISSING was placed by no worker.
                self._repair(page, zeros_only=self.grant.kind == "handler" and state != MISSING)
            elif state == MISSING:
                self.report("polluted", page, "an unregistered mapping made this page; shared clients write here")
                return 0
            self.received[page] = RECEIVED
        return 0

    def _repair(self, page: int, *, zeros_only: bool) -> None:
        if self.huge:
            return  # read and write do not work on every hugetlb memfd; a shared mapping would be needed
        offset, length = page << self.shift, 1 << self.shift
        self.pages.check()  # a file that has changed proves nothing
        found = self.calls.pread(self.memory, length, offset)
        if zeros_only and found.count(0) < length:
            return
        want = self.pages.content(offset, length)
        if found != want:
            self.calls.pwrite(self.memory, want, offset)
            self.report("polluted", page, "an unregistered mapping made this page; repaired from the source")

    def lose(self, page: int) -> bool:
        """Mark a page lost unless it is present: then False."""
        if self.present(page):
            return False
        self.received[page] = LOST
        return True

    def widen(self, userfaultfd: int, base: int, first: int, end: int, mode: int) -> int:
        """Fault-around: place what is missing of pages ``first`` to ``end``; returns how many were placed. Best
        effort: the fault of a page that was left out, or left PLACING, meets the same error and answers it."""
        others = self.placed_by_others
        self.pages.check()
        filled = self._fill_missing(userfaultfd, base, first, end, mode)
        if filled:
            self.pages.check()
        return filled - (self.placed_by_others - others)

    def _fill_missing(self, userfaultfd: int, base: int, first: int, end: int, mode: int) -> int:
        """Place every run of pages that are marked missing and are absent; stops at the first failure."""
        filled = 0
        states = bytes(self.received[first:end])
        at = states.find(MISSING_BYTE)
        while at >= 0:
            stop = len(states) - len(states[at:].lstrip(MISSING_BYTE))
            hole = self.first_strange(first + at, first + stop)
            if hole > first + at:
                failed = self.fill(userfaultfd, base, first + at, hole - first - at, mode)
                if failed == errno.ENOENT and userfaultfd != self.own.userfaultfd:
                    # The client has split a mapping inside the window (MADV_DONTDUMP is enough for that).
                    failed = self.fill_own(first + at, hole - first - at)
                if failed:
                    return filled
                filled += hole - first - at
            if hole < first + stop:
                return filled  # an unmarked page is present: the audit deals with it
            at = states.find(MISSING_BYTE, stop)
        return filled

    def first_strange(self, first: int, stop: int) -> int:
        """First page from ``first`` that is present though marked missing, at most ``stop``. It may be pollution, and
        the EEXIST of a COPY would look like another worker's page."""
        if self.huge:
            return stop
        try:
            data = self.calls.lseek(self.memory, first << self.shift, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return stop
        return min(stop, data >> self.shift)
