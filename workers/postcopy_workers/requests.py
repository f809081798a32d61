"""Requests for pages of remote blocks: one for each page however many threads wait.

Pages that one read reports are requested in one message for each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from time import perf_counter_ns

from postcopy_protocol.codec import decode, encode, pack_offsets, unpack_offsets
from postcopy_protocol.counters import DEDUPLICATED, REQUESTS, bucket
from postcopy_protocol.messages import RequestPages
from postcopy_protocol.stages import ASKED, WOKEN, scratch
from postcopy_protocol.templates import OFFSET_BYTES

SAMPLE_MASK = 3
"""Of the requests for a single page the sending of one in four is timed, the first among them, and counts for four."""

Send = Callable[[bytes], None]
"""Sends a message to the supervisor, or drops it where there is none; never waits. It is ``Channel.send``."""
WakeOne = Callable[[int], None]
"""Wakes the threads that wait for the page at this byte offset of one block; usually ``PageWaker._wake_one.wake``."""


class Requests:
    """Pages that were requested and not yet answered. The main thread calls ``ask``, the waker ``answered``. They share
    a dict whose single operations are atomic. A page is removed before its threads are woken, so a fault after the wake
    is requested again."""

    def __init__(
        self, worker: int, counters: memoryview, send: Send, stages: Mapping[int, memoryview] | None = None
    ) -> None:
        self._worker = worker
        self._counters = counters
        self._send = send
        self._stages = stages if stages is not None else defaultdict(scratch)
        self._asked: dict[tuple[int, int], int] = {}
        self._batch: dict[int, list[int]] | None = None
        self._templates: dict[int, bytes] = {}

    def ask(self, block: int, offset: int) -> None:
        """Request the page at ``offset`` by a RequestPages, unless it is requested already. ``_send`` is
        ``Channel.send``, usually ``NativeChannel.send``."""
        key = (block, offset)
        if key in self._asked:
            self._counters[DEDUPLICATED] += 1
            return
        self._asked[key] = begun = perf_counter_ns()
        self._counters[REQUESTS] = count = self._counters[REQUESTS] + 1
        if self._batch is None:
            template = self._templates.get(block) or self._template(block)
            self._send(template + offset.to_bytes(OFFSET_BYTES, "little"))
            if count & SAMPLE_MASK == 1:
                self._stages[block][bucket(perf_counter_ns() - begun) + ASKED] += SAMPLE_MASK + 1
        else:
            self._batch.setdefault(block, []).append(offset)

    def _template(self, block: int) -> bytes:
        """A request for one page without its offset, which is at the end: a client waits while it is encoded."""
        whole = encode(RequestPages(self._worker, block, pack_offsets([0])))
        self._templates[block] = whole[:-OFFSET_BYTES]
        return self._templates[block]

    def hold(self) -> None:
        """Collect the requests that follow, until ``flush``."""
        self._batch = {}

    def flush(self) -> None:
        """Send what was collected, one message for each block."""
        batch, self._batch = self._batch, None
        for block, offsets in (batch or {}).items():
            self._send(encode(RequestPages(self._worker, block, pack_offsets(offsets))))
            now = perf_counter_ns()
            for offset in offsets:
                self._stages[block][bucket(now - self._asked.get((block, offset), now)) + ASKED] += 1

    def answered(self, block: int, offsets: tuple[int, ...]) -> None:
        """Remove pages that the supervisor has answered; their latencies go into the histograms."""
        now = perf_counter_ns()
        for offset in offsets:
            begun = self._asked.pop((block, offset), None)
            if begun is not None:
                index = bucket(now - begun)
                self._counters[index] += 1
                self._stages[block][index + WOKEN] += 1

    def fast_path(self, block: int, wake: WakeOne) -> WakeOne:
        """``answered`` of one page, then ``wake``, which is ``PageWaker._wake_one.wake``: a closure over what never
        changes."""
        asked, counters, stages, clock = self._asked, self._counters, self._stages[block], perf_counter_ns

        def placed(offset: int) -> None:
            begun = asked.pop((block, offset), 0)
            if begun:
                index = bucket(clock() - begun)
                counters[index] += 1
                stages[index + WOKEN] += 1
            wake(offset)

        return placed

    def refuse(self, refuse: Callable[[int, tuple[int, ...]], None]) -> None:
        """There is no supervisor any more. From now on the main thread calls ``refuse`` with block and offsets where it
        would have sent a request. What was requested is forgotten: wake its threads."""

        def send(data: bytes) -> None:
            message = decode(data, expect=(RequestPages,))
            offsets = unpack_offsets(message.offsets)
            for offset in offsets:
                self._asked.pop((message.block, offset), None)
            refuse(message.block, offsets)

        self._send = send
        self.forget()

    def forget(self) -> None:
        """Remove all: the threads that wait are about to be woken, and their faults are requested again."""
        self._asked.clear()
