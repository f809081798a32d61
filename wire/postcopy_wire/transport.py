"""The interface of both transports: a ``Router`` for one thread, a ``Channel`` for one worker.

``native`` (router.py, channel.py) sends and receives on its own sockets: a message is one system call. ``libzmq``
(libzmq.py) does the same with pyzmq sockets; libzmq passes each message through a thread of its own, which costs some
twenty system calls. So ``native`` is the default. ``factory.py`` makes what a setting asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from postcopy_protocol.errors import BadInput
from postcopy_protocol.zmtp import Buffer, Message

if TYPE_CHECKING:
    import zmq

NATIVE, LIBZMQ = "native", "libzmq"
TRANSPORTS = (NATIVE, LIBZMQ)
VARIABLE = "POSTCOPY_TRANSPORT"
IPC, TCP = "ipc://", "tcp://"

SENT, FULL, UNREACHABLE = 1, 0, -1
"""Result of a send: accepted; not accepted, because the peer has not read for long; no such peer is connected.
Plain integers, because each fault compares some."""


def chosen_transport(option: str | None, environment: Mapping[str, str]) -> str:
    """The transport that a command line asks for, else ``$POSTCOPY_TRANSPORT``, else native. Raises BadInput."""
    chosen = option or environment.get(VARIABLE) or NATIVE
    if chosen not in TRANSPORTS:
        raise BadInput(f"{VARIABLE}={chosen!r} is no transport: write {' or '.join(TRANSPORTS)}")
    return chosen


Action = Callable[[], object]  # called in the thread of the router
MessageHandler = Callable[[bytes, Message], object]
"""Receives the routing id and the message of a peer that connected to the router. It must not raise."""

FramesHandler = Callable[[list[memoryview]], object]
"""Receives the frames of a message from a peer that the router connected to. The views are valid until it returns.
It must not raise."""
GoneHandler = Callable[[bytes], object]
"""Receives the routing id of a peer that connected and is gone. libzmq does not report it: there only a send finds
out, or the peer's silence."""


def ignore_gone(name: bytes) -> None:
    """A ``GoneHandler`` for a router whose owner does not need to know."""


PrepareSocket = Callable[["zmq.Socket[bytes]"], object]
"""Sets options of a libzmq socket, such as CURVE keys, before it is bound or connected."""


class Router(Protocol):
    """A ROUTER, and the one epoll of its thread. No send ever blocks. Usually ``NativeRouter``: ``turn`` calls
    ``Inbound.act`` or ``Outbound.act`` of the connection that has a message."""

    def listen(self, endpoint: str, prepare: PrepareSocket | None = None) -> str:
        """Accept peers at an endpoint; returns it as it was bound (a tcp port may have been chosen). A second
        call, for the same ipc endpoint, is for one whose path was removed. Raises OSError."""

    def connect(
        self,
        endpoint: str,
        name: bytes,
        on_frames: FramesHandler,
        on_connected: Action,
        capacity: int,
        prepare: PrepareSocket | None = None,
    ) -> None:
        """Connect to an endpoint, and again whenever the connection ends. ``name``: the peer's routing id here, which
        no other peer can take; ``on_connected`` is called after each connect; ``capacity``: bytes of the peer's largest
        message, headers of its frames included."""

    def watch(self, fd: int, act: Action) -> None:
        """Call ``act`` in ``turn`` when the descriptor is readable."""

    def forget(self, fd: int) -> None:
        """Undo ``watch``; to be called before the descriptor is closed."""

    def call_later(self, seconds: float, act: Action) -> None:
        """Call ``act`` in ``turn`` after this time."""

    def turn(self, seconds: float = -1) -> None:
        """Wait for events, at most ``seconds`` (below 0: no limit), and handle them."""

    def waiting(self) -> bool:
        """Would ``turn`` find an event without waiting?"""

    def send(self, name: bytes, data: bytes) -> int:
        """Send a message of one frame: SENT, FULL or UNREACHABLE."""

    def send_parts(self, name: bytes, parts: Sequence[Buffer]) -> int:
        """Send a message of these frames."""

    def trust(self, name: bytes, trusted: bool = True) -> None:
        """A peer that connected is wanted here, or is a newcomer: newcomers get a small share of the thread's time.
        libzmq makes no difference."""

    def close(self, linger: float = 0.0) -> None:
        """Close all connections; what is not sent after ``linger`` seconds is dropped."""


class Channel(Protocol):
    """A worker's connection to the supervisor's router, usually ``NativeChannel``. Any thread sends, one receives, no
    send blocks. Each connection begins with the worker's hello. The supervisor answers it with an empty Wake where
    pages may be waited for, so messages that a broken connection lost need not be kept: they are asked for again."""

    @property
    def connected(self) -> bool:
        """May messages be sent?"""

    @property
    def retry_in(self) -> float:
        """Seconds until the next ``connect`` is useful."""

    def holds(self) -> bool:
        """Are there messages that the connection has not accepted yet?"""

    def fileno(self) -> int:
        """A descriptor that is readable when ``receive_now`` has work; -1 while there is no connection."""

    def connect(self) -> bool:
        """Try to connect; never waits."""

    def send(self, data: bytes) -> None:
        """Send a message or hold it; never waits. Without a connection it is dropped."""

    def flush(self) -> None:
        """Send held messages, as far as the connection accepts them."""

    def receive(self) -> list[bytes]:
        """Wait for messages, and connect as often as needed meanwhile."""

    def receive_now(self) -> list[bytes]:
        """Messages that have arrived, for a thread that has polled ``fileno``."""

    def close(self) -> None:
        """Close the connection. Only tests do: a worker's process ends instead."""
