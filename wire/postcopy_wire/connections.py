"""Connections of the native router: one socket each, with the messages that it has not accepted yet."""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
from collections import deque
from typing import Protocol

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import AT_ONCE, MOST_PARTS, Buffer, PlacedReader, Reader, opening

from .endpoints import Target
from .reactor import Reactor
from .transport import FULL, SENT, UNREACHABLE, Action, FramesHandler, MessageHandler

READ = 1 << 14  # bytes that are read from a peer at once
NEWCOMER_READ, NEWCOMER_AT_ONCE, NEWCOMER_FRAMES = 1 << 12, 4, 128  # ... bytes, messages, frames of a newcomer
KEPT_BYTES = 16 << 20  # of messages for one peer; a message is kept as long as there are fewer
ALL_KEPT_BYTES = 32 << 20
"""Of messages for all peers. From half of it on only one message is kept for a peer. Beyond it the peer with most is
dropped: a peer that does not read costs itself, not us."""
UNFINISHED_BYTES = 8 << 20  # of messages of all peers that are not complete; beyond it the peer with most is dropped
RETRY_SECONDS, RETRY_MOST = 0.01, 0.1
NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_READABLE, _WRITABLE = select.EPOLLIN, select.EPOLLOUT
_TOO_MANY_BUFFERS = 1000  # IOV_MAX is 1024


