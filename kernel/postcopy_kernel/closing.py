"""Closing what other users have made, without waiting for them.

The last close of a descriptor may wait as long as its maker likes: a TCP socket with SO_LINGER whose peer reads
nothing, a file of a FUSE file system that does not answer. So each user's descriptors are closed in a thread of their
own, which lives while there is something to close.

Example::

    closer = Closer()
    closer.close(uid, fd)
    assert closer.seconds(uid) < 1.0  # or the last one still waits
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress

Thing = int | socket.socket


class Closer:
    """Any thread may call it."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting: dict[int, deque[Thing]] = {}  # by user; one that has a thread is here
        self._began: dict[int, float] = {}  # when the thread began with what it closes now

    def close(self, user: int, *things: Thing) -> None:
        """Close descriptors, or connections in which there may be some."""
        if not things:
            return
        with self._turn:
            waiting = self._waiting.get(user)
            if waiting is not None:
                waiting.extend(things)
                return
            self._waiting[user] = deque(things)
            self._began[user] = time.monotonic()
        try:
            threading.Thread(target=self._run, args=(user,), name="closer", daemon=True).start()
        except RuntimeError:  # no thread is to be had
            self._run(user)

    def busy(self, user: int) -> bool:
        """Is something of this user's not closed yet?"""
        return user in self._waiting

    def seconds(self, user: int) -> float:
        """For how long one close has been waiting; 0: none does."""
        began = self._began.get(user)
        return 0.0 if began is None else time.monotonic() - began

    def held(self, user: int) -> int:
        """How many descriptors and connections of this user's are not closed yet."""
        waiting = self._waiting.get(user)
        return 0 if waiting is None else len(waiting) + 1

    def stuck(self, seconds: float) -> list[int]:
        """The users of whom one close has been waiting for longer than this."""
        return [user for user in list(self._began) if self.seconds(user) > seconds]

    def _run(self, user: int) -> None:
        while True:
            with self._turn:
                if not self._waiting[user]:
                    del self._waiting[user], self._began[user]
                    return
                thing = self._waiting[user].popleft()
                self._began[user] = time.monotonic()
            with suppress(OSError):
                if isinstance(thing, int):
                    os.close(thing)
                else:
                    thing.close()
