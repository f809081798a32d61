"""Turns at the conversation with a supervisor: one thread at a time, and a call inside a call of the same thread.

A finalizer, which the garbage collector may run at any instruction, or a signal handler can attach or close a block
in the middle of an exchange of its own thread. It must not wait for that exchange, which cannot go on before it
returns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .deadline import Deadline
from .errors import AttachTimeout


class Turns:
    """``inside`` is True while an exchange is under way; only the holder of the turn may ask."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._exchanges = 0
        self._later: deque[Callable[[], object]] = deque()

    @property
    def inside(self) -> bool:
        return self._exchanges > 0

    @contextmanager
    def take(self, deadline: Deadline) -> Iterator[bool]:
        """Hold the turn. Gives True inside an exchange of this thread: then the connection must not be used, and what
        needs it goes to ``later``. Raises AttachTimeout when another thread holds the turn for too long."""
        if not self._lock.acquire(timeout=deadline.lock_timeout()):
            raise AttachTimeout(f"another thread is still waiting for the supervisor in {self._directory}")
        try:
            nested = self.inside
            with self._exchange():
                yield nested
        finally:
            try:
                while self._later and not self.inside:
                    with self._exchange():
                        self._later.popleft()()
            finally:
                self._lock.release()

    @contextmanager
    def take_now(self) -> Iterator[bool]:
        """Gives True with the turn held, unless an exchange is under way; never waits."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            if self.inside:
                yield False
            else:
                with self._exchange():
                    yield True
        finally:
            self._lock.release()

    def later(self, work: Callable[[], object]) -> None:
        """Do ``work`` at the end of the exchange that is under way."""
        self._later.append(work)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        self._exchanges += 1
        try:
            yield
        finally:
            self._exchanges -= 1
