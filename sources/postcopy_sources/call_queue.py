"""How other threads reach the loop: calls in a queue, and an eventfd that wakes the loop's router."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from postcopy_kernel.descriptors import create_eventfd, signal_eventfd

Call = Callable[[], object]  # runs in the thread of the loop


class CallQueue:
    """Any thread adds calls with ``call_soon``; the loop takes them when ``wakeup`` is readable. A context manager."""

    def __init__(self) -> None:
        """Raises OSError when no descriptor is free."""
        self.wakeup = create_eventfd()
        self._lock = threading.Lock()
        self._calls: deque[Call] = deque()
        self._closed = False

    def call_soon(self, call: Call) -> None:
        """Add a call. It is dropped when the loop has ended."""
        with self._lock:
            if self._closed:
                return
            self._calls.append(call)
            if len(self._calls) == 1:
                signal_eventfd(self.wakeup)

    def take(self) -> list[Call]:
        """All calls in order; ``wakeup`` is not readable then."""
        with self._lock:
            if self._calls:
                os.eventfd_read(self.wakeup)
            calls = list(self._calls)
            self._calls.clear()
            return calls

    def __enter__(self) -> CallQueue:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            os.close(self.wakeup)
