"""Descriptors on the move: SCM_RIGHTS over Unix sockets, who is at the other end, eventfds, limits.

Whoever receives a descriptor owns it from that moment. A message that is refused here has its descriptors closed here:
none ever leaks by an error path.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import resource
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

MOST_DESCRIPTORS: Final = 253  # SCM_MAX_FD: a message that carries more is refused by the kernel (EINVAL)

_SO_PEERPIDFD: Final = 77  # Linux 6.5; no constant in Python
_SO_PEERGROUPS: Final = 59  # Linux 4.13; no constant in Python
_GROUP: Final = struct.Struct("=I")
_MOST_GROUPS: Final = 65536
_CLOSE_RANGE: Final = 436  # Linux 5.9, the same number on every architecture
_LAST_DESCRIPTOR: Final = 2**32 - 1
_CREDENTIALS: Final = struct.Struct("=iII")
_MSG_CMSG_CLOEXEC: Final = socket.MSG_CMSG_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class TruncatedMessage(OSError):
    """A message was longer than asked for, or its descriptors did not all fit. What came of them has been closed."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message. ``data`` is empty at the end of the connection; the receiver owns ``fds``."""

    data: bytes
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who connected, as the kernel recorded it then."""

    pid: int
    uid: int
    gid: int


def send_message(sock: socket.socket, data: bytes, fds: Sequence[int] = (), *, wait: bool = False) -> None:
    """Send ``data`` with duplicates of ``fds``, as one message of a SEQPACKET socket; never SIGPIPE.

    ``wait`` leaves it to the socket's own mode. Without it the call returns at once, on a socket that has no timeout
    (Python waits for a timeout before it calls). Raises BlockingIOError (full), ConnectionError (peer gone: EPIPE, or
    ECONNRESET if it left words unread), OSError EMSGSIZE (too long), EINVAL (more than MOST_DESCRIPTORS).
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
    sock.sendmsg([data], ancillary, flags)


def receive_message(sock: socket.socket, max_bytes: int = 65536, max_fds: int = 64, *, wait: bool = False) -> Received:
    """One message with its descriptors, each close-on-exec from its first instant.

    The end of the connection (a reset too) is ``Received(b"", ())``; an empty message is taken for it and loses its
    descriptors. A reset is told by the kernel once, and before the last words that the peer has sent: they come first.
    Raises BlockingIOError (nothing there), TruncatedMessage (too long, too many descriptors, or this process has no
    room for them: RLIMIT_NOFILE).
    """
    flags = _MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    room = max_bytes, socket.CMSG_SPACE(4 * max_fds), flags
    try:
        data, ancillary, seen, _ = sock.recvmsg(*room)
    except ConnectionResetError:  # the peer went away with words of ours unread
        data, ancillary, seen, _ = sock.recvmsg(*room)
    fds = _descriptors(ancillary)
    # CMSG_SPACE is padded: one descriptor more than asked for may fit.
    if seen & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > max_fds:
        close_all(fds)
        raise TruncatedMessage(errno.EMSGSIZE, f"a message of more than {max_bytes} bytes or {max_fds} descriptors")
    if not data:
        close_all(fds)
        return Received(b"", ())
    return Received(data, fds)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return tuple(fds)


def peer_credentials(sock: socket.socket) -> Credentials:
    """Pid, uid and gid of the process that connected (SO_PEERCRED). The pid alone identifies nobody: see peer_pidfd."""
    return Credentials(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def peer_groups(sock: socket.socket) -> frozenset[int]:
    """Supplementary groups that the process had when it connected (SO_PEERGROUPS). Its own group is in
    peer_credentials."""
    room = 64
    while True:
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, room * _GROUP.size)
        except OSError as error:
            if error.errno != errno.ERANGE or room > _MOST_GROUPS:
                raise
            room *= 4
            continue
        return frozenset(group for (group,) in _GROUP.iter_unpack(raw))


def peer_pidfd(sock: socket.socket) -> int:
    """A pidfd of the process that connected (close on exec).

    SO_PEERPIDFD (Linux 6.5) cannot be fooled by a reused pid. Before it: pidfd_open of SO_PEERCRED's pid, to be called
    while the connection stands. Raises OSError (ESRCH, EINVAL, ENODATA) when the process is gone.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(peer_credentials(sock).pid)
    return int.from_bytes(raw, "little", signed=True)


def create_eventfd() -> int:
    """An eventfd at 0: close on exec, not blocking."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def signal_eventfd(fd: int) -> None:
    """Make it readable for everybody who holds it."""
    with suppress(BlockingIOError):  # its counter is full: it is readable
        os.eventfd_write(fd, 1)


def close_all(fds: Iterable[int]) -> None:
    """Close every one of ``fds``; one that is not open does not keep the others from being closed."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def close_others(keep: set[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``: the first act of a forked child."""
    low = 3
    for fd in sorted(fd for fd in keep if fd >= low):
        _close_range(low, fd - 1)
        low = fd + 1
    _close_range(low, _LAST_DESCRIPTOR)


def _close_range(first: int, last: int) -> None:
    # Not os.closerange: a Python built without close_range(2) would try 2**31 numbers one by one.
    if first > last:
        return
    if _libc.syscall(ctypes.c_long(_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)) == 0:
        return
    close_all(fd for fd in map(int, os.listdir("/proc/self/fd")) if first <= fd <= last)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def count_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # the listing itself is one
