"""A block of a running supervisor as a page source: what it has received is served onward, to another machine perhaps.

An ordinary private client of that supervisor. A page that is marked received is read from the block at once; for any
other the kernel is told to populate our mapping, which faults, without the GIL, until the page is there. Python
never reads a missing page.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading

from postcopy_kernel import descriptors
from postcopy_kernel.memory import DONTFORK, DONTNEED, POPULATE_READ, Mapping, advise
from postcopy_kernel.userfaultfd import Userfaultfd, open_userfaultfd
from postcopy_protocol.attach_conversation import mapping_length
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import NoSupervisor, PageLost, PostcopyError
from postcopy_protocol.messages import (
    Attached,
    BlockOpened,
    Hello,
    Mapped,
    Message,
    OfferUserfaultfd,
    OpenBlock,
    Refused,
    UserfaultfdAccepted,
    Welcome,
)
from postcopy_protocol.received_map import RECEIVED
from postcopy_protocol.runtime_paths import door_path

ANSWER_SECONDS = 30.0
EHWPOISON = 133
RECEIVED_BYTE = bytes((RECEIVED,))


class SupervisorSource:
    """See PageSource. Raises NoSupervisor when nobody serves in that runtime directory, PostcopyError when refused."""

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self._directory = directory
        self._door = self._knock()
        self._userfaultfd = self._introduce()
        opened, (self._memory, received) = self._ask(OpenBlock(name, "private"), BlockOpened)
        assert isinstance(opened, BlockOpened)
        self.size, self.page_size, self._pages = opened.size, opened.page_size, opened.pages
        self._received = mmap.mmap(received, 0, prot=mmap.PROT_READ)
        os.close(received)
        length = mapping_length(opened)
        self._mapping = Mapping.of(self._memory, length, shared=False)
        self._mapping.advise(DONTFORK)
        self._ask(Mapped(opened.block, self._mapping.address, length, 0), Attached)
        self._reading = threading.Lock()

    def read_now(self, offset: int, length: int) -> bytes | None:
        """What is received already; BlockingIOError for anything else."""
        first, end = offset // self.page_size, -(-(offset + length) // self.page_size)
        if self._received[first:end] != RECEIVED_BYTE * (end - first):
            raise BlockingIOError
        return os.pread(self._memory, length, offset)

    def read_into(self, offset: int, view: memoryview) -> bool:
        """As ``read_now``, into ``view``."""
        first, end = offset // self.page_size, -(-(offset + len(view)) // self.page_size)
        if self._received[first:end] != RECEIVED_BYTE * (end - first):
            raise BlockingIOError
        if os.preadv(self._memory, (view,), offset) != len(view):
            raise OSError(errno.EIO, f"not {len(view)} bytes")
        return True

    def read(self, offset: int, length: int) -> bytes | None:
        """Let the pages come, then read them. Raises PageLost."""
        whole = -(-length // self.page_size) * self.page_size
        with self._reading:  # what one reader drops another may just have populated
            failed = advise(self._mapping.address + offset, whole, POPULATE_READ)
            self._mapping.advise(DONTNEED, offset, whole)  # our page tables, and marks of poison; the data stays
        if failed == EHWPOISON:
            raise PageLost(f"the supervisor in {self._directory} has lost it", block=self.name, offset=offset)
        if failed:
            raise OSError(failed, os.strerror(failed))
        data = os.pread(self._memory, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"{len(data)} bytes of {length}")
        return data

    def close(self) -> None:
        """Leave: the supervisor forgets us when the connection ends."""
        self._mapping.close()
        self._received.close()
        os.close(self._memory)
        self._userfaultfd.close()
        self._door.close()

    # --- the door -----------------------------------------------------------------------------------------------------

    def _knock(self) -> socket.socket:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.settimeout(ANSWER_SECONDS)
        try:
            door.connect(door_path(self._directory))
        except OSError as error:
            door.close()
            raise NoSupervisor(f"no supervisor in {self._directory}: {error.strerror}") from None
        return door

    def _introduce(self) -> Userfaultfd:
        _, fds = self._ask(Hello(f"source {self.name}", "native"), Welcome)
        try:
            userfaultfd = open_userfaultfd(device=fds[0] if fds else None)
        finally:
            descriptors.close_all(fds)
        self._ask(OfferUserfaultfd(), UserfaultfdAccepted, (userfaultfd.fileno(),))
        return userfaultfd

    def _ask(
        self, question: Message, answer: type[Message], fds: tuple[int, ...] = ()
    ) -> tuple[Message, tuple[int, ...]]:
        try:
            descriptors.send_message(self._door, encode(question), fds)
            heard = descriptors.receive_message(self._door, wait=True)
        except TimeoutError:
            raise NoSupervisor(f"the supervisor in {self._directory} does not answer") from None
        if not heard.data:
            raise NoSupervisor(f"the supervisor in {self._directory} closed the connection")
        message = decode(heard.data, expect=(answer, Refused))
        if isinstance(message, Refused):
            raise PostcopyError(f"the supervisor in {self._directory} refuses: {message.reason}")
        return message, heard.fds
