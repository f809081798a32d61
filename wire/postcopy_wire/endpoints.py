"""Sockets of endpoints: ``ipc://PATH`` and ``tcp://HOST:PORT``. No call here waits, not even for a name server."""

from __future__ import annotations

import errno
import socket
import threading
from contextlib import suppress
from typing import Any

from .addresses import host_and_port
from .transport import IPC, TCP

SILENT_SECONDS = 20  # over a network: a peer that acknowledges nothing for so long is gone
BACKLOG = 4096  # the kernel's own limit, net.core.somaxconn, is as high
_PROBE_SECONDS = 5
_STREAM = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
_MOST_PORT = 65535

Place = tuple[int, Any]
"""A family of sockets, and an address in it."""


def listening_socket(endpoint: str) -> tuple[socket.socket, str]:
    """A socket that listens there, and the endpoint as it was bound. Raises OSError."""
    family, address = _unix(endpoint) or _resolved(endpoint, socket.AI_PASSIVE)
    every = family != socket.AF_UNIX and host_and_port(endpoint)[0] == "*"
    if every and (both := _both_families(address[1])) is not None:
        return both, f"{TCP}*:{both.getsockname()[1]}"
    listener = socket.socket(family, _STREAM)
    try:
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener, endpoint if family == socket.AF_UNIX else _shown(listener.getsockname())
    except OSError:
        listener.close()
        raise


def _both_families(port: int) -> socket.socket | None:
    """A listening socket for IPv6 and IPv4; None on a machine without IPv6. Raises OSError."""
    try:
        listener = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return None
        raise
    except ValueError:  # no dual stack
        return None
    listener.setblocking(False)
    return listener


def prepare_connection(connection: socket.socket) -> None:
    """Options of a connection: short messages go at once, and a peer that has vanished from the network is noticed."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _PROBE_SECONDS),
        (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
        (socket.TCP_KEEPCNT, SILENT_SECONDS // _PROBE_SECONDS - 1),
        (socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Target:
    """An endpoint that is connected to, again and again. A thread looks up the name of a host, each time again, because
    its address may change."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._place = _unix(endpoint)
        self._numeric = self._place is not None
        with suppress(OSError):
            if self._place is None:
                self._place, self._numeric = _resolved(endpoint, socket.AI_NUMERICHOST), True
        self._search: threading.Thread | None = None

    def connect(self) -> socket.socket:
        """A socket that is connected, or is about to be. Raises OSError; BlockingIOError: the address is not known
        yet."""
        family, address = self._found()
        connection = socket.socket(family, _STREAM)
        try:
            prepare_connection(connection)
            with suppress(*((BlockingIOError,) if family != socket.AF_UNIX else ())):
                connection.connect(address)
        except OSError:
            connection.close()
            raise
        return connection

    def _found(self) -> Place:
        place = self._place
        if place is None:
            if self._search is None or not self._search.is_alive():
                self._search = threading.Thread(target=self._look_up, name="resolver", daemon=True)
                self._search.start()
            raise BlockingIOError(f"{self._endpoint}: the address is looked up")
        if not self._numeric:
            self._place = None
        return place

    def _look_up(self) -> None:
        with suppress(OSError):  # the next connect tries again
            self._place = _resolved(self._endpoint, 0)


def _unix(endpoint: str) -> Place | None:
    return (socket.AF_UNIX, endpoint.removeprefix(IPC)) if endpoint.startswith(IPC) else None


def _resolved(endpoint: str, flags: int) -> Place:
    """Of a tcp endpoint; a host of ``*`` is every address. Raises OSError."""
    host, port = host_and_port(endpoint)
    if port == "*":
        port = "0"
    if not port.isdecimal() or int(port) > _MOST_PORT:
        raise OSError(errno.EINVAL, f"{port!r} is no port: write a number up to {_MOST_PORT}")
    host = "0.0.0.0" if host == "*" else host
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=flags)
    # Of a name IPv4 first: a program that listens on IPv4 only does not answer at the other address.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, address


def _shown(address: Any) -> str:
    host, port = address[:2]
    return f"{TCP}[{host}]:{port}" if ":" in host else f"{TCP}{host}:{port}"
