"""Where a source listens: the check of what was typed, the socket, and its keys."""

from __future__ import annotations

import os
import socket as sockets
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from postcopy_protocol.curve_keys import KeyPair
from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.runtime_paths import SOCKET_PATH_BYTES
from postcopy_wire.factory import open_router
from postcopy_wire.transport import GoneHandler, MessageHandler, Router

if TYPE_CHECKING:
    import zmq

MAX_MESSAGE = 1 << 16  # bytes of a message that a supervisor may send; the connection is ended for more
_LINGER = 0.5  # seconds in which answers may still be sent at the end


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

    def __init__(self, listen: str, transport: str, curve: KeyPair | None, allow: Sequence[bytes], queue: int) -> None:
        """``queue``: messages that are kept for one peer."""
        self.shown = listen  # the endpoint as it was bound: a tcp port may have been chosen
        self._listen = listen
        self._transport = transport
        self._curve = curve
        self._queue = queue
        self._allow = allow
        self._stack = ExitStack()

    def open(self, on_message: MessageHandler, on_gone: GoneHandler) -> Router:
        """Listen. Raises PostcopyError."""
        router = open_router(
            self._transport, on_message, on_gone, queue=self._queue, largest=MAX_MESSAGE, newcomers=True
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
        from .authenticator import Authenticator, protect  # libzmq, which only keys need

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
