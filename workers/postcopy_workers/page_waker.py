"""Waking the client's threads when the supervisor has placed, or lost, pages of remote blocks.

All of it runs on the waker thread, with a ``ClientUserfaultfd`` of its own. It shares with the main thread only the
regions, the received map, the counters and ``Requests``.
"""

from __future__ import annotations

from collections.abc import Sequence

from postcopy_kernel import crashpoints
from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE
from postcopy_protocol.codec import pack_offsets, unpack_offsets
from postcopy_protocol.counters import LOST as LOST_PAGES
from postcopy_protocol.counters import WAKES
from postcopy_protocol.messages import Lost, Wake
from postcopy_protocol.received_map import LOST, RECEIVED
from postcopy_protocol.templates import OFFSET_BYTES, template_of

from .client_ufd import ClientUserfaultfd, Region, unpoison_denied
from .page_sources import RemotePages
from .placing import Calls, Structure
from .recording import Recording
from .requests import Requests, WakeOne


class PageWaker:
    """What a worker does with the messages Wake and Lost that ``WakerThread`` receives. ``requests`` belongs to the
    main thread. ``own_requests`` asks for denied pages, from the waker thread."""

    def __init__(
        self,
        regions: Sequence[Region],
        userfaultfd: ClientUserfaultfd,
        counters: memoryview,
        calls: Calls,
        requests: Requests,
        own_requests: Requests,
        recording: Recording | None = None,
    ) -> None:
        self._regions = regions
        self._userfaultfd = userfaultfd
        self._counters = counters
        self._ioctl = calls.ioctl
        self._requests = requests
        self._own_requests = own_requests
        self._recording = recording
        self.fast_paths = {
            template_of(Wake(block, pack_offsets([0])), OFFSET_BYTES): self._fast_path(block)
            for block in {region.block.grant.block for region in regions}
        }
        """For a Wake of one page, by all of its bytes but the last OFFSET_BYTES: what to call with the offset. It is
        ``Requests.fast_path.placed``, which calls ``_wake_one.wake``."""

    def receive(self, message: Wake | Lost) -> None:
        """Act on a message that has no fast path. Raises ClientGone."""
        if not message.block:
            return self._resynchronise()
        offsets = unpack_offsets(message.offsets)
        self._requests.answered(message.block, offsets)
        crashpoints.before("worker.told", self._resume)(message.block, offsets, lost=isinstance(message, Lost))

    def _resynchronise(self) -> None:
        """An empty Wake: the supervisor has read this worker's hello. Its answers to earlier requests may be lost, so
        every thread faults again; and only now can denied pages be requested."""
        self._requests.forget()
        self._userfaultfd.wake_all(self._regions)
        self._own_requests.forget()
        unpoison_denied(self._counters, self._regions, self._unpoison)

    def _unpoison(self, region: Region, page: int) -> bool:
        block = region.block
        if not isinstance(block.pages, RemotePages) or block.received[page] == LOST:
            return False
        if block.received[page] != RECEIVED:
            self._own_requests.ask(block.grant.block, page << block.shift)  # the Wake for it unpoisons the page
            return False
        return self._userfaultfd.unpoison(region, page)

    def _resume(self, number: int, offsets: Sequence[int], *, lost: bool) -> None:
        """Let the threads run that wait for these pages; ``lost``: they get SIGBUS."""
        for region in self._regions:
            block = region.block
            if block.grant.block != number:
                continue
            for offset in offsets:
                page = offset >> block.shift
                if not region.first_page <= page < region.end_page:
                    continue
                if lost:
                    self._counters[LOST_PAGES] += 1
                    self._userfaultfd.poison(region, page)
                elif self._userfaultfd.map(region, page):
                    self._userfaultfd.resume(region, page, 0)
                else:
                    self._counters[WAKES] += 1
                if self._recording is not None:
                    self._recording.answered(number, page, lost=lost)

    def _fast_path(self, block: int) -> WakeOne:
        return self._requests.fast_path(block, crashpoints.before("worker.told", self._wake_one(block)))

    def _wake_one(self, number: int) -> WakeOne:
        """``_resume`` for one placed page: a closure over what never changes."""
        regions = [region for region in self._regions if region.block.grant.block == number]
        resume = self._resume
        if len(regions) != 1 or regions[0].own or self._recording is not None:
            return lambda offset: resume(number, (offset,), lost=False)
        region, counters = regions[0], self._counters
        base, shift, first, end = region.base, region.block.shift, region.first_page, region.end_page
        userfaultfd, ioctl = self._userfaultfd.descriptor, self._ioctl
        structure = Structure(4, 0, 1 << shift)
        fields, buffer = structure.fields, structure.buffer

        def wake(offset: int) -> None:
            if not first <= offset >> shift < end:
                return
            fields[0] = base + offset
            try:
                ioctl(userfaultfd, UFFDIO_CONTINUE, buffer)
            except OSError:  # mapped already, an unread event, or the client is gone
                return resume(number, (offset,), lost=False)
            counters[WAKES] += 1

        return wake
