"""One virtual machine whose memory is copied from a block, from its first word to its end."""

from __future__ import annotations

import os
from contextlib import suppress

from postcopy_kernel import process
from postcopy_kernel.descriptors import close_all
from postcopy_protocol.firecracker import check_regions

from ..vhost_user.attach_side import BackEndSession
from .listener import Newcomer


class Machine:
    """A client of kind ``vm``. The userfaultfd is handed to the supervisor and closed here: while any process holds it,
    the memory of a machine that has died may stay. Closes what ``newcomer`` holds, also when it raises.

    Raises PostcopyError (no supervisor, no such block, refused) and BadMessage (regions that do not fit the block)."""

    def __init__(self, newcomer: Newcomer, directory: str, block: str, name: str, timeout: float) -> None:
        self.pid = newcomer.peer.pid
        self.pidfd = newcomer.pidfd
        self.size = sum(region.size for region in newcomer.regions)
        self.name = name or f"firecracker-{self.pid}"
        session = None
        try:
            session = BackEndSession(directory, self.name, newcomer.userfaultfd, self.pidfd, timeout, kind="vm")
            opened = session.open(block)
            try:
                check_regions(newcomer.regions, opened.size, opened.page_size)
                for region in newcomer.regions:
                    session.announce(opened.number, region.address, region.size, region.offset)
            finally:
                opened.close()
        except BaseException:
            close_all((self.pidfd,))
            if session is not None:
                session.close()
            raise
        finally:
            os.close(newcomer.userfaultfd)
        self.session = session

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
