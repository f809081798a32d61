"""tcp addresses: which family an endpoint needs, and whether its host name is known.

A libzmq socket speaks IPv4 only unless ZMQ_IPV6 is set. With it set, a host name gives the IPv6 address first, at which
a program that listens on IPv4 only does not answer."""

from __future__ import annotations

import socket
from typing import Any

import zmq

TCP = "tcp://"


def host_and_port(endpoint: str) -> tuple[str, str]:
    """``("::1", "7000")`` of ``tcp://[::1]:7000``."""
    host, _, port = endpoint.removeprefix(TCP).rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def use_family(channel: zmq.Socket[Any], endpoint: str, *, listening: bool = False) -> None:
    """Set up a socket for the family that its next endpoint needs. ``tcp://*`` listens on both."""
    if endpoint.startswith(TCP):
        host, _ = host_and_port(endpoint)
        channel.setsockopt(zmq.IPV6, int(host == "*" if listening and ":" not in host else _only_ipv6(host)))


def unknown_host(endpoint: str) -> str:
    """Why the host of an endpoint has no address, or an empty text. Waits for the name service."""
    if not endpoint.startswith(TCP):
        return ""
    host, _ = host_and_port(endpoint)
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"the host name {host} is not known ({getattr(error, 'strerror', None) or error})"
    return ""


def _only_ipv6(host: str) -> bool:
    if ":" in host:
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(family == socket.AF_INET6 for family, *_ in found)
