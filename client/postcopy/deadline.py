"""A point in time at which all waits of one operation end."""

from __future__ import annotations

import time

FOREVER = 1e9
"""As many seconds, or more, are no limit: such numbers (infinity too) do not fit into the kernel's arguments."""


class Deadline:
    """``seconds`` from now; None, or FOREVER and more: no limit. Raises ValueError for a negative number,
    TypeError for what is none."""

    __slots__ = ("_at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not hasattr(seconds, "__float__"):
            raise TypeError(f"a timeout is a number of seconds or None, not {type(seconds).__name__}")
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"a timeout of {seconds} seconds makes no sense")
        self.seconds = seconds
        self._at = None if seconds is None or seconds >= FOREVER else time.monotonic() + float(seconds)

    def remaining(self) -> float | None:
        """Seconds left, never negative; None: no limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def lock_timeout(self) -> float:
        """For ``Lock.acquire(timeout=)``, where -1 means no limit and large numbers are refused."""
        left = self.remaining()
        return -1 if left is None else min(left, 1e6)

    def milliseconds(self) -> int | None:
        """For ``poll()``: rounded up, so that a wait never ends early."""
        left = self.remaining()
        return None if left is None else min(int(left * 1000) + 1, 1 << 30) if left else 0
