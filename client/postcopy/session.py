"""A client's session with the supervisor: one connection, one userfaultfd, and the regions attached through them.

The userfaultfd stays open here as long as a region exists. When its last reference closes, the kernel gives zero pages
to all waiters, and only this process can guarantee that a reference exists."""

from __future__ import annotations

import logging
import os
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from postcopy_kernel.descriptors import close_all
from postcopy_kernel.userfaultfd import DEVICE, Userfaultfd, open_userfaultfd
from postcopy_kernel.userfaultfd import UserfaultfdUnavailable as KernelUnavailable
from postcopy_protocol.runtime_paths import MAX_NAME

from .attach_socket import AttachConnection, OpenedBlock
from .deadline import Deadline
from .errors import AttachDenied, BadMessage, NoSupervisor, PostcopyError, UserfaultfdUnavailable, unavailable

if TYPE_CHECKING:
    from .watching import OrphanWatcher

log = logging.getLogger("postcopy")


class Session:
    """One conversation from Hello to Goodbye. It continues with a successor that takes over from a dead supervisor.
    Not thread-safe; see ``client.Client``."""

    def __init__(self, directory: str, deadline: Deadline, trust: frozenset[int] = frozenset(), name: str = "") -> None:
        """``name``: of this process in the status; by default the program's."""
        self._name = name or program_name()
        self.connection = AttachConnection(directory, deadline, trust)
        self.regions = 0
        self._resumable = True
        self._unmaps: list[tuple[int, int]] = []
        self._watcher: OrphanWatcher | None = None
        self._policy_asked = False
        self._userfaultfd: Userfaultfd | None = None
        try:
            device = self.connection.greet(self._name, "native", deadline)
            self._userfaultfd = _make_userfaultfd(device)
            self.connection.offer_userfaultfd(self._userfaultfd.fd, deadline)
        except BaseException:
            self.abandon()
            raise

    @property
    def usable(self) -> bool:
        """Whether the supervisor still answers requests on this connection."""
        self.connection.take_notices()
        return self.connection.usable and self.connection.ending is None

    def resume(self, deadline: Deadline) -> bool:
        """Continue with a supervisor that has taken over from a dead one, and serves our regions already.

        False: there is nothing to resume, or no supervisor that knows this client."""
        if not self._resumable or not self.regions or self.connection.ending is not None or not self.connection.hung_up:
            return False
        try:
            successor = self.connection.resume(self._name, "native", deadline)
        except NoSupervisor:  # not yet started
            return False
        except AttachDenied:  # not a successor of our supervisor: our regions stay with our worker
            self._resumable = False
            return False
        try:
            self._send_unmaps(successor, deadline)
        except BaseException:
            successor.close()
            raise
        self.connection.close()
        self.connection = successor
        self._policy_asked = False
        return True

    def open(self, name: str, mode: str, deadline: Deadline) -> OpenedBlock:
        """Open a block. The caller owns its descriptors."""
        return self.connection.open(name, mode, deadline)

    def watch(self, opened: OpenedBlock, address: int, deadline: Deadline) -> None:
        """Have a block watched that is about to be announced, where the supervisor's policy for orphans wants that."""
        if not self._policy_asked:
            self._policy_asked = True
            self._start_watcher(deadline)
        if self._watcher is not None:
            client, received = self.connection.client, opened.received
            self._watcher.add(opened.number, client, address, opened.length, opened.page_size, received)

    def _start_watcher(self, deadline: Deadline) -> None:
        from .watching import watch

        assert self._userfaultfd is not None
        pid = os.getpid()
        pidfd = os.pidfd_open(pid)
        try:
            self._watcher = watch(self.connection, self._watcher, self._userfaultfd.fd, pid, pidfd, deadline)
        finally:
            os.close(pidfd)

    def announce(self, number: int, address: int, length: int, deadline: Deadline) -> None:
        """Announce where a block is mapped. After that it may be touched."""
        self.connection.announce(number, address, length, 0, deadline)
        self.regions += 1

    def queue_unmap(self, number: int, address: int) -> None:
        """Note that a range is no longer touched. Until the supervisor knows, it refuses the range's addresses to the
        next block that is attached there."""
        self._unmaps.append((number, address))
        if self._watcher is not None:
            self._watcher.remove(address)

    def send_unmaps(self, deadline: Deadline) -> None:
        """Send the queued notes; after that the ranges may be unmapped. Those that fail are sent to a successor."""
        self._send_unmaps(self.connection, deadline)

    def _send_unmaps(self, connection: AttachConnection, deadline: Deadline) -> None:
        while self._unmaps:
            try:
                connection.unmap(*self._unmaps[0], deadline)
            except PostcopyError:
                if not connection.usable:
                    raise
            del self._unmaps[0]  # refused: the supervisor has received it before

    def wake(self, address: int, length: int) -> None:
        """Wake every thread that sleeps in this range; each of them faults again."""
        if self._userfaultfd is not None:
            with suppress(OSError):
                self._userfaultfd.wake(address, length)

    def end(self) -> None:
        """Send Goodbye and close, for a session without regions."""
        self.connection.say_goodbye()
        self.abandon()

    def abandon(self) -> None:
        """Close without a Goodbye: nothing is attached, or (in a forked child) the session belongs to the parent."""
        self._resumable = False
        self.connection.close()
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        if self._userfaultfd is not None:
            self._userfaultfd.close()
            self._userfaultfd = None


def program_name() -> str:
    """The program's name without its path, for the status."""
    path = sys.argv[0] if sys.argv else ""
    program = os.path.basename(os.path.dirname(path) if path.endswith("/__main__.py") else path)
    if program in ("", "-c", "-m"):
        program = "python"
    return program.encode("utf-8", "replace").decode()[:MAX_NAME]


def _make_userfaultfd(device: tuple[int, ...]) -> Userfaultfd:
    """A userfaultfd of this process: from the device that the supervisor sent, or by the process's own permission."""
    try:
        if device and not stat.S_ISCHR(os.fstat(device[0]).st_mode):
            raise BadMessage("the supervisor sent a descriptor that is no /dev/userfaultfd")
        return open_userfaultfd(device=device[0] if device else None)
    except KernelUnavailable as error:
        if not device:
            what = f"the supervisor has no open {DEVICE} to pass on, and this process has no right of its own: "
            raise UserfaultfdUnavailable(error.errno, what + (error.strerror or str(error))) from error
        raise unavailable(error) from error
    finally:
        close_all(device)
