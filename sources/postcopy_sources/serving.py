"""From sources and endpoints to a program that serves: sockets, keys, signals, the end in order."""

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
from postcopy_protocol.return_path import features_at
from postcopy_protocol.runtime_paths import SOCKET_PATH_BYTES
from postcopy_protocol.sizes import format_size
from postcopy_protocol.source_conversation import Offer
from postcopy_protocol.zmtp import Message as Words
from postcopy_wire.libzmq import Libzmq
from postcopy_wire.router import Router

from .authenticator import Authenticator, protect
from .connection import SEND_QUEUE
from .loop import Loop
from .mailbox import Mailbox
from .readers import Readers
from .source import PageSource, offer_of

MAX_MESSAGE = 1 << 16
"""Bytes of a frame that a supervisor may send; ZeroMQ hangs up on more."""
_LINGER = 0.5  # seconds: what is answered may still leave
_HEARTBEAT_MS, _SILENT_MS = 5000, 20000

log = logging.getLogger(__name__)


class Ended(BaseException):
    """A signal ends the loop."""


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
) -> None:
    """Serve until SIGTERM or SIGINT (from the main thread), or for ever. ``listen``: ``ipc:///PATH`` or
    ``tcp://HOST:PORT``; tcp takes ``curve`` (this source's key pair) and the public keys that it allows, or
    ``plain_tcp``. A read that takes longer than ``read_timeout`` seconds is lost; ``readers`` threads read.

    Raises BadInput for what cannot be served, PostcopyError for an endpoint that cannot be had.
    """
    judge_endpoint(listen, curve, allow, plain_tcp)
    known: dict[str, tuple[PageSource, Offer]] = {}
    for source in sources:
        offer = offer_of(source, identity)
        if offer.name in known:
            raise BadInput(f"the name {offer.name} is used twice: every block needs a name of its own")
        known[offer.name] = (source, offer)
    if not known:
        raise BadInput("there is nothing to serve: name a source")
    with _signals(), _router(listen, curve, allow) as (router, endpoint), Mailbox() as mailbox, suppress(Ended):
        loop = Loop(known, router, mailbox, Readers(readers, read_timeout), features_at(listen))
        log.info("ready: %s at %s", ", ".join(_described(offer) for _, offer in known.values()), endpoint)
        loop.run()
    log.info("ended")


def judge_endpoint(listen: str, curve: KeyPair | None, allow: Sequence[bytes], plain_tcp: bool) -> None:
    """Raises BadInput for an endpoint that is none, or that anybody could read who reaches it."""
    scheme, _, place = listen.partition("://")
    if scheme == "ipc":
        if not place.startswith("/"):
            raise BadInput(f"{listen!r}: the socket of an ipc endpoint is an absolute path, ipc:///PATH")
        if len(os.fsencode(place)) > SOCKET_PATH_BYTES:
            raise BadInput(f"{listen!r} is too long: a socket path may have {SOCKET_PATH_BYTES} bytes")
    elif scheme != "tcp" or ":" not in place:
        raise BadInput(f"{listen!r} is no endpoint: write ipc:///PATH or tcp://HOST:PORT")
    elif curve is None and not plain_tcp:
        raise BadInput(
            f"{listen}: anybody who reaches it could read everything; give --curve-secret and --allow-key "
            "(make keys with postcopy keygen), or say --plain-tcp"
        )
    if curve is not None and plain_tcp:
        raise BadInput("--plain-tcp and --curve-secret exclude each other")
    if (curve is None) != (not allow):
        raise BadInput("--curve-secret and --allow-key belong together: who may come in, and how we are known")


@contextmanager
def _router(listen: str, curve: KeyPair | None, allow: Sequence[bytes]) -> Iterator[tuple[Router, str]]:
    """Listening, with the endpoint as it came out (a port may have been chosen). Raises PostcopyError."""
    router = Router(lambda name, message: None, queue=SEND_QUEUE, largest=MAX_MESSAGE)
    path = listen.removeprefix("ipc://")
    with ExitStack() as stack:
        if path != listen and curve is None:
            stack.callback(router.close, _LINGER)
            _listen(router, path)
            stack.callback(_unlink, path)
            yield router, listen
            return
        context = stack.enter_context(_context())
        socket = context.socket(zmq.ROUTER)
        stack.callback(router.close, _LINGER)
        router.bridge(Libzmq(socket, lambda name, frames: router.heard(name, _words(frames))))
        if curve is not None:
            Authenticator(context, allow).open()
            protect(socket, curve)
        if path != listen:
            _refuse_second(path)
            stack.callback(_unlink, path)  # libzmq leaves it
        yield router, _bind(socket, listen)


def _words(frames: Sequence[memoryview]) -> Words:
    return bytes(frames[0]) if len(frames) == 1 else [bytes(frame) for frame in frames]


def _listen(router: Router, path: str) -> None:
    """Raises PostcopyError."""
    _refuse_second(path)
    before = os.umask(0o077)
    try:
        _unlink(path)
        router.listen(path)
    except OSError as error:
        raise PostcopyError(f"cannot listen at ipc://{path}: {error.strerror}") from None
    finally:
        os.umask(before)


def _unlink(path: str) -> None:
    """A socket that nobody listens at any more."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _bind(socket: zmq.Socket[bytes], listen: str) -> str:
    """The endpoint as it came out. Raises PostcopyError."""
    for option, value in (
        (zmq.LINGER, int(_LINGER * 1000)),
        (zmq.ROUTER_MANDATORY, 1),  # who is gone is noticed when it is answered
        (zmq.ROUTER_HANDOVER, 1),  # who comes back on a new connection is the same
        (zmq.SNDHWM, SEND_QUEUE),
        (zmq.RCVHWM, SEND_QUEUE),
        (zmq.MAXMSGSIZE, MAX_MESSAGE),
        (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, _SILENT_MS),
    ):
        socket.setsockopt(option, value)
    before = os.umask(0o077)  # an ipc socket has the rights that the umask leaves it
    try:
        socket.bind(listen)
    except zmq.ZMQError as error:
        raise PostcopyError(f"cannot listen at {listen}: {error.strerror}") from None
    finally:
        os.umask(before)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _refuse_second(path: str) -> None:
    """What a dead program left may be taken away, nobody else's."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return
    raise PostcopyError(f"another program listens at ipc://{path}: end it, or choose another endpoint")


@contextmanager
def _context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Ended by term(): zmq.Context as a context manager would close the gate's socket under its thread, and abort."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield context
    finally:
        context.term()


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise Ended in the main thread; elsewhere they are not ours."""
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
    # Once: a second one must not disturb the end that the first one began.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Ended


def _described(offer: Offer) -> str:
    return f"{offer.name} ({format_size(offer.size)}, {offer.identity})"
