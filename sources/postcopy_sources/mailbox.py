"""How other threads reach the loop, which waits for messages of its one ROUTER and for nothing else: a DEALER in this
process that knocks there."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable

import zmq

Errand = Callable[[], None]


class Mailbox:
    """``post`` from any thread; the loop runs what was posted. ``name`` is the routing id that knocks: unguessable, so
    that no supervisor can take it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes]) -> None:
        self.name = b"\0mailbox" + secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._errands: deque[Errand] = deque()
        self._knocked = False
        router.bind("inproc://mailbox")
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, self.name)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect("inproc://mailbox")

    def post(self, errand: Errand) -> None:
        with self._lock:  # also what lets several threads share the socket
            self._errands.append(errand)
            if not self._knocked and not self._socket.closed:
                self._knocked = True
                self._socket.send(b"")

    def empty(self) -> list[Errand]:
        """What was posted, in order."""
        with self._lock:
            self._knocked = False
            errands = list(self._errands)
            self._errands.clear()
            return errands

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._socket.close()
