"""The libzmq transport: pyzmq sockets in the turns of one reactor, and a worker's channel.

Peers that connect to us share one ROUTER. Each peer that we connect to has a DEALER of its own, so no other peer can
take its name, and its socket monitor tells whether the connection stands. Two rules hold everywhere: nothing is sent
blocking, and EVENTS is read after sends and receives, because the descriptor of a libzmq socket is edge-triggered.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
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
    """A DEALER with one connection, which libzmq makes again whenever it ends, and a monitor that reports it."""

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
    ) -> None:
        """``backlog``: it watches the connection over a network."""
        self.connected = False
        self.link: Link | None = None
        self._backlog = backlog
        self._fd = -1
        self.socket: Socket = context.socket(zmq.DEALER)
        set_limits(self.socket, queue, largest)
        for option, value in (
            (zmq.IMMEDIATE, 1),  # what a connection had not sent when it ended is dropped
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
        self.monitor = self.socket.get_monitor_socket(_HANDSHAKE | _DISCONNECTED | _CONNECTED)
        self.send = frame_sender(self.socket)
        use_family(self.socket, endpoint)
        self.socket.connect(_address(endpoint))

    def new_connection(self) -> bool:
        """Read the monitor: has a connection been made since the last call? The newest event says what is now."""
        made = False
        while can_receive(self.monitor):
            event = recv_monitor_message(self.monitor)
            self.connected = made = event["event"] == _HANDSHAKE
            if self._backlog is not None and not made:
                self._watch(self._backlog, event["value"] if event["event"] == _CONNECTED else -1)
        if made:
            self.socket.get(_EVENTS)  # takes over the connection, so that a message can be sent at once
        return made

    def _watch(self, backlog: Backlog, fd: int) -> None:
        """This is its connection now; -1: it has none."""
        backlog.closed(self._fd)
        self._fd = fd
        if fd >= 0:
            backlog.opened(fd, self._added)
        self.link = backlog.links.get(fd)

    def close(self, linger: float = 0.0) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(int(linger * 1000))


class OutboundSocket:
    """A peer that the router connects to. See ``reactor.PolledSocket``."""

    def __init__(self, dealer: Dealer, on_frames: FramesHandler, on_connected: Action) -> None:
        self.dealer = dealer
        self._on_frames = on_frames
        self._on_connected = on_connected

    def fileno(self) -> int:
        return int(self.dealer.socket.getsockopt(zmq.FD))

    def waiting(self) -> bool:
        return can_receive(self.dealer.socket)

    def check_connection(self) -> None:
        """Handle what the monitor reports."""
        if self.dealer.new_connection():
            self._on_connected()

    def receive(self) -> None:
        """Handle messages, up to AT_ONCE of them."""
        socket = self.dealer.socket
        for _ in range(AT_ONCE):
            if not can_receive(socket):
                return
            frames, link = [socket.recv(0, False)], self.dealer.link
            while frames[-1].more:
                frame = socket.recv(0, False)
                if len(frames) <= MOST_PARTS:
                    frames.append(frame)
                else:  # no message has so many: it is refused without them
                    frames[-1] = frame
                    if link is not None:
                        link.took(len(frame.buffer))
            buffers = [frame.buffer for frame in frames]
            if link is not None:
                for buffer in buffers:
                    link.took(len(buffer))
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
        dealer = Dealer(self._context, endpoint, self._queue, capacity, prepare=prepare, backlog=backlog)
        peer = self._outbound[name] = OutboundSocket(dealer, on_frames, on_connected)
        self._reactor.poll_socket(peer)
        self._reactor.watch(int(dealer.monitor.getsockopt(zmq.FD)), peer.check_connection)
        peer.check_connection()

    def send(self, name: bytes, parts: Sequence[Buffer]) -> int:
        peer = self._outbound.get(name)
        if peer is not None:
            return peer.send(parts)
        return self._inbound.send(name, parts) if self._inbound is not None else UNREACHABLE

    def close(self, linger: float) -> None:
        """Also waits for sockets that others made in the context, such as that of an authenticator, to be closed."""
        for peer in self._outbound.values():
            peer.dealer.close(linger)
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


class LibzmqChannel:
    """See ``transport.Channel``. One lock guards the socket, because libzmq sockets belong to one thread at a time."""

    def __init__(self, endpoint: str, identity: bytes, hello: bytes, on_held: Action) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._hello = hello
        self._on_held = on_held
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._context: Context = zmq.Context()
        self._dealer: Dealer | None = None
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """A sender has found that a message arrived: its send consumed the edge that the receiver waits for."""
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self.connected = False

    @property
    def retry_in(self) -> float:
        """libzmq connects again in its own thread."""
        return RETRY_MOST_MS / 1000

    def holds(self) -> bool:
        return bool(self._outbox)

    def fileno(self) -> int:
        return self._epoll.fileno() if self._dealer is not None else -1

    def connect(self) -> bool:
        """Make the socket; from then on libzmq connects, and connects again."""
        with self._lock:
            if self._dealer is None:
                dealer = Dealer(self._context, self._endpoint, 1000, LARGEST, identity=self._identity)
                for socket in (dealer.socket, dealer.monitor):
                    self._epoll.register(int(socket.getsockopt(zmq.FD)), select.EPOLLIN)
                self._dealer = dealer
        return True

    def send(self, data: bytes) -> None:
        with self._lock:
            dealer = self._dealer
            if dealer is None or not self.connected:
                return
            if not self._outbox and self._accepted(dealer, data):
                self._wake_receiver(dealer)
                return
            self._outbox.append(data)
        self._on_held()

    def flush(self) -> None:
        with self._lock:
            if self._dealer is not None and self._outbox:
                self._flush(self._dealer)
                self._wake_receiver(self._dealer)

    def receive(self) -> list[bytes]:
        self.connect()
        while not (messages := self.receive_now()):
            self._epoll.poll()
        return messages

    def receive_now(self) -> list[bytes]:
        """Never waits."""
        with self._lock:
            dealer = self._dealer
            if dealer is None:
                return []
            self._clear_wakeup()
            if dealer.new_connection():
                self._outbox.clear()
                dealer.connected = self._accepted(dealer, self._hello)
            self.connected = dealer.connected
            self._flush(dealer)
            messages: list[bytes] = []
            while can_receive(dealer.socket):
                message = dealer.socket.recv()
                while dealer.socket.get(_RCVMORE):  # the last frame is the message
                    message = dealer.socket.recv()
                messages.append(message)
            return messages

    def close(self) -> None:
        if self._dealer is not None:
            self._dealer.close()
        self._context.term()
        self._epoll.close()
        os.close(self._wakeup)

    def _accepted(self, dealer: Dealer, data: bytes) -> bool:
        try:
            dealer.send(data, _LAST)
        except zmq.Again:
            return False
        return True

    def _flush(self, dealer: Dealer) -> None:
        while self._outbox and self._accepted(dealer, self._outbox[0]):
            self._outbox.popleft()

    def _wake_receiver(self, dealer: Dealer) -> None:
        if can_receive(dealer.socket):
            os.eventfd_write(self._wakeup, 1)

    def _clear_wakeup(self) -> None:
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:
            return
