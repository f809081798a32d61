"""Serves sources at an endpoint until a signal comes: the socket, keys, signals, the end in order."""

from __future__ import annotations

import logging
import os
import signal
import socket as sockets
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

import zmq

from postcopy_protocol.curve_keys import KeyPair
from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.return_path import RESIDENT, features_at
from postcopy_protocol.runtime_paths import SOCKET_PATH_BYTES
from postcopy_protocol.sizes import format_size
from postcopy_protocol.source_conversation import Offer
from postcopy_wire.factory import open_router
from postcopy_wire.transport import GoneHandler, MessageHandler, Router, chosen_transport

from .authenticator import Authenticator, protect
from .call_queue import CallQueue
from .connection import SEND_QUEUE
from .loop import Feed, Loop
from .readers import Readers
from .source import PageSource, offer_of

MAX_MESSAGE = 1 << 16  # bytes of a message that a supervisor may send; the connection is ended for more
_LINGER = 0.5  # seconds in which answers may still be sent at the end

log = logging.getLogger(__name__)


class Ended(BaseException):
    """Raised by the handler of a signal that ends the loop."""


def serve(
    sources: Iterable[PageSource],
    listen: str,
    *,
    curve: KeyPair | None = None,
    allow: Sequence[bytes] = (),
    plain_tcp: bool = False,
    identity: str = "",
    readers: int = 4,
    read_timeout: float = 30.0,
    transport: str | None = None,
    feed: Feed | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT (from the main thread), or forever.

    ``listen``: ``ipc:///PATH`` or ``tcp://HOST:PORT``; tcp needs ``curve`` (this source's key pair) and ``allow`` (the
    public keys of supervisors), or ``plain_tcp``. A read that takes longer than ``read_timeout`` seconds is lost;
    ``readers`` threads read. ``transport``: ``native`` or ``libzmq`` (default: ``$POSTCOPY_TRANSPORT``, else native).
    ``feed`` runs in the thread of the loop (see ``loop.Feed``).

    Raises BadInput for what cannot be served, PostcopyError for an endpoint where it cannot listen.

    Example::

        serve([FileSource("ram0", "weights.bin")], "ipc:///run/weights")
    """
    check_endpoint(listen, curve, allow, plain_tcp)
    known: dict[str, tuple[PageSource, Offer]] = {}
    for source in sources:
        offer = offer_of(source, identity)
        if offer.name in known:
            raise BadInput(f"the name {offer.name} is used twice: every block needs a name of its own")
        known[offer.name] = (source, offer)
    if not known:
        raise BadInput("there is nothing to serve: name a source")
    endpoint = Endpoint(listen, transport or chosen_transport(None, os.environ), curve, allow)
    with _signals(), endpoint, CallQueue() as calls, suppress(Ended):
        loop = Loop(known, endpoint.open, calls, Readers(readers, read_timeout), (*features_at(listen), RESIDENT), feed)
        log.info("ready: %s at %s", ", ".join(_described(offer) for _, offer in known.values()), endpoint.shown)
        loop.run()
    log.info("ended")


def check_endpoint(listen: str, curve: KeyPair | None, allow: Sequence[bytes], plain_tcp: bool) -> None:
    """Raises BadInput for an endpoint that is not valid, or open to any program that reaches it."""
    scheme, _, place = listen.partition("://")
    if scheme == "ipc":
        if not place.startswith("/"):
            raise BadInput(f"{listen!r}: the socket of an ipc endpoint is an absolute path, ipc:///PATH")
        if len(os.fsencode(place)) > SOCKET_PATH_BYTES:
            raise BadInput(f"{listen!r} is too long: a socket path may have {SOCKET_PATH_BYTES} bytes")
    elif scheme != "tcp" or ":" not in place:
        raise BadInput(f"{listen!r} is no endpoint: write ipc:///PATH or tcp://HOST:PORT")
    elif not _is_port(place.rpartition(":")[2]):
        raise BadInput(f"{listen!r}: write tcp://HOST:PORT with a port up to 65535 (0 or *: one that is free)")
    elif curve is None and not plain_tcp:
        raise BadInput(
            f"{listen}: any program that reaches it could read everything; give --curve-secret and --allow-key "
            "(make keys with postcopy keygen), or say --plain-tcp"
        )
    if curve is not None and plain_tcp:
        raise BadInput("--plain-tcp and --curve-secret exclude each other")
    if (curve is None) != (not allow):
        raise BadInput("--curve-secret and --allow-key belong together: which supervisors may connect, and our own key")


def _is_port(text: str) -> bool:
    return text == "*" or (text.isascii() and text.isdigit() and int(text) < 1 << 16)


class Endpoint:
    """Where a source listens; a context manager that closes the router and removes the socket file."""

    def __init__(self, listen: str, transport: str, curve: KeyPair | None, allow: Sequence[bytes]) -> None:
        self.shown = listen  # the endpoint as it was bound: a tcp port may have been chosen
        self._listen = listen
        self._transport = transport
        self._curve = curve
        self._allow = allow
        self._stack = ExitStack()

    def open(self, on_message: MessageHandler, on_gone: GoneHandler) -> Router:
        """Listen. Raises PostcopyError."""
        router = open_router(
            self._transport, on_message, on_gone, queue=SEND_QUEUE, largest=MAX_MESSAGE, newcomers=True
        )
        self._stack.callback(router.close, _LINGER)
        path = self._listen.removeprefix("ipc://") if self._listen.startswith("ipc://") else ""
        if path:
            refuse_second(path)
            self._stack.callback(_unlink, path)
        before = os.umask(0o077)  # an ipc socket gets the mode that the umask leaves
        try:
            if path:
                _unlink(path)
            self.shown = router.listen(self._listen, self._protect if self._curve is not None else None)
        except OSError as error:
            raise PostcopyError(f"cannot listen at {self._listen}: {error.strerror}") from None
        finally:
            os.umask(before)
        return router

    def _protect(self, socket: zmq.Socket[bytes]) -> None:
        assert self._curve is not None
        Authenticator(socket.context, self._allow).open()
        protect(socket, self._curve)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _unlink(path: str) -> None:
    """Remove a socket file at which no program listens."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def refuse_second(path: str) -> None:
    """Only the socket file of a program that has ended may be removed. Raises PostcopyError."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return
    raise PostcopyError(f"another program listens at ipc://{path}: end it, or choose another endpoint")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise Ended in the main thread; in another thread they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Ended:  # before the loop, or after it
        log.info("ended")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    # Only once: a second signal must not disturb the end that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Ended


def _described(offer: Offer) -> str:
    return f"{offer.name} ({format_size(offer.size)}, {offer.identity})"
