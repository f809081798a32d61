"""The runtime directory and the names in it.

The directory is 0711. ``door`` is 0666: SO_PEERCRED and the allow list decide who may attach. ``private/`` is 0700 and
protects the ZeroMQ socket and the lock, because the mode of an ipc socket depends on the umask.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import BadInput

DOOR = "door"
"""The attach socket: Unix SEQPACKET, for clients."""
PRIVATE = "private"
"""Sub-directory for the supervisor's user only."""
ROUTER = "private/router"
"""ZeroMQ ipc socket of workers and of the command line."""
CUSTODIAN = "private/custodian"
"""Unix SEQPACKET socket of the custodian, where the next supervisor takes over."""
LOCK = "private/lock"
"""Locked (flock) by the one supervisor of this directory."""

SOCKET_PATH_BYTES = 107
"""``sun_path`` is 108 bytes with its terminating zero (unix(7))."""


def runtime_directory(explicit: str | None, environ: Mapping[str, str]) -> str:
    """The runtime directory: ``explicit``, else from the environment, else ``/run/postcopy``. Empty texts do not count.

    systemd sets ``RUNTIME_DIRECTORY``; of a list with colons the first is used.
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
    """Path of the attach socket. Raises BadInput if it is too long for a socket address."""
    return _socket_path(directory, DOOR)


def router_endpoint(directory: str) -> str:
    """ZeroMQ endpoint of the router, ``ipc://...``. Raises BadInput if its path is too long for a socket address."""
    return "ipc://" + _socket_path(directory, ROUTER)


def custodian_path(directory: str) -> str:
    """Path of the custodian's socket. Raises BadInput if it is too long for a socket address."""
    return _socket_path(directory, CUSTODIAN)


def _socket_path(directory: str, name: str) -> str:
    path = f"{directory}/{name}"
    length = len(path.encode("utf-8", "surrogateescape"))  # as in the file system
    if length > SOCKET_PATH_BYTES:
        raise BadInput(
            f"runtime directory {directory} is too long: the path of its socket {name} would have {length} bytes, "
            f"{SOCKET_PATH_BYTES} are possible; choose a shorter --runtime-dir"
        )
    return path
