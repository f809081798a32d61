"""Starts a client's watcher, and gives it the regions that there are. See ``orphan_watcher``."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from postcopy_kernel.descriptors import close_all, send_message
from postcopy_kernel.process import pidfd_exited

from . import orphan_watcher
from .attach_socket import AttachConnection
from .deadline import Deadline
from .errors import PostcopyError
from .orphan_watcher import CLIENT, FOREVER, INBOX, REGION, SERVED, UNMAP, USERFAULTFD

log = logging.getLogger("postcopy")

PLACES = INBOX - 1, INBOX, USERFAULTFD, CLIENT
_HIGH = 16  # duplicates are made from here on, so that none of them is at a place that another is to get
_PROGRAM = str(Path(orphan_watcher.__file__))
_left: list[int] = []  # pidfds of watchers that were left: children of ours, which are reaped when they have ended


class OrphanWatcher:
    """A running watcher of the process ``pid``, which ``pidfd`` is of. Raises OSError when it cannot be started."""

    def __init__(self, userfaultfd: int, pid: int, pidfd: int) -> None:
        """The program starts beside us: nothing waits for it."""
        _reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        high: list[int] = []
        try:
            with theirs:
                for fd in (ours.fileno(), theirs.fileno(), userfaultfd, pidfd):
                    high.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH))
                python = sys.executable or ""
                child = os.posix_spawn(
                    python,
                    [python, "-I", "-S", _PROGRAM, str(pid)],
                    os.environ,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                        (os.POSIX_SPAWN_DUP2, 0, 1),
                        *((os.POSIX_SPAWN_DUP2, fd, place) for fd, place in zip(high, PLACES, strict=True)),
                    ],
                    setsigmask=[],
                )
        except BaseException:
            ours.close()
            raise
        finally:
            close_all(high)
        self._owner, self._pidfd, self._socket = os.getpid(), os.pidfd_open(child), ours
        self._client = os.dup(pidfd)

    def be_served(self, timeout_ms: int, lifeline: int) -> None:
        """Give it a policy, and the lifeline of the service that has it."""
        self._send(SERVED.pack(b"S", min(timeout_ms, FOREVER)), (lifeline,))

    def add(
        self, block: int, client: int, address: int, length: int, page_size: int, received: int, offset: int = 0
    ) -> None:
        """A region is about to be attached; ``received``: descriptor of its received map."""
        self._send(REGION.pack(b"R", block, client, address, length, offset, page_size), (received,))

    def remove(self, address: int) -> None:
        """A region is unmapped."""
        self._send(UNMAP.pack(b"U", address), ())

    def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        try:
            send_message(self._socket, data, fds)
        except OSError as error:
            log.warning("the watcher of process %d does not listen: %s", os.getpid(), error)

    def close(self) -> None:
        """End the process, which holds a duplicate of the userfaultfd. In a forked child it is the parent's: only
        descriptors are closed."""
        self._socket.close()
        if os.getpid() == self._owner:
            with suppress(OSError):  # it was killed, and the program reaps all its children
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        close_all((self._pidfd, self._client))

    def leave(self) -> None:
        """Let the process watch on until its client has ended."""
        if pidfd_exited(self._client):
            return self.close()
        self._socket.close()
        os.close(self._client)
        _left.append(self._pidfd)
        _reap()


def _reap() -> None:
    """Reap the left watchers that have ended."""
    for pidfd in list(_left):
        with suppress(ValueError):  # another thread was faster
            if pidfd_exited(pidfd):
                _left.remove(pidfd)
                with suppress(OSError):  # it is not our child: the program reaps all, or has forked
                    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
                os.close(pidfd)


def watch(
    connection: AttachConnection, watcher: OrphanWatcher | None, userfaultfd: int, pid: int, pidfd: int, until: Deadline
) -> OrphanWatcher | None:
    """A watcher (the one that there is) where the supervisor's policy for orphans wants one. An older supervisor has no
    policy, and where no watcher can be started missing pages wait, as under the other policy."""
    try:
        timeout_ms, lifeline = connection.ask_orphan_policy(until)
        if lifeline >= 0:
            try:
                watcher = watcher or OrphanWatcher(userfaultfd, pid, pidfd)
                watcher.be_served(timeout_ms, lifeline)
            finally:
                os.close(lifeline)
    except OSError as error:
        text = "process %d has no watcher (%s): its missing pages wait if every process of the service dies"
        log.warning(text, pid, error)
    except PostcopyError as error:
        if not connection.usable:
            raise
        log.debug("the supervisor has no policy for orphans: %s", error)
    return watcher
