"""File descriptors: SCM_RIGHTS over Unix sockets, peer credentials, eventfds, limits.

The receiver of a descriptor owns it. If a message is refused here, its descriptors are closed here, so no error path
leaks one.

Example::

    send_message(ours, b"one", [fd])
    received = receive_message(theirs, wait=True)
    close_all(received.fds)
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

MOST_DESCRIPTORS: Final = 253  # SCM_MAX_FD: a message that carries more is refused by the kernel (EINVAL)

_SO_PEERPIDFD: Final = 77  # Linux 6.5; no constant in Python
_SO_PEERGROUPS: Final = 59  # Linux 4.13; no constant in Python
_GROUP: Final = struct.Struct("=I")
_MOST_GROUPS: Final = 65536
_CLOSE_RANGE: Final = 436  # Linux 5.9, the same number on every architecture
_LAST_DESCRIPTOR: Final = 2**32 - 1
_CREDENTIALS: Final = struct.Struct("=iII")
_MOST_UNREAD: Final = 1024  # messages; the kernel keeps net.unix.max_dgram_qlen of them, 10 by default
_SOL_SOCKET, _NOW = int(socket.SOL_SOCKET), int(socket.MSG_DONTWAIT)  # an "or" of enums costs 2 us
_PEEK, _CTRUNC = int(socket.MSG_PEEK) | _NOW, int(socket.MSG_CTRUNC)
_SEND, _SEND_NOW = int(socket.MSG_NOSIGNAL), int(socket.MSG_NOSIGNAL) | _NOW
_MSG_CMSG_CLOEXEC: Final = socket.MSG_CMSG_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class TruncatedMessage(OSError):
    """A message was too long, or its descriptors did not all fit. Those that came have been closed. ``errno`` is EMFILE
    when this process may not open that many."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message. ``data`` is empty at the end of the connection; the receiver owns ``fds``."""

    data: bytes
    fds: tuple[int, ...]


class Credentials(NamedTuple):
    """Credentials of a peer, as the kernel recorded them when it connected."""

    pid: int
    uid: int
    gid: int


