"""Placing pages in a RAM block: the one order in which it is safe, and what every answer of the kernel means.

    store PLACING -> UFFDIO_COPY -> store RECEIVED -> (the caller wakes)

A page is never marked MISSING again: whoever finds a mark untrue stores PLACING just before placing the page anew, so
that no store can undo another worker's RECEIVED, and *present and MISSING* stays the proof of pollution. The kernel's
page cache is the arbiter between workers: the second COPY of a page says EEXIST, which is success by somebody else.

Nothing here talks to the kernel but through ``Calls``, so the same code runs on the simulated kernel of the tests.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY
from postcopy_protocol.messages import BlockGrant
from postcopy_protocol.received_map import MISSING, PLACING, RECEIVED, SHARED, TRUST

from .page_sources import PageSource

COPY_DONTWAKE = 1
MISSING_BYTE = bytes((MISSING,))
DROP_AFTER = 4 << 20
"""Bytes placed through the worker's own mapping before its page-table entries are dropped: they would count as the
worker's private memory, at 64 MiB placed for 64 MiB of it; the data stays in the block."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The system calls of the fault path, by name, so that a simulated kernel can stand in for them."""

    ioctl: Callable[..., Any] = fcntl.ioctl
    lseek: Callable[[int, int, int], int] = os.lseek
    pread: Callable[[int, int, int], bytes] = os.pread
    pwrite: Callable[[int, bytes, int], int] = os.pwrite


@dataclass(frozen=True, slots=True)
class OwnMapping:
    """The worker's own shared mapping of a block and the userfaultfd it is registered with; never read or written,
    since a touch of a missing page would wait for the one process that could bring it."""

    userfaultfd: int
    address: int
    drop: Callable[[], None]


class Structure:
    """A preset ioctl argument: ``buffer`` goes to the kernel, ``words`` (u64) are filled in place."""

    __slots__ = ("buffer", "words")

    def __init__(self, words: int, *preset: int) -> None:
        self.buffer = bytearray(8 * words)
        self.words = memoryview(self.buffer).cast("Q")
        for place, value in enumerate(preset):
            self.words[place] = value

    def result(self, word: int) -> int:
        """The signed result field: bytes done, or a negative errno."""
        value = self.words[word]
        return value - (1 << 64) if value >> 63 else value


