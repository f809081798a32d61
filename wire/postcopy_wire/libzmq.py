"""The libzmq transport: pyzmq sockets in the turns of one reactor, and a worker's channel.

Peers that connect to us share one ROUTER. Each peer that we connect to has a DEALER of its own, so no other peer can
take its name, and its socket monitor tells whether the connection stands. Two rules hold everywhere: nothing is sent
blocking, and EVENTS is read after sends and receives, because the descriptor of a libzmq socket is edge-triggered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from postcopy_protocol.zmtp import LARGEST, MOST_PARTS, Buffer

from .addresses import use_family
from .backlog import CURVE_BYTES, UNASKED_LIMIT, Backlog, Link
from .reactor import Reactor
from .transport import FULL, IPC, SENT, UNREACHABLE, Action, FramesHandler, MessageHandler, PrepareSocket

AT_ONCE = 16  # messages that are received from one socket before others are looked at
RECEIVE_QUEUE = 10_000
RETRY_MS, RETRY_MOST_MS = 10, 80
"""Times between two tries to connect: short, because a supervisor that takes over wants its workers soon."""
HEARTBEAT_MS, SILENT_MS = 5000, 20000  # over a network: a peer that has not answered for so long is gone

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]
# Plain integers: an operation on pyzmq's enumeration costs more than sending a frame.
_LAST = int(zmq.DONTWAIT)
_MORE = _LAST | int(zmq.SNDMORE)
_EVENTS, _READABLE, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_HANDSHAKE, _DISCONNECTED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_DISCONNECTED)
_ENDS = _DISCONNECTED | int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_ENDS |= int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_ACCEPTED, _CONNECTED, _SOURCE = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_CONNECTED), int(zmq.SRCFD)


def can_receive(socket: Socket) -> bool:
    """Is there a message? Asking also re-arms the socket's descriptor."""
    return bool(int(socket.get(_EVENTS)) & _READABLE)


def _address(endpoint: str) -> Any:
    """An endpoint for bind and connect: as bytes, because the path of an ipc socket may be no UTF-8."""
    return os.fsencode(endpoint)


def set_limits(socket: Socket, queue: int, largest: int) -> None:
    """``queue``: messages that are kept for one peer; ``largest``: bytes of the largest frame that is accepted."""
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, queue), (zmq.RCVHWM, RECEIVE_QUEUE), (zmq.MAXMSGSIZE, largest)):
        socket.setsockopt(option, value)


FrameSender = Callable[[Buffer, int], object]
"""``send`` of the layer below pyzmq's Python layer, which does nothing here and takes a microsecond a frame."""


def frame_sender(socket: Socket) -> FrameSender:
    sender: FrameSender = super(zmq.Socket, socket).send
    return sender


def added_bytes(socket: Socket) -> int:
    """Bytes that the socket's security mechanism adds to each frame."""
    return CURVE_BYTES if socket.getsockopt(zmq.MECHANISM) == zmq.CURVE else 0


