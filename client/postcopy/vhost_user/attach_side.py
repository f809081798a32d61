"""The attach conversation of a program that speaks for another process: that one's userfaultfd, blocks, addresses."""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass

from postcopy_kernel.address_space import pid_of
from postcopy_kernel.descriptors import close_all
from postcopy_kernel.memory import Mapping, data_runs
from postcopy_protocol.geometry import PAGE_4K

from ..attach_socket import AttachConnection
from ..deadline import Deadline
from ..errors import PostcopyError
from ..watching import OrphanWatcher, watch

RESUME_EVERY = 1.0
"""Seconds between two attempts to reach the successor of a dead supervisor."""


@dataclass(frozen=True, slots=True)
class SharedBlock:
    """A block opened for a back-end: its memory (a descriptor for the back-end) and its received map. The memory is
    never touched here."""

    number: int
    name: str
    size: int
    page_size: int
    length: int
    memory: int
    received: Mapping

    @property
    def file(self) -> tuple[int, int]:
        """Device and inode of the memory: identifies it in the back-end's maps."""
        facts = os.fstat(self.memory)
        return facts.st_dev, facts.st_ino

    def unexpected_pages(self) -> int:
        """Number of pages that are present although no part of the service has placed, or is placing, them."""
        if self.page_size != PAGE_4K:
            return 0  # hugetlb reports its holes as data
        marks = self.received.view()
        try:
            return sum(
                bytes(marks[first // PAGE_4K : last // PAGE_4K]).count(0)
                for first, last in data_runs(self.memory, 0, self.length)
            )
        finally:
            marks.release()

    def marks(self) -> bytes:
        """A copy of the received map: one byte a page, 2 is received."""
        with self.received.view(self.length // self.page_size) as view:
            return bytes(view)

    def mark(self, page: int) -> int:
        """The mark of one page: 0 is missing."""
        with self.received.view() as view:
            return view[page]

    def touched(self) -> list[int]:
        """Pages that the service has placed or is placing."""
        return [page for page, mark in enumerate(self.marks()) if mark]

    def close(self) -> None:
        os.close(self.memory)
        self.received.close()


class BackEndSession:
    """A client whose memory is that of another process: a back-end, or (``kind``) a ``vm``."""

    def __init__(
        self,
        directory: str,
        name: str,
        userfaultfd: int,
        pidfd: int,
        timeout: float,
        kind: str = "vhost-user",
        mode: str = "shared",
    ) -> None:
        self._kind, self._mode = kind, mode
        self.timeout = timeout
        self.name = name
        self._resume_at = 0.0
        self._watcher: OrphanWatcher | None = None
        self._copied: list[int] = []  # copied maps: a rescue finds them here
        self._maps: dict[int, tuple[int, int]] = {}  # of what is watched: block, its page size and received map
        self.connection = AttachConnection(directory, Deadline(timeout))
        try:
            close_all(self.connection.greet(name, kind, Deadline(timeout)))
            self.connection.offer_back_end(userfaultfd, pidfd, Deadline(timeout))
            self._watcher = watch(self.connection, None, userfaultfd, pid_of(pidfd), pidfd, Deadline(timeout))
        except BaseException:
            self.connection.close()
            raise

    @property
    def client(self) -> int:
        """The number of this client in the status."""
        return self.connection.client

    def close(self) -> None:
        """Leave the other process to its worker, and to its watcher."""
        self.connection.close()
        if self._watcher is not None:
            self._watcher.leave()
        self._forget_watcher()

    def _forget_watcher(self) -> None:
        self._watcher = None
        close_all((*self._copied, *(fd for _, fd in self._maps.values())))
        self._copied.clear()
        self._maps.clear()

    def open(self, name: str) -> SharedBlock:
        """Open a block. Raises NoSuchBlock, and the exceptions of other refusals."""
        opened = self.connection.open(name, self._mode, Deadline(self.timeout))
        try:
            marks = Mapping.of(opened.received, -(-opened.pages // mmap.PAGESIZE) * mmap.PAGESIZE, writable=False)
        except BaseException:
            opened.close()
            raise
        self._copied += [opened.copied] if opened.copied >= 0 else []
        if self._watcher is not None and opened.number not in self._maps:
            self._maps[opened.number] = opened.page_size, opened.received
        else:
            os.close(opened.received)
        return SharedBlock(opened.number, name, opened.size, opened.page_size, opened.length, opened.memory, marks)

    def announce(self, block: int, address: int, length: int, offset: int) -> None:
        """Announce where the back-end has mapped a block. After that a worker resolves its faults."""
        if self._watcher is not None:
            page_size, received = self._maps[block]
            self._watcher.add(block, self.client, address, length, page_size, received, offset)
        self.connection.announce(block, address, length, offset, Deadline(self.timeout))

    @property
    def released(self) -> set[int]:
        """Numbers of the blocks that are complete."""
        self._take_notices()
        return self.connection.released

    @property
    def ending(self) -> str | None:
        """Why the supervisor has ended, if it gave a reason."""
        self._take_notices()
        return self.connection.ending

    def _take_notices(self) -> None:
        """Read notices. When the supervisor has died, look for a successor, which knows our back-end by its number."""
        self.connection.take_notices()
        if self.connection.usable or self.connection.ending is not None or time.monotonic() < self._resume_at:
            return
        self._resume_at = time.monotonic() + RESUME_EVERY
        with suppress(PostcopyError, OSError):
            self.resume()

    def resume(self) -> None:
        """Go on with the supervisor that has taken over. Raises NoSupervisor (none yet), AttachDenied (it does not know
        this client)."""
        successor = self.connection.resume(self.name, self._kind, Deadline(self.timeout))
        self.connection.close()
        self.connection = successor

    def leave(self) -> None:
        """Say Goodbye: the back-end no longer touches the memory."""
        self.connection.say_goodbye()
        self.abandon()

    def abandon(self) -> None:
        """End, with the watcher: it knows this client's number, by which the next session's workers are not seen."""
        self.connection.close()
        if self._watcher is not None:
            self._watcher.close()
        self._forget_watcher()