class Block:
    """One RAM block as a worker places into it. Pages are numbered from 0; ``received`` has one byte for each."""

    def __init__(
        self,
        grant: BlockGrant,
        memory: int,
        received: memoryview,
        pages: PageSource,
        own: OwnMapping,
        report: Callable[[str, int, int, str], None],
        calls: Calls,
    ) -> None:
        self.grant = grant
        self.memory = memory
        self.received = received
        self.shared_at, self.trust_at = grant.pages + SHARED, grant.pages + TRUST
        self.pages = pages
        self.own = own
        self.calls = calls
        self.shift = grant.page_size.bit_length() - 1
        self._huge = grant.page_size > 4096
        self._report = report
        self._copy = Structure(5)
        self._continue = Structure(4)
        self._undropped = 0
        self.settled = 0
        """Pages that somebody else placed while we were about to."""

    def report(self, kind: str, page: int, detail: str) -> None:
        self._report(kind, self.grant.block, page << self.shift, detail)

    def present(self, page: int) -> bool:
        """Is the page in the block? Asked of the kernel, about 1 us. hugetlb claims data everywhere (SEEK_DATA), so
        there CONTINUE on our own registered mapping is asked: EFAULT means absent."""
        offset = page << self.shift
        if not self._huge:
            try:
                return self.calls.lseek(self.memory, offset, os.SEEK_DATA) == offset
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data up to the end
                    raise
                return False
        words = self._continue.words
        words[0], words[1], words[2], words[3] = self.own.address + offset, 1 << self.shift, COPY_DONTWAKE, 0
        try:
            self.calls.ioctl(self.own.userfaultfd, UFFDIO_CONTINUE, self._continue.buffer)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return False
            if error.errno != errno.EEXIST:
                raise
        return True

    def all_present(self, first: int, end: int) -> bool:
        """Are all pages from ``first`` to ``end`` in the block? One call for any number of them; see present."""
        if self._huge:
            return all(self.present(page) for page in range(first, end))
        return self.calls.lseek(self.memory, first << self.shift, os.SEEK_HOLE) >= end << self.shift

    def fill_own(self, first: int, count: int) -> int:
        """Place pages through the worker's own mapping; see fill."""
        failed = self.fill(self.own.userfaultfd, self.own.address, first, count, COPY_DONTWAKE)
        self.tidy(count)
        return failed

    def tidy(self, count: int) -> None:
        """Count pages placed and drop, now and then, the page tables of our own mapping and of the file's: what is
        mapped nowhere else counts as this worker's private memory."""
        self._undropped += count << self.shift
        if self._undropped >= DROP_AFTER:
            self._undropped = 0
            self.own.drop()
            self.pages.forget()

    def fill(self, userfaultfd: int, base: int, first: int, count: int, mode: int) -> int:
        """Place ``count`` pages from page ``first`` by COPY to ``base`` + offset on ``userfaultfd``.

        Returns 0 when all are present and marked, else the errno that stopped it (pages before it are marked).
        Raises what the source raises: PageLost, SourceChanged, HandlerFailed.
        """
        shift, received = self.shift, self.received
        while count:
            source = self.pages.locate(first << shift, count << shift)
            if count == 1:
                received[first] = PLACING
            else:
                received[first : first + count] = bytes((PLACING,)) * count
            failed, length = self._copy_range(userfaultfd, base + (first << shift), source, count << shift, mode)
            done = length >> shift
            if done:
                received[first : first + done] = bytes((RECEIVED,)) * done
                first, count = first + done, count - done
            if failed == errno.EEXIST:
                failed = self.settle(first)
                first, count = first + 1, count - 1
            if failed and not (failed == errno.EAGAIN and done):  # after a part, the next try tells the reason
                return failed
        return 0

    def _copy_range(self, userfaultfd: int, target: int, source: int, length: int, mode: int) -> tuple[int, int]:
        words = self._copy.words
        words[0], words[1], words[2], words[3], words[4] = target, source, length, mode, 0
        try:
            self.calls.ioctl(userfaultfd, UFFDIO_COPY, self._copy.buffer)
        except OSError as error:
            return error.errno or errno.EIO, max(0, self._copy.result(4))
        return 0, length

    def settle(self, page: int) -> int:
        """A page that we believed missing is present (EEXIST): whose is it?

        Another worker's, nearly always, placed between our look and our COPY; its mark may have come before our
        PLACING, so we give it again. While no client may write the block, a page that differs from its source was made
        by an unregistered mapping: it is repaired and reported. Where shared clients may write, a difference proves
        nothing, and their bytes are not ours to overwrite; a page still marked MISSING is a stranger's all the same:
        reported, and never promoted. Returns 0, or ENOSPC: on hugetlb an empty pool says EEXIST
        too.
        """
        if self._huge and not self.present(page):
            return errno.ENOSPC
        self.settled += 1
        state = self.received[page]
        if state != RECEIVED:
            if not self.received[self.shared_at]:
                # A function that does not repeat itself proves nothing against another worker's page, unless that is
                # zeros; a page that is still marked MISSING is nobody's of ours.
                self._repair(page, zeros_only=self.grant.kind == "handler" and state != MISSING)
            elif state == MISSING:
                self.report(
                    "polluted", page, "somebody's unregistered mapping made this page; shared clients write here"
                )
                return 0
            self.received[page] = RECEIVED
        return 0

    def _repair(self, page: int, *, zeros_only: bool) -> None:
        if self._huge:
            return  # read and write do not work on every hugetlb memfd; a shared mapping would be needed
        offset, length = page << self.shift, 1 << self.shift
        self.pages.check()  # a file that has changed proves nothing
        found = self.calls.pread(self.memory, length, offset)
        if zeros_only and found.count(0) < length:
            return
        want = self.pages.content(offset, length)
        if found != want:
            self.calls.pwrite(self.memory, want, offset)
            self.report("polluted", page, "somebody's unregistered mapping made this page; repaired from the source")

    def widen(self, userfaultfd: int, base: int, first: int, end: int, mode: int) -> int:
        """Fault-around: place what is missing of pages ``first`` to ``end``; returns how many. Best effort: whatever
        stops it is met again, and answered, by the fault of the page concerned. Pages of ours that a part of a window
        left PLACING are placed by their own fault too."""
        others = self.settled
        self.pages.check()
        filled = self._fill_missing(userfaultfd, base, first, end, mode)
        if filled:
            self.pages.check()
        return filled - (self.settled - others)

    def _fill_missing(self, userfaultfd: int, base: int, first: int, end: int, mode: int) -> int:
        """Fill every run of pages that is marked missing and is absent; stops at the first that does not go."""
        filled = 0
        states = bytes(self.received[first:end])
        at = states.find(MISSING_BYTE)
        while at >= 0:
            stop = len(states) - len(states[at:].lstrip(MISSING_BYTE))
            hole = self._hole(first + at, first + stop)
            if hole > first + at:
                failed = self.fill(userfaultfd, base, first + at, hole - first - at, mode)
                if failed == errno.ENOENT and userfaultfd != self.own.userfaultfd:
                    # The window spans a mapping that the client has split (an innocent MADV_DONTDUMP does it).
                    failed = self.fill_own(first + at, hole - first - at)
                if failed:
                    return filled
                filled += hole - first - at
            if hole < first + stop:
                return filled  # a page that nobody marked is in the way: the audit's business
            at = states.find(MISSING_BYTE, stop)
        return filled

    def _hole(self, first: int, stop: int) -> int:
        """First page from ``first`` that is present though marked missing, at most ``stop``: it may be pollution,
        which a COPY over it could not tell from another worker's page."""
        if self._huge:
            return stop
        try:
            data = self.calls.lseek(self.memory, first << self.shift, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return stop
        return min(stop, data >> self.shift)
