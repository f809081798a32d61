"""One virtual machine whose memory is copied from a block, from its first word to its end."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from postcopy_kernel import process
from postcopy_kernel.descriptors import close_all
from postcopy_protocol.firecracker import check_regions

from ..deadline import Deadline
from ..errors import AttachDenied, NoSuchBlock, NoSupervisor
from ..vhost_user.attach_side import BackEndSession, SharedBlock
from .listener import Newcomer

RETRY_EVERY = 0.1
"""Seconds between two attempts to find a supervisor."""


class Machine:
    """A client of kind ``vm``. The userfaultfd is handed to the supervisor and closed here: while any process holds it,
    the memory of a machine that has died may stay. Closes what ``newcomer`` holds, also when it raises.

    ``mode`` is one of ``copied_map.OWN``. Raises PostcopyError (no supervisor, no such block, refused) and BadMessage
    (regions that do not fit the block)."""

    def __init__(self, newcomer: Newcomer, directory: str, block: str, name: str, timeout: float, mode: str) -> None:
        self.pid = newcomer.peer.pid
        self.pidfd = newcomer.pidfd
        self.size = sum(region.size for region in newcomer.regions)
        self.name, self.mode = name or f"firecracker-{self.pid}", mode
        try:
            self.session = self._attach(newcomer, directory, block, Deadline(timeout))
        except BaseException:
            close_all((self.pidfd,))
            raise
        finally:
            os.close(newcomer.userfaultfd)

    def _attach(self, newcomer: Newcomer, directory: str, block: str, deadline: Deadline) -> BackEndSession:
        """A machine that waits for its memory cannot come again. So where the supervisor dies meanwhile, the next one
        is waited for, and all is said once more: what that one knows already it only confirms."""
        fd, timeout = newcomer.userfaultfd, deadline.seconds or 0.0
        session: BackEndSession | None = None
        opened: SharedBlock | None = None
        try:
            while True:
                try:
                    if session is None:
                        session = BackEndSession(directory, self.name, fd, self.pidfd, timeout, "vm", self.mode)
                    elif not session.connection.usable:
                        session = _resumed(session)
                        continue
                    if opened is None:
                        opened = session.open(block)
                        opened.close()
                    check_regions(newcomer.regions, opened.size, opened.page_size)
                    for region in newcomer.regions:
                        session.announce(opened.number, region.address, region.size, region.offset)
                    return session
                except NoSuchBlock:
                    if opened is None:
                        raise
                    opened = None  # a successor that knows of no region: the block is opened once more
                except NoSupervisor:
                    if not deadline.remaining() or (session is not None and session.connection.ending):
                        raise
                    time.sleep(RETRY_EVERY)
        except BaseException:
            if session is not None:
                session.close()
            raise

    @property
    def ended(self) -> bool:
        return process.pidfd_exited(self.pidfd)

    @property
    def ending(self) -> str | None:
        """Why the supervisor has ended, if it has said so. Looks for a successor when it has died."""
        return self.session.ending

    def close(self) -> None:
        """Leave it to its worker: it is served as long as it lives."""
        close_all((self.pidfd,))
        with suppress(OSError):
            self.session.close()


def _resumed(session: BackEndSession) -> BackEndSession | None:
    """The session with the next supervisor; None: that one does not know this client, which begins from the start.
    Raises NoSupervisor."""
    try:
        session.resume()
    except AttachDenied:
        session.abandon()
        return None
    return session
