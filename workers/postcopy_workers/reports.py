"""Reports of a worker to the supervisor: what an operator should know, and no counter can say."""

from __future__ import annotations

import collections
from collections.abc import Callable

from postcopy_kernel import descriptors
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Report

MAX_REPORTS_OF_A_KIND = 16
"""Further reports of a kind are sent each time their number has doubled: a hostile client may provoke any number."""

Reporter = Callable[[str, int, int, str], None]
"""Takes a report: its kind, the block's number and the byte offset (-1 where there is none), and a text."""


class Reports:
    """Queue of reports: the main thread adds them, the monitor thread sends them."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._queue: collections.deque[bytes] = collections.deque(maxlen=256)
        self._counts: collections.Counter[str] = collections.Counter()
        self.wakeup = descriptors.create_eventfd()

    def __call__(self, kind: str, block: int, offset: int, detail: str, /) -> None:
        self._counts[kind] += 1
        count = self._counts[kind]
        if count > MAX_REPORTS_OF_A_KIND:
            if count & (count - 1):
                return
            detail += f" (report {count} of this kind)"
        self._queue.append(encode(Report(self._worker, kind, block, offset, detail)))
        descriptors.signal_eventfd(self.wakeup)

    def take(self) -> list[bytes]:
        """Remove and return the encoded reports, oldest first."""
        taken = []
        while self._queue:
            taken.append(self._queue.popleft())
        return taken
