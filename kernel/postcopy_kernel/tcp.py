"""Listening at a TCP address, which is looked up first: some are reached from other machines."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

BACKLOG = 64


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """An address at which a socket can be bound."""

    family: int
    kind: int
    place: tuple[Any, ...]

    @classmethod
    def of(cls, host: str, port: int) -> TcpAddress:
        """Look up a name or number. Raises OSError (gaierror)."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return cls(found[0], found[1], found[4])

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(str(self.place[0]).partition("%")[0]).is_loopback

    def listen(self) -> socket.socket:
        """A listening socket. Raises OSError."""
        listener = socket.socket(self.family, self.kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self.place)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