class InboundSocket:
    """The ROUTER that peers connect to. See ``reactor.PolledSocket``."""

    def __init__(
        self, context: Context, on_message: MessageHandler, queue: int, largest: int, backlog: Backlog
    ) -> None:
        self.socket: Socket = context.socket(zmq.ROUTER)
        self.monitor: Socket | None = None
        self._backlog = backlog
        self._links: dict[bytes, Link] = {}  # by routing id
        set_limits(self.socket, queue, largest)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is noticed when it is answered
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that comes back on a new connection is the same
        self._on_message = on_message
        self._send = frame_sender(self.socket)

    def fileno(self) -> int:
        return int(self.socket.getsockopt(zmq.FD))

    def waiting(self) -> bool:
        return can_receive(self.socket)

    def watch_connections(self) -> Socket:
        """The monitor whose events ``check_connections`` is to be called for. To be called before ``bind``."""
        self.monitor = self.socket.get_monitor_socket(_ACCEPTED | _DISCONNECTED)
        return self.monitor

    def check_connections(self) -> None:
        """Handle what the monitor reports."""
        while self.monitor is not None and can_receive(self.monitor):
            event = recv_monitor_message(self.monitor)
            if event["event"] == _ACCEPTED:
                self._backlog.opened(event["value"], added_bytes(self.socket))
            else:
                self._backlog.closed(event["value"])
                links = self._backlog.links.values()
                self._links = {name: link for name, link in self._links.items() if link in links}

    def receive(self) -> None:
        """Handle messages, up to AT_ONCE of them."""
        socket, receive = self.socket, self.socket.recv
        for _ in range(AT_ONCE):
            if not can_receive(socket):
                return
            name = receive()
            link = self._links.get(name)
            message = receive() if link is not None or self.monitor is None else self._first(name)
            if link is not None:
                link.took(len(message))
            if not socket.get(_RCVMORE):
                self._on_message(name, message)
                continue
            parts = [message]
            while socket.get(_RCVMORE):
                part = receive()
                if len(parts) <= MOST_PARTS:  # no message has more: it is refused without them
                    parts.append(part)
                if link is not None:
                    link.took(len(part))
            self._on_message(name, parts)

    def _first(self, name: bytes) -> bytes:
        """The first message of a peer: it shows which connection is its."""
        frame = self.socket.recv(0, False)
        link = self._backlog.links.get(int(frame.get(_SOURCE)))
        if link is not None:
            self._links[name] = link
            link.took(len(frame.buffer))
        return frame.bytes

    def send(self, name: bytes, parts: Sequence[Buffer]) -> int:
        send, link = self._send, self._links.get(name)
        if link is not None and link.is_full():
            return FULL
        try:
            # A peer that cannot be reached is known at the first frame; the others follow when that is accepted.
            send(name, _MORE)
            for part in parts[:-1]:
                send(part, _MORE)
            send(parts[-1], _LAST)
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return UNREACHABLE
        if link is not None:
            for part in parts:
                link.gave(len(part))
        return SENT

    def close(self, linger: float) -> None:
        if self.monitor is not None:
            self.socket.disable_monitor()
            self.monitor.close(0)
        self.socket.close(int(linger * 1000))


