"""The native channel of a worker: one Unix socket to the supervisor's router.

A connection that ended is made again by the receiving thread, first after 10 ms and then after up to 80 ms: short,
because a supervisor that takes over wants its workers soon.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import Reader, frame, opening

from .transport import IPC, Action

RETRY_SECONDS, RETRY_MOST = 0.01, 0.08
READ = 1 << 14
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class NativeChannel:
    """See ``transport.Channel``. Not connected at first: ``connect`` and ``receive`` connect."""

    def __init__(self, endpoint: str, identity: bytes, hello: bytes, on_held: Action) -> None:
        self._path = endpoint.removeprefix(IPC)
        self._opening = opening(identity)
        self._hello = frame(hello)
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._socket: socket.socket | None = None
        self._ready: socket.socket | None = None
        """The same socket, once messages may be sent: after both ends have said READY."""
        self._old: socket.socket | None = None
        self._reader = Reader()
        self._retry = RETRY_SECONDS
        self._not_before = 0.0
        self._on_held = on_held

    @property
    def connected(self) -> bool:
        return self._ready is not None

    @property
    def retry_in(self) -> float:
        return self._retry

    def holds(self) -> bool:
        return bool(self._outbox)

    def fileno(self) -> int:
        connection = self._socket
        return connection.fileno() if connection is not None else -1

    def send(self, data: bytes) -> None:
        data = frame(data)
        if not self._outbox and self._lock.acquire(False):
            try:
                connection = self._ready
                if connection is None:
                    return
                sent = connection.send(data, _NOW)
                if sent == len(data):
                    return
                self._outbox.appendleft(data[sent:])  # before what other threads have put there meanwhile
            except BlockingIOError:
                self._outbox.appendleft(data)
            except OSError:  # the connection has ended, as its receiver will see too
                return
            finally:
                self._lock.release()
        else:
            self._outbox.append(data)
        self._on_held()

    def flush(self) -> None:
        with self._lock:
            while self._outbox and self._ready is not None:
                data = self._outbox[0]
                try:
                    sent = self._ready.send(data, _NOW)
                except BlockingIOError:
                    return
                except OSError:
                    sent = len(data)
                if sent < len(data):
                    self._outbox[0] = data[sent:]
                else:
                    self._outbox.popleft()

    def close(self) -> None:
        for connection in (self._socket, self._old):
            if connection is not None:
                connection.close()

    def receive(self) -> list[bytes]:
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
                return [data[2:]]  # the common case: one short message
            messages = self._take(connection, data)
            if messages:
                return messages

    def receive_now(self) -> list[bytes]:
        """Waits if nothing has arrived."""
        connection = self._socket
        if connection is None:
            return []
        try:
            data = connection.recv(READ)
        except OSError:
            data = b""
        return self._take(connection, data)

    def connect(self) -> bool:
        """Try once. Where a peer accepted the last connection and did not speak ZMTP, the next try waits."""
        if time.monotonic() < self._not_before:
            return False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.setblocking(False)  # does not wait for a router whose backlog is full
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

    def _take(self, connection: socket.socket, data: bytes) -> list[bytes]:
        """The messages that are complete now: the last frame of each. Without data the connection has ended."""
        try:
            if not data:
                raise BadMessage("the connection has ended")
            messages = list(self._reader.feed(data))
            while self._reader.more:
                messages += self._reader.feed(b"")
        except BadMessage:
            self._lost(connection)
            return []
        if self._reader.answer:
            with contextlib.suppress(OSError):
                connection.send(self._reader.take_answer(), _NOW)
        if self._ready is None and self._reader.ready:
            self._begin(connection)
        return [message if isinstance(message, bytes) else message[-1] for message in messages]

    def _begin(self, connection: socket.socket) -> None:
        with self._lock, contextlib.suppress(OSError):  # a fresh socket has room
            self._outbox.clear()
            connection.send(self._hello, _NOW)
            self._ready, self._retry = connection, RETRY_SECONDS

    def _lost(self, connection: socket.socket) -> None:
        """The descriptor stays open until the next loss: another thread may be about to send to its number."""
        if self._ready is None:
            self._retry = min(2 * self._retry, RETRY_MOST)
            self._not_before = time.monotonic() + self._retry
        with self._lock:
            self._socket = self._ready = None
            self._outbox.clear()
        if self._old is not None:
            self._old.close()
        self._old = connection
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
