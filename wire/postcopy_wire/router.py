"""The native ROUTER: many connections over Unix and tcp sockets, where a message is one ``recv`` or one ``send``.

A peer that connects gets the routing id that it asks for. A later peer with the same id takes its place, as with
ROUTER_HANDOVER; the names of peers that the router connects to cannot be taken. No send waits: what a socket does not
accept is kept, up to ``queue`` messages. Only CURVE is left to libzmq, whose sockets are served in the same turns.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from postcopy_protocol.zmtp import LARGEST, SHORT, Buffer, frame, framed

from .connections import ALL_KEPT_BYTES, NOW, UNFINISHED_BYTES, Budget, Connection, Inbound, Outbound
from .endpoints import listening_socket, prepare_connection
from .reactor import AT_ONCE, Reactor
from .transport import (
    SENT,
    UNREACHABLE,
    Action,
    FramesHandler,
    GoneHandler,
    MessageHandler,
    PrepareSocket,
    ignore_gone,
)

if TYPE_CHECKING:
    from .libzmq import Sockets

PENDING = 1024  # connections that may be open before they have said a routing id
PENDING_SECONDS = 30.0  # ... and for how long.
NEWCOMERS_AT_ONCE = 4  # connections that are accepted at once
LINGER_STEP = 0.002
ACCEPT_AGAIN_SECONDS = 0.05  # between two tries to accept a connection while no descriptor is free


class NativeRouter(Reactor):
    """See ``transport.Router``."""

    def __init__(
        self,
        on_message: MessageHandler,
        on_gone: GoneHandler = ignore_gone,
        *,
        queue: int = 1000,
        largest: int = LARGEST,
        newcomers: bool = False,
    ) -> None:
        """``queue``: messages that are kept for one peer; ``largest``: bytes of the largest message of a peer that
        connects; ``newcomers``: a peer that connects is one until ``trust`` is called for it."""
        super().__init__()
        self._newcomers_come = newcomers
        self.inbound: dict[bytes, Inbound] = {}
        self.outbound: dict[bytes, Outbound] = {}
        self.pending: dict[Inbound, float] = {}
        """Peers that have not said a routing id, and since when; the oldest first."""
        self._on_message = on_message
        self._on_gone = on_gone
        self._queue = queue
        self._largest = largest
        self._libzmq: Sockets | None = None
        self._listeners: dict[str, socket.socket] = {}  # by endpoint
        self._names = 0
        self._kept, self._unfinished = Budget(ALL_KEPT_BYTES), Budget(UNFINISHED_BYTES)

    def listen(self, endpoint: str, prepare: PrepareSocket | None = None) -> str:
        """See ``transport.Router``. An endpoint with ``prepare`` is libzmq's: it wants CURVE."""
        if prepare is not None:
            return self._sockets().listen(endpoint, prepare)
        listener, bound = listening_socket(endpoint)
        if (before := self._listeners.pop(endpoint, None)) is not None:  # its path was removed: connections go on
            self.forget(before.fileno())
            before.close()
        self._listeners[endpoint] = listener
        self._watch_listener(listener)
        return bound

    def connect(
        self,
        endpoint: str,
        name: bytes,
        on_frames: FramesHandler,
        on_connected: Action,
        capacity: int,
        prepare: PrepareSocket | None = None,
    ) -> None:
        if prepare is not None:
            return self._sockets().connect(endpoint, name, on_frames, on_connected, capacity, prepare)
        peer = Outbound(self, self._queue, self._kept, endpoint, on_frames, on_connected, capacity)
        self.outbound[name] = peer
        peer.connect()

    def close(self, linger: float = 0.0) -> None:
        until = time.monotonic() + linger
        connections: list[Connection] = [*self.inbound.values(), *self.outbound.values()]
        while any(connection.outbox for connection in connections) and time.monotonic() < until:
            time.sleep(LINGER_STEP)
            for connection in connections:
                if connection.outbox:
                    connection.flush()
        for peer in [*self.inbound.values(), *self.pending, *self.outbound.values()]:
            peer.drop()
        for listener in self._listeners.values():
            listener.close()
        if self._libzmq is not None:
            self._libzmq.close(linger)
        self.close_epolls()

    def _sockets(self) -> Sockets:
        if self._libzmq is None:
            from .libzmq import Sockets

            self._libzmq = Sockets(self, self._on_message, self._queue, self._largest)
        return self._libzmq

    def send(self, name: bytes, data: bytes) -> int:
        peer = self.inbound.get(name) or self.outbound.get(name)
        if peer is not None:
            ready, length = peer.ready, len(data)
            if ready is None or peer.outbox or length > 255:
                return peer.send(frame(data))
            # What ``peer.send`` does, in one step, because each fault takes this way.
            data = SHORT[length] + data
            try:
                sent = ready.send(data, NOW)
            except OSError:
                return peer.send(data)
            return SENT if sent == length + 2 else peer.keep(data[sent:])
        return self._libzmq.send(name, (data,)) if self._libzmq is not None else UNREACHABLE

    def send_parts(self, name: bytes, parts: Sequence[Buffer]) -> int:
        peer = self.inbound.get(name) or self.outbound.get(name)
        if peer is not None:
            buffers, ready = framed(parts), peer.ready
            if ready is None or peer.outbox or len(buffers) != 2:
                return peer.send_all(buffers)
            try:  # what ``peer.send_all`` does, in one step
                sent = ready.sendmsg(buffers, (), NOW)
            except OSError:
                return peer.send_all(buffers)
            whole = len(buffers[0]) + len(buffers[1])
            return SENT if sent == whole else peer.keep(b"".join(buffers)[sent:])
        return self._libzmq.send(name, parts) if self._libzmq is not None else UNREACHABLE

    def trust(self, name: bytes, trusted: bool = True) -> None:
        peer = self.inbound.get(name)
        if peer is not None:
            peer.trust(trusted)

    def _watch_listener(self, listener: socket.socket) -> None:
        self.register(listener.fileno(), lambda mask: self._accept(listener), newcomer=self._newcomers_come)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(NEWCOMERS_AT_ONCE if self._newcomers_come else AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor is free: the others wait in the backlog
                self.forget(listener.fileno())
                return self.call_later(ACCEPT_AGAIN_SECONDS, partial(self._watch_listener, listener))
            connection.setblocking(False)
            now = time.monotonic()
            while self.pending:
                oldest, since = next(iter(self.pending.items()))
                if len(self.pending) < PENDING and now - since < PENDING_SECONDS:
                    break
                oldest.drop()
            try:
                prepare_connection(connection)
                peer = Inbound(
                    self,
                    self._queue,
                    self._kept,
                    self._unfinished,
                    self._largest,
                    connection,
                    self,
                    self._on_message,
                    newcomer=self._newcomers_come,
                )
            except OSError:  # the kernel watches no more descriptors for us
                connection.close()
                continue
            if peer.connection is not None:
                self.pending[peer] = now

    def named(self, peer: Inbound, wanted: bytes) -> None:
        """A pending peer has said its routing id."""
        if wanted in self.outbound:
            return peer.drop()
        if not wanted or wanted[0] == 0:  # RFC 28: the router makes such ids
            self._names += 1
            wanted = b"\0" + self._names.to_bytes(8, "big")
        before = self.inbound.get(wanted)
        if before is not None:
            before.name = b""  # on_gone is not called: the peer is here
            before.drop()
        del self.pending[peer]
        peer.name = wanted
        self.inbound[wanted] = peer

    def left(self, peer: Inbound) -> None:
        """The connection of a peer is closed."""
        self.pending.pop(peer, None)
        if peer.name and self.inbound.get(peer.name) is peer:
            del self.inbound[peer.name]
            self._on_gone(peer.name)
