"""Placing pages in a block that untrusted users may attach.

Such a user has a read-only descriptor of the block. It can map it once more, unregistered, and touch a hole at any
moment: that makes a zero page for everybody. So no client may reach a page that we have not checked:

* every client is registered MISSING|MINOR: a present page that it has not mapped is a message too;
* a page is mapped for a client only by CONTINUE, after it was marked RECEIVED. Nothing is placed through a client's own
  userfaultfd, because COPY there shows the page at once;
* so no client has read or written a page that is not RECEIVED. Whatever is found there is replaced by the source's
  bytes, also where clients may write to the block.

The last rule needs a worker that looks, and places, while no other does. A byte of the received map cannot be compared
and changed in one step, so a record lock is held (on the control page, which no client has). The kernel drops it when a
worker dies. A worker holds one lock at a time, and only for system calls: a user's function has run before.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from postcopy_protocol.received_map import PLACING, RECEIVED

from .placing import COPY_DONTWAKE, Block


class GuardedBlock(Block):
    """A block whose pages one worker at a time looks at and places."""

    guarded = True
    believed = (RECEIVED,)

    @contextmanager
    def _turn(self, first: int, count: int) -> Iterator[None]:
        """No other worker places these pages meanwhile, or loses them."""
        start = self.lock_at + first
        self.calls.lockf(self.locks, fcntl.LOCK_EX, count, start)
        try:
            yield
        finally:
            self.calls.lockf(self.locks, fcntl.LOCK_UN, count, start)

    def fill(self, userfaultfd: int, base: int, first: int, count: int, mode: int) -> int:
        """As ``Block.fill``, always through the worker's own mapping."""
        source = self.pages.locate(first << self.shift, count << self.shift) - (first << self.shift)
        with self._turn(first, count):
            return self._fill(first, first + count, source)

    def _fill(self, first: int, end: int, source: int) -> int:
        received, shift = self.received, self.shift
        while first < end:
            if received[first] == RECEIVED and self.present(first):
                self.placed_by_others += 1
                first += 1
                continue
            stop = first + 1
            while stop < end and received[stop] != RECEIVED:
                stop += 1
            received[first:stop] = bytes((PLACING,)) * (stop - first)
            offset, length = first << shift, stop - first << shift
            failed, placed = self.copy_range(
                self.own.userfaultfd, self.own.address + offset, source + offset, length, COPY_DONTWAKE
            )
            done = first + (placed >> shift)
            received[first:done] = bytes((RECEIVED,)) * (done - first)
            first = done
            if failed == errno.EEXIST:
                failed = self._replace(first)
                first += 1
            if failed and not (failed == errno.EAGAIN and placed):
                return failed
        return 0

    def _replace(self, page: int) -> int:
        """Replace a present page that is not RECEIVED. A killed worker placed it, and its bytes are right; or a
        foreign user made it, which is reported. Returns 0, or ENOSPC: an empty pool of huge pages gives EEXIST too."""
        offset, length = page << self.shift, 1 << self.shift
        if self.huge and not self.present(page):
            return errno.ENOSPC
        want = self.pages.content(offset, length)
        if self.huge:  # no write(2) there; ``present`` has mapped it
            found = self.calls.exchange(self.own.address + offset, want)
        else:
            found = self.calls.pread(self.memory, length, offset)
            if found != want:
                self.calls.pwrite(self.memory, want, offset)
        self.received[page] = RECEIVED
        if found != want and found.count(0) == length:
            self.report("polluted", page, "an unregistered mapping made this page; repaired from the source")
        return 0

    def lose(self, page: int) -> bool:
        with self._turn(page, 1):
            return super().lose(page)

    def first_strange(self, first: int, stop: int) -> int:
        """None: ``fill`` replaces them."""
        return stop