def send_message(sock: socket.socket, data: bytes, fds: Sequence[int] = (), *, wait: bool = False) -> None:
    """Send ``data`` with duplicates of ``fds``, as one message of a SEQPACKET socket, without SIGPIPE.

    ``wait``: the socket's own mode decides whether to wait. Without it the call returns at once, if the socket has no
    timeout (Python waits for a timeout itself). Raises BlockingIOError (full), ConnectionError (peer gone: EPIPE, or
    ECONNRESET if it left messages unread), OSError EMSGSIZE (too long), EINVAL (more than MOST_DESCRIPTORS).
    """
    flags = _SEND if wait else _SEND_NOW
    if fds:
        sock.sendmsg([data], [(_SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)
    else:
        sock.send(data, flags)


def receive_message(
    sock: socket.socket,
    max_bytes: int = 65536,
    max_fds: int = 64,
    *,
    wait: bool = False,
    close: Callable[[tuple[int, ...]], object] | None = None,
) -> Received:
    """Receive one message with its descriptors, which are close-on-exec from the beginning.

    The end of the connection, a reset too, is ``Received(b"", ())``. An empty message looks the same; its descriptors
    are closed. The kernel reports a reset once, before the last messages of the peer; here those come first. Raises
    BlockingIOError (no message), TruncatedMessage (too long, too many descriptors, or RLIMIT_NOFILE reached).

    ``close``: closes what is not wanted (default: close_all). Give room for MOST_DESCRIPTORS where the peer is another
    user: the kernel itself closes those without room, which may wait for their maker (``closing``).
    """
    close = close or close_all
    flags = _MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    room = max_bytes, socket.CMSG_SPACE(4 * max_fds), flags
    try:
        data, ancillary, seen, _ = sock.recvmsg(*room)
    except ConnectionResetError:  # the peer closed the connection with messages of ours unread
        data, ancillary, seen, _ = sock.recvmsg(*room)
    fds = descriptors_in(ancillary)
    # CMSG_SPACE is padded: one descriptor more than max_fds may fit.
    if seen & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > max_fds:
        close(fds)
        if not seen & socket.MSG_TRUNC and len(fds) < max_fds:  # there was room: RLIMIT_NOFILE is reached
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise TruncatedMessage(
                errno.EMFILE, f"this process may have {limit} open files, and needs more: raise it with ulimit -n"
            )
        raise TruncatedMessage(errno.EMSGSIZE, f"a message of more than {max_bytes} bytes or {max_fds} descriptors")
    if not data:
        close(fds)
        return Received(b"", ())
    return Received(data, fds)


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    """The descriptors that came beside a message (SCM_RIGHTS), in order. The caller owns them."""
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return tuple(fds)


def peer_credentials(sock: socket.socket) -> Credentials:
    """Pid, uid and gid of the process that connected (SO_PEERCRED). The pid may be reused: see peer_pidfd."""
    return Credentials(*_CREDENTIALS.unpack(sock.getsockopt(_SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


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


def peer_pidfd(sock: socket.socket, at: float | None = None) -> int:
    """A pidfd of the process that connected (close on exec).

    Uses SO_PEERPIDFD (Linux 6.5), which a reused pid cannot deceive. On older kernels: pidfd_open of the pid of
    SO_PEERCRED; call it while the connection exists. A process that began after the connection was accepted (``at``,
    monotonic; default: now) has that pid by reuse. Raises OSError (ESRCH, EINVAL, ENODATA) if the process is gone.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        age = 0.0 if at is None else time.monotonic() - at
        return _pidfd_of_pid(peer_credentials(sock).pid, time.clock_gettime(time.CLOCK_BOOTTIME) - age)
    return int.from_bytes(raw, "little", signed=True)


def _pidfd_of_pid(pid: int, before: float) -> int:
    """A pidfd of the process ``pid``, which began before this time (seconds since boot). Raises OSError."""
    pidfd = os.pidfd_open(pid)  # EINVAL for 0: a process in another pid namespace
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            began = int(stat.read().rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        if began > before:
            raise ProcessLookupError(errno.ESRCH, "the pid belongs to a later process")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def socket_owners(sock: socket.socket, path: str) -> frozenset[int]:
    """The users behind a connected Unix socket: of the process that listens, and of the file ``path``. Raises
    OSError."""
    return frozenset((peer_credentials(sock).uid, os.stat(path).st_uid))


def has_ended(sock: socket.socket) -> bool:
    """Has the peer closed a connection in which nothing is left to be read? An empty message, which looks like that and
    may have descriptors, differs by its credentials. Never waits."""
    try:
        data, _, flags, _ = sock.recvmsg(1, 0, _PEEK)
        if data or flags & _CTRUNC:
            return False
        sock.setsockopt(_SOL_SOCKET, socket.SO_PASSCRED, 1)
        return not sock.recvmsg(1, 0, _PEEK)[2] & _CTRUNC
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def unread_bytes(sock: socket.socket) -> int:
    """How much memory what the peer has not read takes: 0, when it has read everything."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def close_drained(sock: socket.socket) -> bool:
    """Close a connection so that the peer reads all that was sent to it.

    A close with unread messages of the peer would be ECONNRESET there, in place of the last message. So the peer may
    send no more first (EPIPE), then what it has sent is dropped. Never waits: a connection with a descriptor in it is
    not closed (False), because that may wait for the descriptor's maker (``closing``).
    """
    try:
        sock.shutdown(socket.SHUT_RDWR)
        for _ in range(_MOST_UNREAD):
            data, _, flags, _ = sock.recvmsg(1, 0, _PEEK)
            if flags & _CTRUNC:
                return False
            if not data:
                break
            sock.recv(1, _NOW)
        if not has_ended(sock):
            return False
    except OSError:
        pass  # the peer has gone
    sock.close()
    return True


def create_eventfd() -> int:
    """Make an eventfd with the value 0: close on exec, not blocking."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def signal_eventfd(fd: int) -> None:
    """Make an eventfd readable for all its holders."""
    with suppress(BlockingIOError):  # its counter is full, so it is readable
        os.eventfd_write(fd, 1)


def close_all(fds: Iterable[int]) -> None:
    """Close all ``fds``. Errors are ignored."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def close_others(keep: set[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep`` (in a forked child)."""
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
    """Raise the soft limit of open descriptors to the hard one. Returns it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def count_descriptors() -> int:
    """Number of open descriptors of this process. Fast since Linux 6.2; before that /proc lists each of them."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1  # the listing itself is one
