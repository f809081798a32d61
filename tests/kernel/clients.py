"""A client in a process of its own: maps a block, hands over its userfaultfd, reads and writes when told to."""

from __future__ import annotations

import os
import socket

from postcopy_kernel import memory
from postcopy_kernel.descriptors import receive_message, send_message
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import Feature, RegisterMode, Userfaultfd, open_userfaultfd
from tests.kernel.touching import NO_FEATURES, Child, fetch, next_fault, store


class Client(Child):
    """``kind``: ``shared`` and ``private`` map ``fd`` (private: through a read-only descriptor), ``anonymous`` its own
    memory. Registered by the parent as a supervisor does it: through the descriptor that came over the socket."""

    def __init__(
        self,
        fd: int,
        pages: int,
        kind: str = "shared",
        mode: RegisterMode = RegisterMode.MISSING,
        features: Feature = NO_FEATURES,
    ) -> None:
        self.length = pages * PAGE
        super().__init__(lambda sock: _serve(sock, fd, self.length, kind))
        received = receive_message(self.socket, wait=True)
        self.start = int(received.data)
        self.ufd = Userfaultfd(received.fds[0])
        self.ufd.handshake(features)
        self.ioctls = self.ufd.register(self.start, self.length, mode)

    def kill(self) -> None:
        super().kill()
        self.ufd.close()

    def page(self, number: int) -> int:
        return self.start + number * PAGE

    def begin(self, word: str, page: int, data: bytes = b"") -> None:
        """Say ``read``, ``write``, ``discard``, ``punch`` or ``fork``; :meth:`answer` has what came of it."""
        self.socket.send(b"%b %d %b" % (word.encode(), page, data))

    def answer(self) -> bytes:
        return self.socket.recv(PAGE)

    def do(self, word: str, page: int, data: bytes = b"") -> bytes:
        """The same for a page that is there."""
        self.begin(word, page, data)
        return self.answer()

    def fault(self, page: int, word: str = "read", data: bytes = b"") -> None:
        """Begin to touch a missing page, and see the message of it."""
        self.begin(word, page, data)
        assert next_fault(self.ufd).address == self.page(page)


def _serve(sock: socket.socket, fd: int, length: int, kind: str) -> None:
    mapping = _mapped(fd, length, kind)
    ufd = open_userfaultfd()
    send_message(sock, b"%d" % mapping.address, [ufd.fd], wait=True)
    while order := sock.recv(PAGE):
        word, number, data = order.split(b" ", 2)
        sock.send(_obey(mapping, word, int(number) * PAGE, data))


def _mapped(fd: int, length: int, kind: str) -> Mapping:
    if kind == "anonymous":
        return Mapping.anonymous(length)
    if kind == "shared":
        return Mapping.of(fd, length)
    read_only = memory.reopen(fd, writable=False)
    try:
        return Mapping.of(read_only, length, shared=False)
    finally:
        os.close(read_only)


def _obey(mapping: Mapping, word: bytes, offset: int, data: bytes) -> bytes:
    if word == b"write":
        store(mapping.address + offset, data)
    elif word == b"discard":
        mapping.advise(memory.DONTNEED, offset, PAGE)
    elif word == b"fork":
        return _fetch_in_a_fork(mapping.address + offset)
    elif word == b"punch":
        mapping.advise(memory.REMOVE, offset, PAGE)
    else:
        return fetch(mapping.address + offset, 4)
    return b"done"


def _fetch_in_a_fork(address: int) -> bytes:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, fetch(address, 4))
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    return os.read(reader, 4)
