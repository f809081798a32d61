"""A ROUTER of ZeroMQ: one thread and one epoll for many connections over sockets of this machine, and for whatever else
that thread has to hear of. libzmq hands each message from a thread of its own to the caller's and back, with some
twenty system calls; here a message is one ``recv`` or one ``send``.

Peers come in at a socket path (``listen``), or are sought at one and sought again when they are gone (``connect``).
Who comes in is called by the routing id that it asks for, and whoever asks for the same later takes its place, as with
ROUTER_HANDOVER; the names of those that we sought are nobody else's. Nothing is sent waiting: what a socket does not
take is kept, up to ``queue`` messages. Where libzmq is wanted all the same (tcp, CURVE) it is a ``Bridge`` (libzmq.py).
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.zmtp import LARGEST, SHORT, Buffer, Message, PlacedReader, Reader, frame, framed, opening

SENT, FULL, NOBODY = 1, 0, -1
"""What became of a message: taken; not taken, since its peer has not listened for long; there is no such peer."""
READ = 1 << 14
"""Bytes that are read of a peer at once."""
AT_ONCE = 64
"""Descriptors that are looked at before others can be."""
KEPT_BYTES = 16 << 20
"""Of messages for one peer; one more is kept as long as there are fewer."""
STRANGERS = 1024
"""Connections that may be there without having said who they are."""
STRANGE_SECONDS = 30.0
"""... and how long."""
RETRY_SECONDS, RETRY_MOST = 0.01, 0.1
LINGER_STEP = 0.002
DEAF_SECONDS = 0.05
"""Between two tries to take somebody in while there is no descriptor."""
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_TOO_MANY_BUFFERS = 1000  # IOV_MAX is 1024

Heard = Callable[[bytes, Message], object]
"""Told who says what. It must not raise."""
HeardPlaced = Callable[[list[memoryview]], object]
"""Told the frames of a message; they hold until it returns. It must not raise."""


class Bridge(Protocol):
    """Peers of another kind: see libzmq.py."""

    def fileno(self) -> int: ...
    def waiting(self) -> bool: ...
    def hear(self) -> None: ...
    def send(self, name: bytes, parts: Sequence[Buffer]) -> int: ...
    def close(self) -> None: ...


class Router:
    """For one thread. ``heard`` and ``gone`` (told the name of a peer that came in and went) are called in ``turn``."""

    def __init__(
        self,
        heard: Heard = lambda name, message: None,
        gone: Callable[[bytes], object] = lambda name: None,
        *,
        queue: int = 1000,
        largest: int = LARGEST,
    ) -> None:
        """``queue``: messages that are kept for one peer; ``largest``: bytes of one that is taken."""
        self.heard = heard
        self.gone = gone
        self.queue = queue
        self.largest = largest
        self.epoll = select.epoll()
        self.peers: dict[bytes, Peer] = {}
        self.sought: dict[bytes, Outbound] = {}
        self.strangers: dict[Peer, float] = {}
        """Who has not said its name yet, and since when; the eldest first."""
        self.acts: dict[int, Callable[[int], object]] = {}
        """By descriptor: what is to be done when epoll says this of it."""
        self._later: list[tuple[float, Callable[[], object]]] = []
        self._bridge: Bridge | None = None
        self._listener: socket.socket | None = None
        self._names = 0

    # --- who is there -------------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Take in who connects to this socket, which is made. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setblocking(False)
            listener.bind(path)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self.watch(listener.fileno(), self._accept)

    def deliver(self, heard: Heard) -> None:
        """Give messages of peers that connect to ``heard`` from now on; called before the first ``turn``."""
        self.heard = heard

    def connect(self, path: str, name: bytes, heard: HeardPlaced, met: Callable[[], object], capacity: int) -> None:
        """Seek the peer at this socket, now and whenever it is gone. ``met`` is called each time that it is there;
        ``capacity``: bytes of its largest message, with what stands before its frames."""
        self.sought[name] = Outbound(self, path, heard, met, capacity)
        self.sought[name].seek()

    def watch(self, fd: int, act: Callable[[], object]) -> None:
        """In ``turn``, do this when the descriptor is readable."""
        self.register(fd, lambda mask: act())

    def bridge(self, bridge: Bridge) -> None:
        """Peers that are not ours are these."""
        self._bridge = bridge
        self.watch(bridge.fileno(), lambda: None)  # it says that something has happened; what, has to be asked

    def register(self, fd: int, act: Callable[[int], object]) -> None:
        self.epoll.register(fd, _READ)
        self.acts[fd] = act

    def forget(self, fd: int) -> None:
        """The opposite of ``watch``; before the descriptor is closed."""
        self.acts.pop(fd, None)
        with contextlib.suppress(OSError):
            self.epoll.unregister(fd)

    def close(self, linger: float = 0.0) -> None:
        """What is not sent after ``linger`` seconds is dropped."""
        until = time.monotonic() + linger
        lines: list[Connection] = [*self.peers.values(), *self.sought.values()]
        while any(line.outbox for line in lines) and time.monotonic() < until:
            time.sleep(LINGER_STEP)
            for line in lines:
                if line.outbox:
                    line.flush()
        for peer in [*self.peers.values(), *self.strangers, *self.sought.values()]:
            peer.drop()
        if self._listener is not None:
            self._listener.close()
        if self._bridge is not None:
            self._bridge.close()
        self.epoll.close()

    # --- hearing ------------------------------------------------------------------------------------------------------

    def turn(self, seconds: float = -1) -> None:
        """Wait until somebody is to be heard, no longer than ``seconds`` (below 0: for ever), and hear who is."""
        if self._later:
            seconds = self._come(seconds)
        if self._bridge is not None and self._bridge.waiting():
            seconds = 0
        acts = self.acts
        for fd, mask in self.epoll.poll(seconds, AT_ONCE):
            act = acts.get(fd)
            if act is not None:  # else one of those before it has closed it
                act(mask)
        if self._bridge is not None:
            self._bridge.hear()

    def waiting(self) -> bool:
        """Would ``turn`` hear somebody without waiting?"""
        return bool(self.epoll.poll(0, 1)) or (self._bridge is not None and self._bridge.waiting())

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        """In ``turn``, do this when so much time has passed."""
        self._later.append((time.monotonic() + seconds, act))

    def _come(self, seconds: float) -> float:
        """Do what is due; how long may be waited then."""
        now = time.monotonic()
        due = [act for at, act in self._later if at <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for act in due:
            act()
        soonest = min((at for at, _ in self._later), default=None)
        if soonest is None:
            return seconds
        wait = max(0.0, soonest - now)
        return wait if seconds < 0 else min(wait, seconds)

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, name: bytes, data: bytes) -> int:
        """A message of one frame: SENT, FULL or NOBODY."""
        line = self.peers.get(name) or self.sought.get(name)
        if line is not None:
            speaking, length = line.speaking, len(data)
            if speaking is None or line.outbox or length > 255:
                return line.send(frame(data))
            # What ``line.send`` does, in one step: each counts on the way of a fault.
            data = SHORT[length] + data
            try:
                sent = speaking.send(data, _NOW)
            except OSError:
                return line.send(data)
            return SENT if sent == length + 2 else line.keep(data[sent:])
        return self._bridge.send(name, (data,)) if self._bridge is not None else NOBODY

    def send_parts(self, name: bytes, parts: Sequence[Buffer]) -> int:
        """A message of these frames."""
        line = self.peers.get(name) or self.sought.get(name)
        if line is not None:
            buffers, speaking = framed(parts), line.speaking
            if speaking is None or line.outbox or len(buffers) != 2:
                return line.send_all(buffers)
            try:  # what ``line.send_all`` does, in one step
                sent = speaking.sendmsg(buffers, (), _NOW)
            except OSError:
                return line.send_all(buffers)
            whole = len(buffers[0]) + len(buffers[1])
            return SENT if sent == whole else line.keep(b"".join(buffers)[sent:])
        return self._bridge.send(name, parts) if self._bridge is not None else NOBODY

    # --- coming in ----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        for _ in range(AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor left: they wait in the backlog
                self.forget(listener.fileno())
                return self.later(DEAF_SECONDS, lambda: self.watch(listener.fileno(), self._accept))
            connection.setblocking(False)
            now = time.monotonic()
            while self.strangers:
                eldest, since = next(iter(self.strangers.items()))
                if len(self.strangers) < STRANGERS and now - since < STRANGE_SECONDS:
                    break
                eldest.drop()
            try:
                peer = Peer(self, connection)
            except OSError:  # the kernel watches no more descriptors for us
                connection.close()
                continue
            if peer.connection is not None:
                self.strangers[peer] = now

    def named(self, peer: Peer, wanted: bytes) -> None:
        """A stranger says who it is."""
        if wanted in self.sought:
            return peer.drop()
        if not wanted or wanted[0] == 0:  # RFC 28: such names are ours to give
            self._names += 1
            wanted = b"\0" + self._names.to_bytes(8, "big")
        before = self.peers.get(wanted)
        if before is not None:
            before.name = b""  # nobody is told that it is gone: it is here
            before.drop()
        del self.strangers[peer]
        peer.name = wanted
        self.peers[wanted] = peer


class Connection:
    """One connection, and what it has not taken yet."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.outbox: deque[bytes] = deque()
        self.kept = 0
        """Bytes of it."""
        self.connection: socket.socket | None = None
        self.speaking: socket.socket | None = None
        """The same, once messages may be sent."""

    def open(self, connection: socket.socket) -> None:
        """Raises OSError."""
        self.router.register(connection.fileno(), self.act)
        self.connection = connection

    def act(self, mask: int) -> None:
        """epoll says this of it."""
        raise NotImplementedError

    def drop(self) -> None:
        """It is of no use any more."""
        connection, self.connection, self.speaking = self.connection, None, None  # a signal may raise in what follows
        if connection is not None:
            try:
                self.router.forget(connection.fileno())
            finally:
                connection.close()
        self.outbox.clear()
        self.kept = 0

    def lost(self) -> None:
        """The other end is gone, or speaks nonsense."""
        self.drop()

    def send(self, data: bytes) -> int:
        """Bytes of a whole message."""
        connection = self.speaking
        if connection is None:
            return NOBODY
        if self.outbox:
            return self.keep(data)
        try:
            sent = connection.send(data, _NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost()
            return NOBODY
        return SENT if sent == len(data) else self.keep(data[sent:])

    def send_all(self, buffers: list[Buffer]) -> int:
        """The buffers of a whole message."""
        connection = self.speaking
        if connection is None:
            return NOBODY
        if self.outbox or len(buffers) > _TOO_MANY_BUFFERS:
            return FULL if self.full else self.send(b"".join(buffers))
        try:
            sent = connection.sendmsg(buffers, (), _NOW)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost()
            return NOBODY
        return SENT if sent == sum(map(len, buffers)) else self.keep(b"".join(buffers)[sent:])

    @property
    def full(self) -> bool:
        """Is no more kept?"""
        return len(self.outbox) >= self.router.queue or self.kept >= KEPT_BYTES

    def keep(self, data: bytes) -> int:
        """For later; copied, since its buffers may be used again."""
        if self.full:
            return FULL
        if not self.outbox:
            self._want(_READ | _WRITE)
        self.outbox.append(data)
        self.kept += len(data)
        return SENT

    def flush(self) -> None:
        """Send what is kept, as far as the socket takes it."""
        connection, outbox = self.connection, self.outbox
        while connection is not None and outbox:
            data = outbox[0]
            try:
                sent = connection.send(data, _NOW)
            except BlockingIOError:
                return
            except OSError:
                return self.lost()
            if sent < len(data):
                outbox[0] = data[sent:]
                self.kept -= sent
                return
            outbox.popleft()
            self.kept -= sent
        self._want(_READ)

    def _want(self, events: int) -> None:
        if self.connection is not None:
            self.router.epoll.modify(self.connection.fileno(), events)


class Peer(Connection):
    """Who has come in."""

    def __init__(self, router: Router, connection: socket.socket) -> None:
        super().__init__(router)
        self.name = b""
        self.reader = Reader(router.largest)
        self.open(connection)
        self.speaking = connection  # its router knows it by name only when messages may be sent
        self.send(opening(kind=b"ROUTER"))

    def act(self, mask: int) -> None:
        if mask & _WRITE:
            self.flush()
        connection = self.connection
        if mask == _WRITE or connection is None:
            return
        try:
            data = connection.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            if not data:
                return self.lost()
            messages = self.reader.feed(data)
        except BadMessage:
            return self.lost()
        if not self.name:
            if self.reader.ready:
                self.router.named(self, self.reader.identity)
            if not self.name:
                return
        heard, name = self.router.heard, self.name
        for message in messages:
            heard(name, message)
        if self.reader.answer:
            answer, self.reader.answer = self.reader.answer, b""
            self.send(answer)

    def drop(self) -> None:
        super().drop()
        self.router.strangers.pop(self, None)
        if self.name and self.router.peers.get(self.name) is self:
            del self.router.peers[self.name]
            self.router.gone(self.name)


class Outbound(Connection):
    """Who is sought at a path."""

    def __init__(self, router: Router, path: str, heard: HeardPlaced, met: Callable[[], object], capacity: int) -> None:
        super().__init__(router)
        self._path = path
        self._heard = heard
        self._met = met
        self._buffer = memoryview(mmap.mmap(-1, capacity))  # of which only what is used takes memory
        self._reader: PlacedReader
        self._retry = RETRY_SECONDS

    def seek(self) -> None:
        """Try to connect, and again later if it cannot be; never waits."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._seek_later)
            with contextlib.suppress(OSError):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                stack.callback(connection.close)
                connection.setblocking(False)
                connection.connect(self._path)
                connection.send(opening(), _NOW)  # a fresh socket has room for it
                self._reader = PlacedReader(self._buffer)
                self.open(connection)
                stack.pop_all()

    def act(self, mask: int) -> None:
        if mask & _WRITE:
            self.flush()
        connection, reader = self.connection, self._reader
        if mask == _WRITE or connection is None:
            return
        try:
            count = connection.recv_into(reader.room or reader.space())
        except BlockingIOError:
            return
        except OSError:
            count = 0
        try:
            if not count:
                return self.lost()
            messages = reader.filled(count)
        except BadMessage:
            return self.lost()
        if self.speaking is None:
            if not reader.ready:
                return
            self.speaking, self._retry = connection, RETRY_SECONDS
            self._met()
        for message in messages:
            self._heard(message)
        if answer := reader.take_answer():
            self.send(answer)

    def lost(self) -> None:
        super().lost()
        self._seek_later()

    def _seek_later(self) -> None:
        self.router.later(self._retry, self.seek)
        self._retry = min(2 * self._retry, RETRY_MOST)
