"""A vhost-user back-end that keeps every rule but one: ``fake_back_end.py SOCKET LIE ...``.

Serves one connection after the other on one thread, as real ones do: the first with the first lie, and so on; the last
lie stays. With the lie ``none`` it says true addresses; it never touches its memory unless that is the lie.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import sys
import time
from contextlib import suppress

from postcopy_kernel import memory
from postcopy_kernel.userfaultfd import open_userfaultfd

PAGE = 4096
GET_FEATURES, SET_MEM_TABLE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 1, 5, 15, 17
ADVISE, LISTEN, END = 28, 29, 30
FEATURES, PROTOCOL = 1 << 30 | 1 << 32, 0x109


class FakeBackEnd:
    """One connection."""

    def __init__(self, connection: socket.socket, lie: str) -> None:
        self.connection, self.lie = connection, lie
        self.userfaultfd = open_userfaultfd()
        self.userfaultfd.handshake()
        self.mappings: list[memory.Mapping] = []
        self.listening = False

    def serve(self) -> None:
        with suppress(OSError):  # whoever is lied to may hang up at any moment
            self.talk()
        if self.lie == "lets-go-late":
            time.sleep(3.0)
        for mapping in self.mappings:
            mapping.close()
        self.userfaultfd.close()
        self.connection.close()

    def talk(self) -> None:
        while True:
            heard = self.hear()
            if heard is None:
                break
            request, need, payload, fds = heard
            if self.lie == f"hang-up-at-{request}":
                break
            if self.lie == f"deaf-at-{request}":
                return self.ignore()
            self.answer(request, need, payload, fds)

    def ignore(self) -> None:
        """Say nothing any more, until nobody waits for it."""
        while self.connection.recv(4096):
            pass

    def hear(self) -> tuple[int, bool, bytes, list[int]] | None:
        data, ancillary, _, _ = self.connection.recvmsg(12, socket.CMSG_SPACE(64))
        if len(data) < 12:
            return None
        fds = array.array("i")
        for _, _, each in ancillary:
            fds.frombytes(each)
        request, flags, size = struct.unpack("=III", data)
        payload = b""
        while len(payload) < size:
            payload += self.connection.recv(size - len(payload))
        return request, bool(flags & 8), payload, list(fds)

    def say(self, request: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        version = 2 if self.lie == f"version-at-{request}" else 1
        size = 1 << 30 if self.lie == f"huge-at-{request}" else len(payload)
        flags = version | (0 if self.lie == f"no-reply-flag-at-{request}" else 4)
        request_said = 99 if self.lie == f"other-request-at-{request}" else request
        data = struct.pack("=III", request_said, flags, size) + payload
        if self.lie == f"short-at-{request}":
            data = struct.pack("=III", request, flags, max(0, len(payload) - 4)) + payload[:-4]
        if self.lie == f"long-at-{request}":
            data = struct.pack("=III", request, flags, len(payload) + 4) + payload + bytes(4)
        if self.lie == f"half-at-{request}":
            self.connection.send(data[:7])
            return self.ignore()
        if self.lie == f"early-at-{request}":  # an answer that belongs to a later question
            self.connection.send(struct.pack("=IIIQ", END, 5, 8, 0))
        if self.lie == f"gift-at-{request}":
            fds = (*fds, 0)
        if self.lie == f"many-gifts-at-{request}":
            fds = (0,) * 20
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if self.lie == f"slow-at-{request}":  # byte by byte, and late
            self.connection.sendmsg([data[:1]], rights)
            for at in range(1, len(data)):
                time.sleep(0.01)
                self.connection.send(data[at : at + 1])
            return
        self.connection.sendmsg([data], rights)
        if self.lie == f"twice-at-{request}":
            self.connection.sendmsg([data])

    def answer(self, request: int, need: bool, payload: bytes, fds: list[int]) -> None:
        numbers = {GET_FEATURES: FEATURES, GET_PROTOCOL_FEATURES: PROTOCOL, GET_QUEUE_NUM: 1}
        if request in numbers:
            self.say(request, struct.pack("=Q", numbers[request]))
        elif request == ADVISE:
            self.say(request, b"", self.offered())
        elif request == SET_MEM_TABLE and len(payload) == 8:
            self.acknowledged()
        elif request == SET_MEM_TABLE:
            self.table(payload, fds)
            if need:
                self.say(request, struct.pack("=Q", 0))
        elif request == LISTEN and self.lie == "rust-vmm":
            self.acknowledged()
            self.say(request, struct.pack("=Q", 0))
        elif need or request == END:
            self.say(request, struct.pack("=Q", 1 if self.lie == f"refuse-{request}" else 0))

    def offered(self) -> tuple[int, ...]:
        if self.lie == "no-userfaultfd":
            return (os.eventfd(0),)
        if self.lie == "unshaken":
            return (open_userfaultfd().fd,)
        return () if self.lie == "no-descriptor" else (self.userfaultfd.fd,)

    def table(self, payload: bytes, fds: list[int]) -> None:
        answer = bytearray(payload)
        for n, fd in enumerate(fds):
            guest, size, _, offset = struct.unpack_from("=QQQQ", payload, 8 + 32 * n)
            mapping = memory.Mapping.of(fd, size, offset=offset)
            os.close(fd)
            self.mappings.append(mapping)
            if self.lie == "echo":
                continue
            wrong = 16 * PAGE if self.lie == "wrong-address" else 0
            struct.pack_into("=QQQQ", answer, 8 + 32 * n, guest, size, mapping.address + wrong, offset)
        if self.lie == "populates":
            self.mappings[0].advise(memory.POPULATE_READ, 0, 3 * PAGE)
        if self.lie == "late-table":
            time.sleep(1.5)
        if self.lie == "maps-nothing":
            self.mappings.pop().close()
        if self.lie != "rust-vmm":
            self.say(SET_MEM_TABLE, bytes(answer))

    def acknowledged(self) -> None:
        for mapping in self.mappings:
            if self.lie == "registers-half":
                self.userfaultfd.register(mapping.address, mapping.length // PAGE // 2 * PAGE)
            elif self.lie != "registers-nothing":
                self.userfaultfd.register(mapping.address, mapping.length)
        if self.lie == "dies-registered":
            os._exit(9)


def main() -> None:
    path, *lies = sys.argv[1:]
    assert mmap.PAGESIZE == PAGE
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4)
        while True:
            FakeBackEnd(listener.accept()[0], lies[0]).serve()
            del lies[: len(lies) > 1]


if __name__ == "__main__":
    main()