class Dealer:
    """A DEALER with one connection, and a monitor that reports what becomes of it.

    ``once``: the owner makes another Dealer when ``ended``. Else libzmq connects again whenever the connection
    ends (ZMQ_IMMEDIATE), and then drops what that had brought and what it had not sent. If it does so between two
    frames that we receive it aborts the process (``!_more``, fq.cpp), so that is for peers that send no such messages.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        queue: int,
        largest: int,
        *,
        identity: bytes = b"",
        prepare: PrepareSocket | None = None,
        backlog: Backlog | None = None,
        once: bool = False,
    ) -> None:
        """``backlog``: it watches the connection over a network."""
        self.connected = self._ended = False
        self.link: Link | None = None
        self._backlog = backlog
        self._fd = -1
        self.socket: Socket = context.socket(zmq.DEALER)
        set_limits(self.socket, queue, largest)
        for option, value in (
            (zmq.IMMEDIATE, int(not once)),
            (zmq.RECONNECT_IVL, RETRY_MS),
            (zmq.RECONNECT_IVL_MAX, RETRY_MOST_MS),
        ):
            self.socket.setsockopt(option, value)
        if not endpoint.startswith(IPC):
            set_heartbeat(self.socket)
        if identity:
            self.socket.setsockopt(zmq.ROUTING_ID, identity)
        if prepare is not None:
            prepare(self.socket)
        self._added = added_bytes(self.socket)
        self.monitor = self.socket.get_monitor_socket(_HANDSHAKE | _CONNECTED | _ENDS)
        self.send = frame_sender(self.socket)
        use_family(self.socket, endpoint)
        self.socket.connect(_address(endpoint))

    def new_connection(self) -> bool:
        """Read the monitor: has a connection been made since the last call? The newest event says what is now."""
        made = False
        while can_receive(self.monitor):
            event = recv_monitor_message(self.monitor)
            self.connected = made = event["event"] == _HANDSHAKE
            self._ended = self._ended or bool(event["event"] & _ENDS)
            if self._backlog is not None and not made:
                self._watch(self._backlog, event["value"] if event["event"] == _CONNECTED else -1)
        if made:
            self.socket.get(_EVENTS)  # takes over the connection, so that a message can be sent at once
        return made

    def ended(self) -> bool:
        """Has a connection ended, as far as the monitor was read?"""
        return self._ended

    def end(self) -> None:
        """The connection is not used from now on."""
        self.connected, self._ended = False, True

    def _watch(self, backlog: Backlog, fd: int) -> None:
        """This is its connection now; -1: it has none."""
        backlog.closed(self._fd)
        self._fd = fd
        if fd >= 0:
            backlog.opened(fd, self._added)
        self.link = backlog.links.get(fd)

    def close(self, linger: float = 0.0) -> None:
        if self._backlog is not None:
            self._watch(self._backlog, -1)
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(int(linger * 1000))


class OutboundSocket:
    """A peer that the router connects to: a new Dealer for each connection. See ``reactor.PolledSocket``."""

    def __init__(
        self, reactor: Reactor, make: Callable[[], Dealer], on_frames: FramesHandler, on_connected: Action
    ) -> None:
        self._reactor = reactor
        self._make = make
        self._on_frames = on_frames
        self._on_connected = on_connected
        self._retry_ms = RETRY_MS
        self.dealer = make()

    def fileno(self) -> int:
        return int(self.dealer.socket.getsockopt(zmq.FD))

    def waiting(self) -> bool:
        return not self.dealer.ended() and can_receive(self.dealer.socket)

    def check_connection(self) -> None:
        """Handle what the monitor reports."""
        if self.dealer.ended():
            return
        made = self.dealer.new_connection()
        if self.dealer.ended():
            self._begin_again()
        elif made:
            self._on_connected()

    def _open(self) -> None:
        self.dealer = self._make()
        self.watch()

    def watch(self) -> None:
        """Wait for events of its connection; it may stand already."""
        self._reactor.watch(self.fileno(), lambda: None)  # it only ends the wait
        self._reactor.watch(int(self.dealer.monitor.getsockopt(zmq.FD)), self.check_connection)
        self.check_connection()

    def _begin_again(self) -> None:
        """Close, which drops what came and was not received, and connect later."""
        self.dealer.end()
        for socket in (self.dealer.socket, self.dealer.monitor):
            self._reactor.forget(int(socket.getsockopt(zmq.FD)))
        self.dealer.close()
        self._reactor.call_later(self._retry_ms / 1000, self._open)
        self._retry_ms = min(2 * self._retry_ms, RETRY_MOST_MS)

    def close(self, linger: float) -> None:
        if not self.dealer.ended():
            self.dealer.close(linger)

    def receive(self) -> None:
        """Handle messages, up to AT_ONCE of them."""
        socket = self.dealer.socket
        for _ in range(AT_ONCE):
            if self.dealer.ended() or not can_receive(socket):
                return
            frames, link = [socket.recv(0, False)], self.dealer.link
            while frames[-1].more:
                frame = socket.recv(0, False)
                if len(frames) > MOST_PARTS:  # no message has so many, and to receive millions takes seconds
                    return self._begin_again()
                frames.append(frame)
            buffers = [frame.buffer for frame in frames]
            if link is not None:
                for buffer in buffers:
                    link.took(len(buffer))
            self._retry_ms = RETRY_MS
            self._on_frames(buffers)

    def send(self, parts: Sequence[Buffer]) -> int:
        if not self.dealer.connected:
            return UNREACHABLE
        send = self.dealer.send
        try:
            for part in parts[:-1]:
                send(part, _MORE)
            send(parts[-1], _LAST)
        except zmq.Again:
            return FULL
        if (link := self.dealer.link) is not None:
            for part in parts:
                link.gave(len(part))
        return SENT


def set_heartbeat(socket: Socket) -> None:
    """Notice a peer that vanished from the network without a word."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)


