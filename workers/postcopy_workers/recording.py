"""Recording of faults, where ``serve --record`` asks for it: a ring in shared memory that the supervisor empties.

The worker sees that it is to record from the size of its client's figures. Then its answers are wrapped; else nothing
is in the way of a fault, not even a question. A record is written before its number is, so that the reader never sees
half of one; a worker that dies in between has written nothing.

What a remote fault took is known when the page has come: the main thread notes when it began, the waker writes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from time import monotonic_ns

from postcopy_protocol import trace
from postcopy_protocol.counters import FAILURES, PAGE_BYTES
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED
from postcopy_protocol.trace import (
    FIGURES_BYTES,
    RECORD,
    RING_AT,
    RING_HEAD,
    RING_LOST,
    RING_RECORDS,
    RING_TAKEN,
    RING_WRITTEN,
)

from .fault_handler import FAULT_MINOR, FAULT_WRITE, FaultHandler, Region
from .page_sources import RemotePages

MOST_PENDING = 4096


class Recording:
    """The ring of one client, and what of it is waited for."""

    def __init__(self, figures: memoryview, client: int) -> None:
        self._counted = figures[:PAGE_BYTES].cast("Q")
        self._words = figures[RING_HEAD:RING_AT].cast("Q")
        self._records = figures[RING_AT:]
        self._client = client
        self._lock = threading.Lock()  # main thread and waker write
        self._pending: dict[tuple[int, int], tuple[int, int]] = {}

    @classmethod
    def of(cls, fd: int, client: int) -> Recording | None:
        """The ring behind the figures ``fd``; None where faults are not recorded."""
        if os.fstat(fd).st_size < FIGURES_BYTES:
            return None
        return cls(memoryview(mmap.mmap(fd, FIGURES_BYTES)), client)

    def put(self, at: int, block: int, page: int, kind: int, latency: int) -> None:
        """Write a record, or count it as lost when the ring is full."""
        words = self._words
        with self._lock:
            written = words[RING_WRITTEN]
            if written - words[RING_TAKEN] >= RING_RECORDS:
                words[RING_LOST] += 1
                return
            place = written % RING_RECORDS * RECORD.size
            self._records[place : place + RECORD.size] = trace.pack(at, self._client, block, page, kind, latency)
            words[RING_WRITTEN] = written + 1

    def wrap(self, handler: FaultHandler) -> None:
        """From now on what this handler answers is recorded."""
        answer, regions, counted = handler.answer, handler.regions, self._counted

        def recorded(flags: int, address: int) -> None:
            region = next((region for region in regions if region.start <= address < region.end), None)
            if region is None:
                return answer(flags, address)
            page = address - region.base >> region.block.shift
            missing = region.block.received[page] in (MISSING, PLACING)
            failures, begun = counted[FAILURES], monotonic_ns()
            if missing and isinstance(region.block.pages, RemotePages):
                self._asked(region, page, begun, flags)
                return answer(flags, address)
            answer(flags, address)
            taken = monotonic_ns() - begun
            kind = trace.PLACED if missing else trace.PRESENT
            state = region.block.received[page]
            if state == LOST or (state != RECEIVED and counted[FAILURES] != failures):
                kind = trace.LOST  # the second: to this client alone, because its function failed
            self.put(begun, region.block.grant.block, page, kind | _flags(flags), taken)

        handler.answer = recorded

    def wrap_wakes(self, handler: FaultHandler) -> None:
        """The waker's handler: what it wakes was waited for. It has two ways: many pages, or one without a detour."""
        woken, waking = handler.woken, handler.waking
        shifts = {region.block.grant.block: region.block.shift for region in handler.regions}

        def recorded(number: int, offsets: Sequence[int], *, lost: bool) -> None:
            woken(number, offsets, lost=lost)
            for offset in offsets:
                self._came(number, offset >> shifts.get(number, 12), lost)

        def lane(number: int) -> Callable[[int], None]:
            wake, shift = waking(number), shifts.get(number, 12)

            def one(offset: int) -> None:
                wake(offset)
                self._came(number, offset >> shift, False)

            return one

        handler.woken, handler.waking = recorded, lane  # type: ignore[method-assign]

    def _came(self, block: int, page: int, lost: bool) -> None:
        begun, flags = self._pending.pop((block, page), (0, 0))
        if begun:
            self.put(
                begun, block, page, (trace.LOST if lost else trace.ARRIVED) | _flags(flags), monotonic_ns() - begun
            )

    def _asked(self, region: Region, page: int, begun: int, flags: int) -> None:
        if len(self._pending) < MOST_PENDING:
            self._pending.setdefault((region.block.grant.block, page), (begun, flags))


def _flags(flags: int) -> int:
    return (trace.WRITE if flags & FAULT_WRITE else 0) | (trace.ANNOUNCED if flags & FAULT_MINOR else 0)
