"""The listener and the main thread both forget connections: either may be first, at any moment."""

from __future__ import annotations

import select
import socket
from types import SimpleNamespace
from typing import Any, cast

from postcopy_supervisor.listener import Listener


class ClosedMeanwhile:
    """A socket that the other thread closes right after its descriptor was looked up."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        fd = self._connection.fileno()
        self._connection.close()
        return fd


def test_a_connection_that_is_closed_while_it_is_forgotten() -> None:
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    with theirs, select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        listener: Any = SimpleNamespace(_connections={fd: (ours, 0)}, _clients_epoll=epoll)
        Listener.forget_connection(listener, cast(socket.socket, ClosedMeanwhile(ours)))
        assert not listener._connections
        Listener.forget_connection(listener, ours)
