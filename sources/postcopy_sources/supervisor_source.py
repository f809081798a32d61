"""A block of a running supervisor as a page source, to be served onward, perhaps to another machine.

It is an ordinary private client of that supervisor. A page that is marked received is read from the block at once.
For any other page the kernel is asked to populate our mapping: that faults, without the GIL, until the page is there.
Python never reads a missing page.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import TypeVar

from postcopy_kernel import descriptors
from postcopy_kernel.memory import DONTFORK, DONTNEED, POPULATE_READ, Mapping, advise
from postcopy_kernel.userfaultfd import Userfaultfd, open_userfaultfd
from postcopy_protocol.attach_conversation import AttachClient, Question, mapping_length
from postcopy_protocol.errors import NoSupervisor, PageLost, PostcopyError
from postcopy_protocol.messages import Message
from postcopy_protocol.received_map import RECEIVED
from postcopy_protocol.runtime_paths import check_owners, door_path

ANSWER_SECONDS = 30.0
EHWPOISON = 133
RECEIVED_BYTE = bytes((RECEIVED,))

Answer = TypeVar("Answer", bound=Message)


class SupervisorSource:
    """See PageSource. ``trust``: users whose supervisor is trusted, beside this one and root. Raises NoSupervisor when
    no supervisor serves in that runtime directory, and what stands for a refusal (NoSuchBlock, AttachDenied,
    PostcopyError)."""

    def __init__(self, directory: str, name: str, trust: frozenset[int] = frozenset()) -> None:
        self.name = name
        self._directory, self._trust = directory, trust
        self._conversation = AttachClient(directory)
        self._socket = self._connect()
        self._userfaultfd = self._offer_userfaultfd()
        opened, (self._memory, received) = self._ask(self._conversation.open_block(name, "private"))
        self.size, self.page_size, self._pages = opened.size, opened.page_size, opened.pages
        self._received = mmap.mmap(received, 0, prot=mmap.PROT_READ)
        os.close(received)
        length = mapping_length(opened)
        self._mapping = Mapping.of(self._memory, length, shared=False, inaccessible=True)
        self._mapping.advise(DONTFORK)
        self._ask(self._conversation.mapped(opened.block, self._mapping.address, length, 0))
        self._mapping.allow()
        self._reading = threading.Lock()

    def read_now(self, offset: int, length: int) -> bytes | None:
        """Read what is received already. Raises BlockingIOError for anything else."""
        self._check_received(offset, length)
        return os.pread(self._memory, length, offset)

    def read_into(self, offset: int, view: memoryview) -> bool:
        """As ``read_now``, into ``view``."""
        self._check_received(offset, len(view))
        if os.preadv(self._memory, (view,), offset) != len(view):
            raise OSError(errno.EIO, f"not {len(view)} bytes")
        return True

    def _check_received(self, offset: int, length: int) -> None:
        first, end = offset // self.page_size, -(-(offset + length) // self.page_size)
        if self._received[first:end] != RECEIVED_BYTE * (end - first):
            raise BlockingIOError

    def read(self, offset: int, length: int) -> bytes | None:
        """Wait for the pages, then read them. Raises PageLost."""
        whole = -(-length // self.page_size) * self.page_size
        with self._reading:  # one thread must not drop what another has just populated
            failed = advise(self._mapping.address + offset, whole, POPULATE_READ)
            self._mapping.advise(DONTNEED, offset, whole)  # our page tables and poison marks; the data stays
        if failed == EHWPOISON:
            raise PageLost(f"the supervisor in {self._directory} has lost it", block=self.name, offset=offset)
        if failed:
            raise OSError(failed, os.strerror(failed))
        data = os.pread(self._memory, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"{len(data)} bytes of {length}")
        return data

    def close(self) -> None:
        """Leave: the supervisor forgets the client when the connection ends."""
        self._mapping.close()
        self._received.close()
        os.close(self._memory)
        self._userfaultfd.close()
        self._socket.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Waits for room in the backlog; a connect with Python's timeout fails at once without it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", int(ANSWER_SECONDS), 0))
        try:
            path = door_path(self._directory)
            connection.connect(path)
            connection.settimeout(ANSWER_SECONDS)
            owners = descriptors.socket_owners(connection, path)
            check_owners(self._directory, owners, os.geteuid(), self._trust)
        except (OSError, PostcopyError) as error:
            connection.close()
            if isinstance(error, PostcopyError):
                raise
            raise NoSupervisor(f"no supervisor is running in {self._directory}: {error.strerror}") from None
        return connection

    def _offer_userfaultfd(self) -> Userfaultfd:
        _, fds = self._ask(self._conversation.hello(f"source {self.name}", "native"))
        try:
            userfaultfd = open_userfaultfd(device=fds[0] if fds else None)
        finally:
            descriptors.close_all(fds)
        self._ask(self._conversation.offer_userfaultfd(), (userfaultfd.fileno(),))
        return userfaultfd

    def _ask(self, question: Question[Answer], fds: tuple[int, ...] = ()) -> tuple[Answer, tuple[int, ...]]:
        """The answer and its descriptors."""
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may be waiting
                descriptors.send_message(self._socket, question.data, fds)
            while True:
                received = descriptors.receive_message(self._socket, wait=True)
                if not received.data:
                    raise NoSupervisor(f"the supervisor in {self._directory} closed the connection")
                try:
                    answer = self._conversation.on_message(received.data, len(received.fds))
                except BaseException:
                    descriptors.close_all(received.fds)
                    raise
                if isinstance(answer, question.answer):
                    return answer, received.fds
                descriptors.close_all(received.fds)
        except TimeoutError:
            raise NoSupervisor(f"the supervisor in {self._directory} does not answer") from None
