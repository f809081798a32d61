"""Worker zero: it places ranges of local blocks for the supervisor.

The supervisor is client zero: its own system calls fault on its own mapping. It must not map a user's file, nor run a
user's handler function. So it requests ranges from this worker, over the router (Fetch), and wakes its own waiters when
the answer comes (Fetched). One thread is enough: there is no userfaultfd of a client to read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable
from typing import NoReturn

from postcopy_protocol import counters
from postcopy_protocol.codec import decode, encode, pack_offsets
from postcopy_protocol.errors import BadMessage, PageLost
from postcopy_protocol.messages import Assignment, Fetch, Fetched
from postcopy_protocol.received_map import LOST, RECEIVED

from .page_sources import HandlerFailed, SourceChanged
from .placing import COPY_DONTWAKE, Block
from .repeats import Pause
from .worker import Worker

PIECE = 1 << 20
STARVED_SECONDS = 5.0  # a page waits so long for memory; then it counts as not available, but not as lost
SHORTAGES = (errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)

Clock = Callable[[], float]  # seconds that only grow


class RangePlacer:
    """Makes ranges of local blocks present. Pure but for the block's system calls."""

    def __init__(
        self,
        blocks: dict[int, Block],
        counters: memoryview,
        control: memoryview,
        clock: Clock = time.monotonic,
        pause: Pause = time.sleep,
    ) -> None:
        self._blocks = blocks
        self._counters, self._control = counters, control
        self._clock = clock
        self._pause = pause
        self._deadline = 0.0

    def fetch(self, order: Fetch) -> Fetched:
        """Place what is missing in the range, page by page only where a larger piece fails. The answer lists the pages
        that could not be placed."""
        block = self._blocks[order.block]
        shift = block.shift
        first, end = order.offset >> shift, min(block.grant.pages, -(-(order.offset + order.length) >> shift))
        lost: list[int] = []
        step = max(1, PIECE >> shift)
        for start in range(first, end, step):
            lost += self._piece(block, start, min(end, start + step))
        return Fetched(order.block, order.offset, order.length, pack_offsets([page << shift for page in lost]))

    def _piece(self, block: Block, first: int, end: int) -> list[int]:
        self._counters[counters.BUSY_SINCE_NS] = time.monotonic_ns()
        self._deadline = (
            self._clock() + STARVED_SECONDS
        )  # for all of its pages: the watchdog kills a worker that is busy for long
        while self._held(block) and self._clock() <= self._deadline:
            self._pause(0.01)
        if end - first > 1 and not self._held(block):
            try:
                placed = block.widen(block.own.userfaultfd, block.own.address, first, end, COPY_DONTWAKE)
                block.tidy(placed)
                self._counters[counters.PLACED] += placed
            except (PageLost, SourceChanged, HandlerFailed):
                pass  # page by page below, each with its own error
        states = bytes(block.received[first:end])
        lost = []
        if states != bytes((RECEIVED,)) * len(states) or not block.all_present(first, end):
            lost = [page for page in range(first, end) if not self._page(block, page)]
        self._counters[counters.BUSY_SINCE_NS] = 0
        return lost

    def _held(self, block: Block) -> bool:
        """Has the cgroup that pays for pages no memory left?"""
        return not block.huge and time.monotonic_ns() < self._control[counters.HELD_UNTIL_NS]

    def _page(self, block: Block, page: int) -> bool:
        """Make one page present; False when that fails."""
        state = block.received[page]
        if state in (RECEIVED, LOST):
            present = block.present(page)
            if present == (state == RECEIVED):
                return present
        if self._held(block):
            block.report("no-memory", page, f"none is left in the cgroup for {STARVED_SECONDS:g} s")
            return False
        try:
            block.pages.check()
            while failed := block.fill_own(page, 1):
                if failed not in SHORTAGES:
                    block.pages.check()  # a cut file raises SourceChanged
                    raise PageLost(f"cannot be placed: {errno.errorcode.get(failed, failed)}")
                if self._clock() > self._deadline:
                    # Not present, but not lost either: a later request may find memory.
                    block.report("no-memory", page, f"{errno.errorcode[failed]} for {STARVED_SECONDS:g} s")
                    return False
                self._pause(0.01)
        except (PageLost, SourceChanged, HandlerFailed) as reason:
            if block.present(page) and block.received[page] in block.believed:
                block.received[page] = RECEIVED  # a client's worker was faster
                return True
            if not isinstance(reason, HandlerFailed) and block.lose(page):
                self._counters[counters.LOST] += 1
            block.report("source-changed" if isinstance(reason, SourceChanged) else "lost", page, str(reason))
            return False
        self._counters[counters.PLACED] += 1
        return True


def serve_worker_zero(assignment: Assignment, fds: list[int], *, privileged: bool) -> NoReturn:
    """Place ranges until the quit eventfd is readable; never returns."""
    worker = Worker(assignment, fds, privileged=privileged)
    placer = RangePlacer(worker.blocks, worker.counters, worker.control)
    channel = worker.channel()
    quit_fd, wakeup = fds[assignment.quit_eventfd], worker.reports.wakeup
    while True:
        pause = worker.send_waiting(channel)
        waiting = select.poll()
        waiting.register(quit_fd, select.POLLIN)
        waiting.register(wakeup, select.POLLIN)
        if channel.fileno() >= 0 or channel.connect():
            waiting.register(channel, select.POLLIN)
        else:
            pause = channel.retry_in
        ready = [fd for fd, _ in waiting.poll(pause * 1000)]
        if quit_fd in ready:
            os._exit(0)
        if wakeup in ready:
            os.eventfd_read(wakeup)
        if channel.fileno() in ready:
            for data in channel.receive_now():
                with contextlib.suppress(BadMessage):
                    channel.send(encode(placer.fetch(decode(data, expect=(Fetch,)))))
