"""The share of a router's thread that newcomers get: connections of peers that have not shown that they are wanted.

They are in an epoll of their own, which is looked at after all others of a turn, one connection after the other, for a
bounded time. When they have used up their share it is not looked at for a while: what they send waits in the kernel. So
the messages of other peers wait for one slice at most, however many newcomers there are and whatever they send."""

from __future__ import annotations

import select
import time
from collections import OrderedDict
from collections.abc import Callable

SLICE_SECONDS = 0.0003
SHARE = 0.2
BURST_SECONDS = 0.002  # of the thread's time that may be used at once

EventAction = Callable[[int], object]


class Newcomers:
    """Only ``Reactor`` uses it."""

    def __init__(self, pause: Callable[[float], object]) -> None:
        """``pause``: do not call ``serve`` for so many seconds."""
        self.epoll = select.epoll()
        self.actions: dict[int, EventAction] = {}
        self._again: OrderedDict[int, EventAction] = OrderedDict()  # by descriptor
        self._again_next = False
        self._pause = pause
        self._used = self._at = 0.0  # seconds of the thread's time, and when they were counted

    def again(self, fd: int, act: EventAction) -> None:
        """Call ``act`` with no event when it is this connection's turn."""
        self._again[fd] = act

    @property
    def waits(self) -> bool:
        """Is there one to be called again?"""
        return bool(self._again)

    def forget(self, fd: int) -> None:
        """The caller has unregistered the descriptor, or will close it."""
        self.actions.pop(fd, None)
        self._again.pop(fd, None)

    def serve(self) -> None:
        """Handle events for one slice."""
        began = used = time.thread_time()
        end = began + SLICE_SECONDS
        idle = 0
        while idle < 2 and used < end:
            self._again_next = not self._again_next
            done = self._call_again() if self._again_next else self._poll()
            idle = 0 if done else idle + 1
            used = time.thread_time()
        now = time.monotonic()
        self._used = max(0.0, self._used - (now - self._at) * SHARE) + used - began
        self._at = now
        if self._used > BURST_SECONDS:
            self._pause((self._used - BURST_SECONDS) / SHARE)

    def _poll(self) -> bool:
        """Handle one event: the kernel gives each connection its turn. False: there is none."""
        for fd, mask in self.epoll.poll(0, 1):
            if (act := self.actions.get(fd)) is not None:
                act(mask)
            return True
        return False

    def _call_again(self) -> bool:
        """Call one again that was not finished. False: there is none."""
        if not self._again:
            return False
        self._again.popitem(last=False)[1](0)
        return True
