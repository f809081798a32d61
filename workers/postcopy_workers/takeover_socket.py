"""The socket where a new supervisor takes over: Unix SEQPACKET, in the private part of the runtime directory.

While there is a supervisor the custodian accepts no connection (the lock of the directory decides which process may be
one). Without one, a connection has a short time for its first message, which must be TakeOver. Several connections may
be pending at once, so that a silent one does not keep the others out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass

from postcopy_kernel import descriptors, log_queue
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import CustodianReady, TakeOver
from postcopy_protocol.runtime_paths import custodian_path

log = logging.getLogger("postcopy.custodian")

FIRST_MESSAGE_SECONDS = 2.0
MAX_PENDING = 8


@dataclass(frozen=True, slots=True)
class PendingConnection:
    """A connection without a message yet; ``until``: when it is closed."""

    connection: socket.socket
    until: float


class TakeoverSocket:
    """The listening socket and its pending connections."""

    def __init__(self, directory: str) -> None:
        """Bind, and replace a socket that an earlier custodian has left. Raises OSError."""
        self._path = custodian_path(directory)
        self._pending: dict[int, PendingConnection] = {}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        before = os.umask(0o177)
        try:
            self._listener.bind(self._path)
        finally:
            os.umask(before)
        self._inode = self._inode_now()
        self._listener.listen(8 * MAX_PENDING)

    def _inode_now(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def reachable(self) -> bool:
        """Can a supervisor find us? Not when another custodian has bound the path, or the socket has been removed."""
        return self._inode_now() == self._inode

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self, now: float) -> int:
        """Accept a connection: the descriptor to watch for its first message, or -1 when it is refused."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # the peer has left again
            return -1
        except OSError as error:
            log.error("cannot accept a connection: %s", error)
            time.sleep(0.05)  # no descriptor left: it stays in the backlog, and we must not spin
            return -1
        who = descriptors.peer_credentials(connection)
        if who.uid != os.geteuid() or len(self._pending) >= MAX_PENDING:
            what = "a connection of process %d of user %d is refused"
            log.warning(what, who.pid, who.uid, extra=log_queue.about("refused", f"user {who.uid}"))
            connection.close()
            return -1
        connection.setblocking(False)
        self._pending[connection.fileno()] = PendingConnection(connection, now + FIRST_MESSAGE_SECONDS)
        return connection.fileno()

    def is_pending(self, fd: int) -> bool:
        """Is this the descriptor of a pending connection?"""
        return fd in self._pending

    def read(self, fd: int) -> socket.socket | None:
        """Read the first message of a pending connection: the connection if it takes over, None if it was closed."""
        connection = self._pending.pop(fd).connection
        try:
            received = descriptors.receive_message(connection)
            descriptors.close_all(received.fds)
            if not received.data:
                raise BadMessage("it sent no message")
            message = decode(received.data, expect=(TakeOver,))
            if received.fds:
                raise BadMessage("descriptors came with it")
        except (OSError, BadMessage) as error:
            log.warning("a connection does not take over: %s", error)
            with contextlib.suppress(OSError):  # a supervisor of another version reads ours here
                descriptors.send_message(connection, encode(CustodianReady(os.getpid())))
            connection.close()
            return None
        assert isinstance(message, TakeOver)
        log.info("process %d takes over", message.pid)
        connection.setblocking(True)
        return connection

    def expired(self, now: float) -> list[int]:
        """Pending connections whose time is over: stop watching them, then ``close_pending``."""
        return [fd for fd, pending in self._pending.items() if now >= pending.until]

    def close_pending(self, fd: int) -> None:
        """Close a pending connection."""
        self._pending.pop(fd).connection.close()

    @property
    def pending(self) -> list[int]:
        """The descriptors of all pending connections."""
        return list(self._pending)

    def next_due(self) -> float | None:
        """When the next pending connection expires."""
        return min((pending.until for pending in self._pending.values()), default=None)

    def close(self) -> None:
        """Close all connections, and remove the socket unless another custodian has bound the path since."""
        for fd in self.pending:
            self.close_pending(fd)
        self._listener.close()
        if self.reachable:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
