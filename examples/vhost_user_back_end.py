"""A vhost-user back-end that takes part in post-copy: it reads guest memory before the memory has come.

    python examples/vhost_user_back_end.py /tmp/back-end.sock &
    postcopy attach vhost-user /tmp/back-end.sock --block ram0

It prints the SHA-256 of its memory and hangs up when the front-end has ended post-copy. There is no device.
"""

from __future__ import annotations

import array
import hashlib
import os
import socket
import struct
import sys
import threading

from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import Userfaultfd, open_userfaultfd

GET_FEATURES, SET_MEM_TABLE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, ADVISE, END = 1, 5, 15, 17, 28, 30
NUMBERS = {
    GET_FEATURES: 1 << 30 | 1 << 32,  # protocol features, VIRTIO_F_VERSION_1
    GET_PROTOCOL_FEATURES: 1 << 0 | 1 << 3 | 1 << 8,  # MQ, REPLY_ACK, PAGEFAULT
    GET_QUEUE_NUM: 1,
}
HEADER = struct.Struct("=III")  # request, flags, size of the payload
VERSION, REPLY, NEED_REPLY = 1, 4, 8


def print_digest(mappings: list[Mapping]) -> None:
    """Read all memory: each missing page stops this thread until a worker of postcopy has placed it."""
    digest = hashlib.sha256()
    for mapping in mappings:
        digest.update(mapping.view())  # without Python's lock, so the main thread goes on answering
    print("sha256", digest.hexdigest(), flush=True)


def map_regions(table: bytes, fds: list[int]) -> tuple[bytes, list[Mapping]]:
    """Map each region of the memory table; the answer is the table with the addresses of our mappings."""
    answer, mappings = bytearray(table), []
    for n, fd in enumerate(fds):
        guest, size, _, offset = struct.unpack_from("=4Q", table, 8 + 32 * n)
        mappings.append(Mapping.of(fd, size, offset=offset))
        os.close(fd)
        struct.pack_into("=4Q", answer, 8 + 32 * n, guest, size, mappings[n].address, offset)
    return bytes(answer), mappings


def serve(connection: socket.socket, ufd: Userfaultfd) -> None:
    reader, mappings, request = threading.Thread(), list[Mapping](), 0
    while request != END:
        data, rights, _, _ = connection.recvmsg(HEADER.size, socket.CMSG_SPACE(64), socket.MSG_WAITALL)
        request, flags, size = HEADER.unpack(data)
        payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
        answer, offered = bytes(8) if flags & NEED_REPLY or request == END else None, list[int]()
        if request in NUMBERS:
            answer = struct.pack("=Q", NUMBERS[request])
        elif request == ADVISE:  # the front-end gives our userfaultfd to the supervisor
            answer, offered = b"", [ufd.fd]
        elif request == SET_MEM_TABLE and len(payload) > 8:
            answer, mappings = map_regions(payload, list(array.array("i", rights[0][2])))
        elif request == SET_MEM_TABLE:  # acknowledged: a worker answers our faults from now on
            for mapping in mappings:
                ufd.register(mapping.address, mapping.length)
            reader = threading.Thread(target=print_digest, args=[mappings])
            reader.start()
        if answer is not None:
            socket.send_fds(connection, [HEADER.pack(request, VERSION | REPLY, len(answer)) + answer], offered)
    reader.join()


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as listener, open_userfaultfd() as userfaultfd:
        userfaultfd.handshake()
        listener.bind(sys.argv[1])
        listener.listen()
        serve(listener.accept()[0], userfaultfd)
