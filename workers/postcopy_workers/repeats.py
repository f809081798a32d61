"""Notices faults that come again and again after they were answered, and slows their client down.

A thread that is woken finds its page, and faults no more. It does fault again where the client has lied: its memory is
not the block, it has another offset, or the client has write-protected it. Without this its worker would answer such a
thread for ever, as fast as it can."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

Pause = Callable[[float], None]  # sleeps

_SLOTS = 4096
MOST_AGAIN = 256
"""Repeated faults within a second that are answered at once. Threads that race for one page make a few."""
LONGEST_PAUSE = 1.0


class Repeats:
    """Called only when a thread is woken without a page being mapped for it, which is rare; the rest of the fault path
    pays nothing. It remembers the last such address of each of 4096 slots, so pages in sequence do not count."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._last: array[int] = array("Q")  # 32 KiB, made when they are needed
        self._again = 0
        self._since = 0.0
        self._pauses = 0

    def seen(self, address: int, shift: int) -> bool:
        """A thread was woken at ``address`` of a page of ``1 << shift`` bytes. True: too often; it has paused."""
        if not self._last:
            self._last = array("Q", bytes(8 * _SLOTS))
        slot = (address >> shift) % _SLOTS
        if self._last[slot] != address:
            self._last[slot] = address
            return False
        self._again += 1
        if self._again < MOST_AGAIN:
            return False
        self._again = 0
        begun, self._since = self._since, time.monotonic()
        if self._since - begun > 1.0:
            self._pauses = 0
            return False
        self._pause(min(LONGEST_PAUSE, 0.01 * 2**self._pauses))
        self._pauses = min(self._pauses + 1, 10)
        self._since = time.monotonic()
        return True
