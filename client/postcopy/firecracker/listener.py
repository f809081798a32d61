"""The socket that virtual machines connect to, and what each of them says first."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from postcopy_kernel.closing import Closer
from postcopy_kernel.descriptors import MOST_DESCRIPTORS, Credentials, peer_credentials, peer_pidfd, receive_message
from postcopy_kernel.userfaultfd import is_userfaultfd
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.firecracker import GuestRegion, RegionsReader

from ..errors import PostcopyError

HANDSHAKE_SECONDS = 10.0
"""For the list of regions and the userfaultfd, after the connection."""
MOST_WAITING = 64
"""Connections that have not said all yet. Beyond it the oldest is closed."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A virtual machine that has said all. Its holder closes ``userfaultfd`` and ``pidfd``."""

    peer: Credentials
    pidfd: int
    userfaultfd: int
    regions: tuple[GuestRegion, ...]
    path: str
    """The socket to which it has connected."""


class _Waiting:
    """A connection whose list of regions is not complete."""

    def __init__(self, connection: socket.socket, path: str, closer: Closer) -> None:
        self.connection, self.path, self._closer = connection, path, closer
        self.peer = peer_credentials(connection)
        self.pidfd = peer_pidfd(connection)
        self.until = time.monotonic() + HANDSHAKE_SECONDS
        self.userfaultfd = -1
        self._reader = RegionsReader()

    def read(self) -> Newcomer | None:
        """Take what has come. None: more is to come. Raises BadMessage and OSError."""
        received = receive_message(self.connection, max_fds=MOST_DESCRIPTORS, close=self._close)
        fds = list(received.fds)
        # The first is the userfaultfd; forks of Firecracker send more, which are not needed.
        if fds and self.userfaultfd < 0:
            self.userfaultfd = fds.pop(0)
        self._close(fds)
        if not received.data:
            raise BadMessage(self._reader.missing())
        regions = self._reader.feed(received.data)
        if regions is None:
            return None
        if self.userfaultfd < 0:
            raise BadMessage("no userfaultfd came with the list of regions")
        if not is_userfaultfd(self.userfaultfd):
            raise BadMessage("the descriptor beside the list of regions is no userfaultfd")
        newcomer = Newcomer(self.peer, self.pidfd, self.userfaultfd, regions, self.path)
        self.userfaultfd = self.pidfd = -1
        return newcomer

    def _close(self, fds: Sequence[int]) -> None:
        self._closer.close(self.peer.uid, *fds)

    def close(self) -> None:
        self._close([fd for fd in (self.userfaultfd, self.pidfd) if fd >= 0])
        self._closer.close(self.peer.uid, self.connection)


class Listener:
    """Listens at ``paths``: one socket for all machines, or several. ``owner``: user and group of the sockets (as for a
    jailer's); ``allow``: users whose virtual machines are accepted, beside root and this process's."""

    def __init__(
        self, paths: Sequence[str], owner: tuple[int, int] | None = None, allow: frozenset[int] = frozenset()
    ) -> None:
        self._allowed = allow | {0, os.geteuid()} | ({owner[0]} if owner else set())
        self._waiting: dict[int, _Waiting] = {}
        self._closer = Closer()
        self._poll = select.poll()
        self._sockets: dict[int, tuple[socket.socket, str]] = {}
        try:
            for path in paths:
                one = _listen(path, owner)
                self._sockets[one.fileno()] = one, path
                self._poll.register(one, select.POLLIN)
        except BaseException:
            self.close()
            raise

    def newcomers(self, seconds: float) -> Iterator[Newcomer | str]:
        """Virtual machines that have said all within ``seconds``, or, of one that is refused, why."""
        now = time.monotonic()
        if self._waiting:
            seconds = min([seconds, *(max(0.0, one.until - now) for one in self._waiting.values())])
        for fd, _ in self._poll.poll(seconds * 1000):
            if fd in self._sockets:
                yield from self._accept(*self._sockets[fd])
            elif fd in self._waiting:
                yield from self._read(fd)
        now = time.monotonic()
        for fd, one in list(self._waiting.items()):
            if now < one.until:
                continue
            yield from self._read(fd)  # it may have said all while another machine was attached, which can take long
            if self._waiting.get(fd) is one:
                yield self._refuse(fd, f"it has not said all after {HANDSHAKE_SECONDS:.0f} s")

    def _accept(self, listener: socket.socket, path: str) -> Iterator[str]:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # it stays in the backlog, and poll would report it at once
                yield f"a connection waits: {error.strerror}"
            return
        uid = peer_credentials(connection).uid
        if uid not in self._allowed:
            connection.close()
            yield f"a process of user {uid} may not connect (--allow-uid {uid} allows it)"
            return
        try:
            one = _Waiting(connection, path, self._closer)
        except OSError as error:
            connection.close()
            yield f"its process cannot be identified: {error.strerror}"
            return
        if len(self._waiting) >= MOST_WAITING:
            yield self._refuse(next(iter(self._waiting)), "it is silent while others connect")
        connection.setblocking(False)
        self._waiting[connection.fileno()] = one
        self._poll.register(connection, select.POLLIN)

    def _read(self, fd: int) -> Iterator[Newcomer | str]:
        one = self._waiting[fd]
        try:
            newcomer = one.read()
        except BlockingIOError:
            return
        except (BadMessage, OSError) as error:
            yield self._refuse(fd, str(error))
            return
        if newcomer is not None:
            self._forget(fd)
            yield newcomer

    def _refuse(self, fd: int, why: str) -> str:
        pid = self._waiting[fd].peer.pid
        self._forget(fd)
        return f"process {pid} is refused: {why}"

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._waiting.pop(fd).close()  # in another thread: until then its number is not used again

    def close(self) -> None:
        for fd in list(self._waiting):
            self._forget(fd)
        for listener, path in self._sockets.values():
            listener.close()
            with suppress(OSError):
                os.unlink(path)


def _listen(path: str, owner: tuple[int, int] | None) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _mask(0o177):
            listener.bind(path)
        if owner is not None:
            os.chown(path, *owner)
        listener.listen(socket.SOMAXCONN)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise PostcopyError(f"cannot listen at {path}: {error.strerror or error}") from None
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has ended."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise PostcopyError(f"cannot listen at {path}: it is there and no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise PostcopyError(f"cannot listen at {path}: {error.strerror or error}") from None
    else:
        raise PostcopyError(f"cannot listen at {path}: another process does")


@contextmanager
def _mask(bits: int) -> Iterator[None]:
    before = os.umask(bits)
    try:
        yield
    finally:
        os.umask(before)
