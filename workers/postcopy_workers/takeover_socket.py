"""Where a new supervisor finds the custodian: a Unix SEQPACKET socket in the private part of the runtime directory.

While a supervisor is there nobody is let in (the lock of the directory says who may be one); without one, whoever
connects has a short time for its first word, and it must be TakeOver. Several may try at once, so that one that says
nothing does not keep the others out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass

from postcopy_kernel import descriptors
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import CustodianReady, TakeOver
from postcopy_protocol.runtime_paths import custodian_path

log = logging.getLogger("postcopy.custodian")

FIRST_WORD_SECONDS = 2.0
MOST_VISITORS = 8


@dataclass(frozen=True, slots=True)
class PendingConnection:
    """Somebody who has connected and not yet spoken."""

    connection: socket.socket
    until: float


class TakeoverSocket:
    """The socket, and those who have connected to it."""

    def __init__(self, directory: str) -> None:
        """Binds, in the place of a socket that another custodian has left. Raises OSError."""
        self._path = custodian_path(directory)
        self._visitors: dict[int, PendingConnection] = {}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        before = os.umask(0o177)
        try:
            self._listener.bind(self._path)
        finally:
            os.umask(before)
        self._inode = self._found()
        self._listener.listen(8 * MOST_VISITORS)

    def _found(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def stands(self) -> bool:
        """Can anybody find us? Not when another custodian has taken the place, or the socket has been removed."""
        return self._found() == self._inode

    def fileno(self) -> int:
        return self._listener.fileno()

    def visit(self, now: float) -> int:
        """Somebody is at the socket: the descriptor to watch for its first word, or -1 when it is not let in."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # it has gone again
            return -1
        except OSError as error:
            log.error("a visitor cannot be let in: %s", error)
            time.sleep(0.05)  # no descriptor left: it waits in the backlog, and we do not spin over it
            return -1
        who = descriptors.peer_credentials(connection)
        if who.uid != os.geteuid() or len(self._visitors) >= MOST_VISITORS:
            log.warning("process %d of user %d is not let in", who.pid, who.uid)
            connection.close()
            return -1
        connection.setblocking(False)
        self._visitors[connection.fileno()] = PendingConnection(connection, now + FIRST_WORD_SECONDS)
        return connection.fileno()

    def waits(self, fd: int) -> bool:
        """Is this the descriptor of a visitor?"""
        return fd in self._visitors

    def hear(self, fd: int) -> socket.socket | None:
        """The visitor's first word: the connection if it takes over, None if it has been closed."""
        connection = self._visitors.pop(fd).connection
        try:
            received = descriptors.receive_message(connection)
            descriptors.close_all(received.fds)
            if not received.data:
                raise BadMessage("it said nothing")
            message = decode(received.data, expect=(TakeOver,))
            if received.fds:
                raise BadMessage("descriptors came with it")
        except (OSError, BadMessage) as error:
            log.warning("a visitor does not take over: %s", error)
            with contextlib.suppress(OSError):  # of another version, it learns ours from this
                descriptors.send_message(connection, encode(CustodianReady(os.getpid())))
            connection.close()
            return None
        assert isinstance(message, TakeOver)
        log.info("process %d takes over", message.pid)
        connection.setblocking(True)
        return connection

    def silent(self, now: float) -> list[int]:
        """Visitors whose time is over: not to be watched any more, and then shown out."""
        return [fd for fd, visitor in self._visitors.items() if now >= visitor.until]

    def show_out(self, fd: int) -> None:
        self._visitors.pop(fd).connection.close()

    @property
    def visitors(self) -> list[int]:
        return list(self._visitors)

    def next_due(self) -> float | None:
        return min((visitor.until for visitor in self._visitors.values()), default=None)

    def close(self) -> None:
        """Close all, and remove the socket unless it is another custodian's by now."""
        for fd in self.visitors:
            self.show_out(fd)
        self._listener.close()
        if self.stands:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
