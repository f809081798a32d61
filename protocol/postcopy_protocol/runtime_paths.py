"""The runtime directory and the names in it, and what else a client takes from its environment.

The directory is 0711. ``door`` is 0666: SO_PEERCRED and the allow list decide who may attach. ``private/`` is 0700 and
protects the ZeroMQ socket and the lock, because the mode of an ipc socket depends on the umask.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .errors import AttachDenied, BadInput

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
RESCUE = "private/rescue"
"""Sub-directory with one file for each block and client: how to find them when every process of the service died."""

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


TRUST_UID = "POSTCOPY_TRUST_UID"
"""Environment variable: users, separated by commas, whose supervisors a client trusts beside its own and root's."""


def trusted_users(environ: Mapping[str, str]) -> frozenset[int]:
    """The users of TRUST_UID. Raises BadInput."""
    words = [word.strip() for word in environ.get(TRUST_UID, "").split(",") if word.strip()]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise BadInput(f"{TRUST_UID}={environ[TRUST_UID]}: write user ids, separated by commas")
    return frozenset(map(int, words))


CLIENT_NAME = "POSTCOPY_CLIENT_NAME"
"""Environment variable: what status, metrics and events call the clients that run with it."""
MAX_NAME = 64
"""Characters of a client's name."""


def client_name(explicit: str | None, environ: Mapping[str, str]) -> str:
    """The name of this client: ``explicit``, else from the environment, else empty. Raises BadInput."""
    where, name = ("name=", explicit) if explicit else (CLIENT_NAME + "=", environ.get(CLIENT_NAME, ""))
    if len(name) > MAX_NAME:
        raise BadInput(f"{where}{name[:MAX_NAME]!r}...: the name of a client has at most {MAX_NAME} characters")
    if not name.isprintable():  # it is shown on terminals
        raise BadInput(f"{where}{name!r}: the name of a client has no control characters")
    return name


def check_owners(directory: str, owners: Collection[int], own: int, trusted: Collection[int]) -> None:
    """Raise AttachDenied unless all ``owners`` of an attach socket may have this process's userfaultfd, and with it its
    memory: its own user, root, and users that it trusts."""
    for uid in sorted(owners):
        if uid not in (own, 0) and uid not in trusted:
            raise AttachDenied(
                f"the attach socket in {directory} is user {uid}'s, who could read and change this process's memory; "
                f"if you trust that user: --trust-uid {uid}, trust_uid={uid} or {TRUST_UID}={uid}"
            )


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
