"""How other threads reach the loop, which waits in a turn of its router and for nothing else: an eventfd that it
watches."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from postcopy_kernel.descriptors import create_eventfd, signal_eventfd

Errand = Callable[[], None]


class Mailbox:
    """``post`` from any thread; the loop runs what was posted when ``bell`` is readable."""

    def __init__(self) -> None:
        """Raises OSError when there is no descriptor left."""
        self.bell = create_eventfd()
        self._lock = threading.Lock()
        self._errands: deque[Errand] = deque()
        self._closed = False

    def post(self, errand: Errand) -> None:
        with self._lock:
            if self._closed:
                return
            self._errands.append(errand)
            if len(self._errands) == 1:
                signal_eventfd(self.bell)

    def empty(self) -> list[Errand]:
        """What was posted, in order; the bell is silent then."""
        with self._lock:
            if self._errands:
                os.eventfd_read(self.bell)
            errands = list(self._errands)
            self._errands.clear()
            return errands

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            os.close(self.bell)
