"""A worker's channel to the supervisor: one connection to its router.

Any thread sends, one reads. Nobody waits to send: what the socket does not take lies in an outbox until ``flush`` finds
room. A connection that is gone is made again by its reader, 10 ms later and then ever
later up to 80 ms, because a supervisor that takes over wants its workers soon. Each begins with the worker's hello,
which the supervisor answers with a wake of nothing where pages may be waited for; so what was sent into a connection
that then broke need not be kept: it is asked again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import Reader, frame, opening

RETRY_SECONDS, RETRY_MOST = 0.01, 0.08
READ = 1 << 14
SCHEME = "ipc://"
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Channel:
    """Not connected at first: ``connect`` or ``receive`` does that."""

    def __init__(self, endpoint: str, identity: bytes, hello: bytes, held: Callable[[], None]) -> None:
        """``endpoint``: ``ipc://PATH``; ``hello``: the first message of every connection; ``held`` is called when
        something is put into the outbox, from the thread that sends: somebody is to ``flush`` until it is empty."""
        self._path = endpoint.removeprefix(SCHEME)
        self._opening = opening(identity)
        self._hello = frame(hello)
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._socket: socket.socket | None = None
        self._open: socket.socket | None = None
        """The same, once messages may be sent: a NULL mechanism takes none before both ends have said READY."""
        self._old: socket.socket | None = None
        self._reader = Reader()
        self._retry = RETRY_SECONDS
        self._not_before = 0.0
        self._held = held

    @property
    def connected(self) -> bool:
        """May messages be sent?"""
        return self._open is not None

    def holds(self) -> bool:
        """Does anything lie in the outbox?"""
        return bool(self._outbox)

    def fileno(self) -> int:
        """-1 while there is no connection."""
        connection = self._socket
        return connection.fileno() if connection is not None else -1

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send a message, or keep it; never waits. Without a connection it is dropped: the next hello makes up
        for it."""
        data = frame(data)
        if not self._outbox and self._lock.acquire(False):
            try:
                connection = self._open
                if connection is None:
                    return
                sent = connection.send(data, _NOW)
                if sent == len(data):
                    return
                self._outbox.appendleft(data[sent:])  # before what others have put there meanwhile
            except BlockingIOError:
                self._outbox.appendleft(data)
            except OSError:  # it is gone: its reader hears that too
                return
            finally:
                self._lock.release()
        else:
            self._outbox.append(data)
        self._held()

    def flush(self) -> None:
        """Send what lies in the outbox, as far as the socket takes it."""
        with self._lock:
            while self._outbox and self._open is not None:
                data = self._outbox[0]
                try:
                    sent = self._open.send(data, _NOW)
                except BlockingIOError:
                    return
                except OSError:
                    sent = len(data)
                if sent < len(data):
                    self._outbox[0] = data[sent:]
                else:
                    self._outbox.popleft()

    def close(self) -> None:
        """For tests: a worker's end is the end of its process."""
        for connection in (self._socket, self._old):
            if connection is not None:
                connection.close()

    # --- receiving: one thread only -----------------------------------------------------------------------------------

    def receive(self) -> list[bytes]:
        """Wait for messages, over as many connections as it takes."""
        while True:
            connection = self._socket
            if connection is None:
                if not self.connect():
                    time.sleep(self._retry)
                continue
            try:
                data = connection.recv(READ)
            except OSError:
                data = b""
            if len(data) > 2 and len(data) == 2 + data[1] and not data[0] and self._reader.idle:
                return [data[2:]]  # one short message, which is the rule
            messages = self._take(connection, data)
            if messages:
                return messages

    def receive_now(self) -> list[bytes]:
        """What is there, for a thread that has polled ``fileno``; waits if nothing is."""
        connection = self._socket
        if connection is None:
            return []
        try:
            data = connection.recv(READ)
        except OSError:
            data = b""
        return self._take(connection, data)

    def connect(self) -> bool:
        """Try once; never waits. ``retry_in`` says when to try again: not at once, either, where somebody took the last
        connection and said nothing of use."""
        if time.monotonic() < self._not_before:
            return False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.setblocking(False)  # a router whose queue is full is not waited for
            connection.connect(self._path)
            connection.send(self._opening, _NOW)  # a fresh socket has room for it
            connection.setblocking(True)
        except OSError:
            connection.close()
            self._retry = min(2 * self._retry, RETRY_MOST)
            return False
        self._reader = Reader()
        self._socket = connection
        return True

    @property
    def retry_in(self) -> float:
        """Seconds until ``connect`` is worth a try."""
        return self._retry

    def _take(self, connection: socket.socket, data: bytes) -> list[bytes]:
        """What has come; nothing: the other end is gone."""
        try:
            if not data:
                raise BadMessage("the other end is gone")
            messages = self._reader.feed(data)
        except BadMessage:
            self._lost(connection)
            return []
        if self._reader.answer:
            with contextlib.suppress(OSError):
                connection.send(self._reader.answer, _NOW)
            self._reader.answer = b""
        if self._open is None and self._reader.ready:
            self._begin(connection)
        return [message if isinstance(message, bytes) else b"".join(message) for message in messages]

    def _begin(self, connection: socket.socket) -> None:
        with self._lock, contextlib.suppress(OSError):  # a fresh socket has room; one that is gone is read next
            self._outbox.clear()
            connection.send(self._hello, _NOW)
            self._open, self._retry = connection, RETRY_SECONDS

    def _lost(self, connection: socket.socket) -> None:
        """The descriptor is kept until the next loss: another thread may be about to send to its number."""
        if self._open is None:
            self._retry = min(2 * self._retry, RETRY_MOST)
            self._not_before = time.monotonic() + self._retry
        with self._lock:
            self._socket = self._open = None
            self._outbox.clear()
        if self._old is not None:
            self._old.close()
        self._old = connection
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
