"""Recording of faults for ``serve --record``: a ring in shared memory that the supervisor empties.

The size of its client's figures tells the worker that it is to record. Only then its answers are wrapped; otherwise
nothing is added to a fault, not even a test. A record is written before its number is, so the reader never sees half of
one; a worker that dies in between has written nothing.

The latency of a remote fault is known when its page has come: the main thread notes the begin, the waker writes the
record.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
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

from .client_ufd import FAULT_MINOR, FAULT_WRITE, Region
from .fast_answers import Answer
from .page_sources import RemotePages

MAX_PENDING = 4096


class Recording:
    """The ring of one client, and its remote faults that are not answered yet."""

    def __init__(self, figures: memoryview, client: int) -> None:
        self._counters = figures[:PAGE_BYTES].cast("Q")
        self._head = figures[RING_HEAD:RING_AT].cast("Q")
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
        head = self._head
        with self._lock:
            written = head[RING_WRITTEN]
            if written - head[RING_TAKEN] >= RING_RECORDS:
                head[RING_LOST] += 1
                return
            start = written % RING_RECORDS * RECORD.size
            self._records[start : start + RECORD.size] = trace.pack(at, self._client, block, page, kind, latency)
            head[RING_WRITTEN] = written + 1

    def recorded(self, answer: Answer, regions: Sequence[Region]) -> Answer:
        """``answer`` with a record of every fault; remote faults are recorded when they are ``answered``."""
        counters = self._counters

        def recorded(flags: int, address: int) -> None:
            region = next((region for region in regions if region.start <= address < region.end), None)
            if region is None:
                return answer(flags, address)
            page = address - region.base >> region.block.shift
            missing = region.block.received[page] in (MISSING, PLACING)
            failures, begun = counters[FAILURES], monotonic_ns()
            if missing and isinstance(region.block.pages, RemotePages):
                if len(self._pending) < MAX_PENDING:
                    self._pending.setdefault((region.block.grant.block, page), (begun, flags))
                return answer(flags, address)
            answer(flags, address)
            taken = monotonic_ns() - begun
            kind = trace.PLACED if missing else trace.PRESENT
            state = region.block.received[page]
            if state == LOST or (state != RECEIVED and counters[FAILURES] != failures):
                kind = trace.LOST  # the second: for this client only, because its handler function failed
            self.put(begun, region.block.grant.block, page, kind | _flags(flags), taken)

        return recorded

    def answered(self, block: int, page: int, *, lost: bool) -> None:
        """Record the fault that waited for this page, if one did."""
        begun, flags = self._pending.pop((block, page), (0, 0))
        if begun:
            kind = trace.LOST if lost else trace.ARRIVED
            self.put(begun, block, page, kind | _flags(flags), monotonic_ns() - begun)


def _flags(flags: int) -> int:
    return (trace.WRITE if flags & FAULT_WRITE else 0) | (trace.ANNOUNCED if flags & FAULT_MINOR else 0)
