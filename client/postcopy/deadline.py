"""A moment after which nobody waits any more, shared by all the waits of one operation."""

from __future__ import annotations

import time

FOREVER = 1e9
"""Seconds from which on nobody lives to see the end, infinity among them: more than the kernel's words take."""


class Deadline:
    """``seconds`` from now; None, or FOREVER and more: never. Raises ValueError for less than none."""

    __slots__ = ("_at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"a timeout of {seconds} seconds makes no sense")
        self.seconds = seconds
        self._at = None if seconds is None or seconds >= FOREVER else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, never negative; None: no limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def lock_timeout(self) -> float:
        """For ``Lock.acquire(timeout=)``, where -1 means no limit (and where there is a largest number)."""
        left = self.remaining()
        return -1 if left is None else min(left, 1e6)

    def milliseconds(self) -> int | None:
        """For ``poll()``: rounded up, so that a wait never ends just before its time."""
        left = self.remaining()
        return None if left is None else min(int(left * 1000) + 1, 1 << 30) if left else 0