class Sockets:
    """All libzmq sockets of one router, and their context."""

    def __init__(self, reactor: Reactor, on_message: MessageHandler, queue: int, largest: int) -> None:
        self._reactor = reactor
        self._on_message = on_message
        self._queue = queue
        self._largest = largest
        self._context: Context = zmq.Context()
        self._backlog = Backlog()
        self._inbound: InboundSocket | None = None
        self._outbound: dict[bytes, OutboundSocket] = {}

    def listen(self, endpoint: str, prepare: PrepareSocket | None = None) -> str:
        again = self._inbound is not None  # not unbound before: libzmq removes the path some time after that
        made = self._inbound or InboundSocket(
            self._context, self._on_message, self._queue, self._largest, self._backlog
        )
        self._inbound = made
        try:
            if prepare is not None:
                prepare(made.socket)
            if not endpoint.startswith(IPC):
                set_heartbeat(made.socket)
                self._backlog.limit = UNASKED_LIMIT
                monitor = made.watch_connections()
                self._reactor.watch(int(monitor.getsockopt(zmq.FD)), made.check_connections)
            use_family(made.socket, endpoint, listening=True)
            made.socket.bind(_address(endpoint))
            made.check_connections()  # from now on its descriptor tells
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from None
        if not again:
            self._reactor.watch(made.fileno(), lambda: None)  # it only ends the wait
            self._reactor.poll_socket(made)
        bound: Any = made.socket.getsockopt(zmq.LAST_ENDPOINT)
        return os.fsdecode(bound).removesuffix("\0")

    def connect(
        self,
        endpoint: str,
        name: bytes,
        on_frames: FramesHandler,
        on_connected: Action,
        capacity: int,
        prepare: PrepareSocket | None = None,
    ) -> None:
        backlog = None if endpoint.startswith(IPC) else self._backlog

        def make() -> Dealer:
            return Dealer(self._context, endpoint, self._queue, capacity, prepare=prepare, backlog=backlog, once=True)

        peer = self._outbound[name] = OutboundSocket(self._reactor, make, on_frames, on_connected)
        self._reactor.poll_socket(peer)
        peer.watch()

    def send(self, name: bytes, parts: Sequence[Buffer]) -> int:
        peer = self._outbound.get(name)
        if peer is not None:
            return peer.send(parts)
        return self._inbound.send(name, parts) if self._inbound is not None else UNREACHABLE

    def close(self, linger: float) -> None:
        """Also waits for sockets that others made in the context, such as that of an authenticator, to be closed."""
        for peer in self._outbound.values():
            peer.close(linger)
        if self._inbound is not None:
            self._inbound.close(linger)
        self._backlog.close()
        self._context.term()


class LibzmqRouter(Reactor):
    """See ``transport.Router``."""

    def __init__(self, on_message: MessageHandler, *, queue: int = 1000, largest: int = LARGEST) -> None:
        """``queue``: messages that are kept for one peer; ``largest``: bytes of the largest frame of a peer that
        connects."""
        super().__init__()
        self._sockets = Sockets(self, on_message, queue, largest)
        self.send_parts = self._sockets.send
        self.listen = self._sockets.listen
        self.connect = self._sockets.connect

    def send(self, name: bytes, data: bytes) -> int:
        return self._sockets.send(name, (data,))

    def trust(self, name: bytes, trusted: bool = True) -> None:
        """libzmq reads from all peers alike."""

    def close(self, linger: float = 0.0) -> None:
        self._sockets.close(linger)
        self.close_epolls()
