"""Where the house stands in the file system: the runtime directory and the names in it.

The directory is 0711 with ``door`` (0666, every caller judged by SO_PEERCRED) and ``private/`` (0700), which protects
the ZeroMQ socket and the lock: an ipc socket has only the rights that the umask leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import BadInput

DOOR = "door"
"""Unix SEQPACKET socket of the clients."""
PRIVATE = "private"
"""Sub-directory of the supervisor's own user."""
ROUTER = "private/router"
"""ZeroMQ ipc socket of workers and of the command line."""
CUSTODIAN = "private/custodian"
"""Unix SEQPACKET socket of the custodian: where the next supervisor takes over."""
LOCK = "private/lock"
"""Locked (flock) by the one supervisor of this directory."""

SOCKET_PATH_BYTES = 107
"""``sun_path`` is 108 bytes with its terminating zero (unix(7))."""


def runtime_directory(explicit: str | None, environ: Mapping[str, str]) -> str:
    """The runtime directory: the argument, else the environment's, else ``/run/postcopy``. An empty text is no text.

    ``RUNTIME_DIRECTORY`` is what systemd sets; several directories are a list with colons, the first is ours.
    """
    if explicit:
        return explicit
    if own := environ.get("POSTCOPY_RUNTIME_DIR"):
        return own
    if first := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        return first
    if session := environ.get("XDG_RUNTIME_DIR"):
        return f"{session}/postcopy"
    return "/run/postcopy"


def door_path(directory: str) -> str:
    """Path of the door's socket. Raises BadInput when it is too long for a socket address."""
    return _socket_path(directory, DOOR)


def router_endpoint(directory: str) -> str:
    """ZeroMQ endpoint of the router, ``ipc://...``. Raises BadInput when its path is too long for a socket address."""
    return "ipc://" + _socket_path(directory, ROUTER)


def custodian_path(directory: str) -> str:
    """Path of the custodian's socket. Raises BadInput when it is too long for a socket address."""
    return _socket_path(directory, CUSTODIAN)


def _socket_path(directory: str, name: str) -> str:
    path = f"{directory}/{name}"
    length = len(path.encode("utf-8", "surrogateescape"))  # as the file system takes it
    if length > SOCKET_PATH_BYTES:
        raise BadInput(
            f"runtime directory {directory} is too long: its socket {name} would have a path of {length} bytes, "
            f"a socket may have {SOCKET_PATH_BYTES}; choose a shorter --runtime-dir"
        )
    return path