class Budget:
    """Bytes that all connections of one router may hold together. A connection that is dropped holds nothing."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total = limit, 0
        self._held: dict[Connection, int] = {}

    def hold(self, connection: Connection, held: int) -> None:
        """This connection holds so many bytes now. The one that holds most is dropped if that is too much."""
        self.total += held - self._held.pop(connection, 0)
        if held:
            self._held[connection] = held
        if self.total > self.limit:
            max(self._held, key=self._held.__getitem__).lost()


class Connection:
    """One connection and its outbox of at most ``queue`` messages."""

    def __init__(self, reactor: Reactor, queue: int, kept: Budget) -> None:
        self.outbox: deque[bytes] = deque()
        self.kept = 0  # bytes in the outbox
        self._all_kept = kept
        self.connection: socket.socket | None = None
        self.ready: socket.socket | None = None  # the same socket, once messages may be sent
        self._reactor = reactor
        self._queue = queue

    def open(self, connection: socket.socket, *, newcomer: bool = False) -> None:
        """Raises OSError."""
        self._reactor.register(connection.fileno(), self.act, newcomer=newcomer)
        self.connection = connection

    def act(self, mask: int) -> None:
        """Handle epoll's events of the socket."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close the socket and forget what was kept for it."""
        connection, self.connection, self.ready = self.connection, None, None  # a signal may raise in what follows
        if connection is not None:
            try:
                self._reactor.forget(connection.fileno())
            finally:
                connection.close()
        self.outbox.clear()
        self._keeps(0)

    def _keeps(self, count: int) -> None:
        self.kept = count
        self._all_kept.hold(self, count)

    def lost(self) -> None:
        """The peer is gone, or does not speak ZMTP."""
        self.drop()

    def send(self, data: bytes) -> int:
        """Send the bytes of a whole message."""
        connection = self.ready
        if connection is None:
            return UNREACHABLE
        if self.outbox:
            return self.keep(data)
        try:
            sent = connection.send(data, NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost()
            return UNREACHABLE
        return SENT if sent == len(data) else self.keep(data[sent:])

    def send_all(self, buffers: list[Buffer]) -> int:
        """Send the buffers of a whole message."""
        connection = self.ready
        if connection is None:
            return UNREACHABLE
        if self.outbox or len(buffers) > _TOO_MANY_BUFFERS:
            return FULL if self.full else self.send(b"".join(buffers))
        try:
            sent = connection.sendmsg(buffers, (), NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost()
            return UNREACHABLE
        return SENT if sent == sum(map(len, buffers)) else self.keep(b"".join(buffers)[sent:])

    @property
    def full(self) -> bool:
        """Is the outbox full?"""
        if not self.outbox:
            return False
        many = len(self.outbox) >= self._queue or self.kept >= KEPT_BYTES
        return many or self._all_kept.total >= self._all_kept.limit // 2

    def keep(self, data: bytes) -> int:
        """Put bytes into the outbox. They are a copy, because the caller may use its buffers again."""
        if self.full:
            return FULL
        if not self.outbox:
            self._want(_READABLE | _WRITABLE)
        self.outbox.append(data)
        self._keeps(self.kept + len(data))
        return SENT if self.connection is not None else UNREACHABLE

    def flush(self) -> None:
        """Send the outbox, as far as the socket accepts it."""
        connection, outbox = self.connection, self.outbox
        while connection is not None and outbox:
            data = outbox[0]
            try:
                sent = connection.send(data, NOW)
            except BlockingIOError:
                return
            except OSError:
                return self.lost()
            if sent < len(data):
                outbox[0] = data[sent:]
                return self._keeps(self.kept - sent)
            outbox.popleft()
            self._keeps(self.kept - sent)
        self._want(_READABLE)

    def _want(self, events: int) -> None:
        if self.connection is not None:
            self._reactor.modify(self.connection.fileno(), events)


class InboundPeers(Protocol):
    """The router, as an inbound connection sees it."""

    def named(self, peer: Inbound, wanted: bytes) -> None:
        """The peer has asked for this routing id."""

    def left(self, peer: Inbound) -> None:
        """The peer's connection is closed."""


class Inbound(Connection):
    """A peer that connected to the router."""

    def __init__(
        self,
        reactor: Reactor,
        queue: int,
        kept: Budget,
        unfinished: Budget,
        largest: int,
        connection: socket.socket,
        peers: InboundPeers,
        on_message: MessageHandler,
        *,
        newcomer: bool,
    ) -> None:
        """``newcomer``: the peer has little time until it is trusted."""
        super().__init__(reactor, queue, kept)
        self._unfinished = unfinished
        self._holds = False
        self.name = b""
        self._peers = peers
        self._on_message = on_message
        self._reader = Reader(largest)
        self.open(connection, newcomer=newcomer)
        self._limit_reads(newcomer)
        self.ready = connection  # the router knows it by name only when messages may be sent
        self.send(opening(kind=b"ROUTER"))

    def act(self, mask: int) -> None:
        if mask & _WRITABLE:
            self.flush()
        connection, reader = self.connection, self._reader
        if mask == _WRITABLE or connection is None or bool(mask) == reader.more:
            return
        data = b""
        if not reader.more:
            try:
                data = connection.recv(self._read)
            except BlockingIOError:
                return
            except OSError:
                pass
            if not data:
                return self.lost()
        try:
            messages = reader.feed(data)
        except BadMessage:
            return self.lost()
        if not reader.idle or self._holds:
            self._hold()
            if self.connection is None:
                return
        if not self.name:
            if reader.ready:
                self._peers.named(self, reader.identity)
            if not self.name:
                return
        on_message, name = self._on_message, self.name
        for message in messages:
            on_message(name, message)
        if reader.answer:
            self.send(reader.take_answer())

    def trust(self, trusted: bool) -> None:
        """Read what it sends as it comes, or in a newcomer's share of the thread's time."""
        connection = self.connection
        if connection is None or trusted == self.trusted:
            return
        self._reactor.forget(connection.fileno())
        try:
            self._reactor.register(connection.fileno(), self.act, newcomer=not trusted)
        except OSError:  # the kernel watches no more descriptors for us
            return self.lost()
        self._limit_reads(not trusted)
        if self.outbox:
            self._want(_READABLE | _WRITABLE)
        if self._reader.more:
            self._reactor.again(connection.fileno(), self.act)

    def _limit_reads(self, newcomer: bool) -> None:
        self.trusted = not newcomer
        self._read = NEWCOMER_READ if newcomer else READ
        self._reader.at_once = NEWCOMER_AT_ONCE if newcomer else AT_ONCE
        self._reader.frames_at_once = NEWCOMER_FRAMES if newcomer else MOST_PARTS

    def _hold(self) -> None:
        """Count what the reader holds, and come again for what it has not given."""
        held = self._reader.held
        self._holds = held > 0
        if self._reader.more:
            assert self.connection is not None
            self._reactor.again(self.connection.fileno(), self.act)
        self._unfinished.hold(self, held)

    def drop(self) -> None:
        super().drop()
        self._unfinished.hold(self, 0)
        self._peers.left(self)


class Outbound(Connection):
    """A peer that the router connects to, and again whenever the connection ends."""

    def __init__(
        self,
        reactor: Reactor,
        queue: int,
        kept: Budget,
        endpoint: str,
        on_frames: FramesHandler,
        on_connected: Action,
        capacity: int,
    ) -> None:
        super().__init__(reactor, queue, kept)
        self._target = Target(endpoint)
        self._on_frames = on_frames
        self._on_connected = on_connected
        self._buffer = memoryview(mmap.mmap(-1, capacity))  # only what is used takes memory
        self._reader: PlacedReader
        self._retry = RETRY_SECONDS

    def connect(self) -> None:
        """Try to connect, and again later if that fails; never waits."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._connect_later)
            with contextlib.suppress(OSError):
                connection = self._target.connect()
                stack.callback(connection.close)
                self._reader = PlacedReader(self._buffer)
                self.open(connection)
                stack.pop_all()
                self.keep(opening())
                self.flush()

    def act(self, mask: int) -> None:
        if mask & _WRITABLE:
            self.flush()
        connection, reader = self.connection, self._reader
        if mask == _WRITABLE or connection is None or bool(mask) == reader.more:
            return
        count = 0
        if not reader.more:
            try:
                count = connection.recv_into(reader.room or reader.space())
            except BlockingIOError:
                return
            except OSError:
                pass
            if not count:
                return self.lost()
        try:
            messages = reader.filled(count)
        except BadMessage:
            return self.lost()
        if reader.more:
            self._reactor.again(connection.fileno(), self.act)
        if self.ready is None:
            if not reader.ready:
                return
            self.ready, self._retry = connection, RETRY_SECONDS
            self._on_connected()
        for message in messages:
            self._on_frames(message)
        if answer := reader.take_answer():
            self.send(answer)

    def lost(self) -> None:
        super().lost()
        self._connect_later()

    def _connect_later(self) -> None:
        self._reactor.call_later(self._retry, self.connect)
        self._retry = min(2 * self._retry, RETRY_MOST)
