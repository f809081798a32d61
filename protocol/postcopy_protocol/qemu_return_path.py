"""The return path of QEMU's post-copy: what the reader of a migration stream answers, as bytes. Sans-I/O.

QEMU ends the return path, or itself, at a request that it does not understand, so each is checked here first. A page
that was sent already is not sent again, and its request is not answered.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .qemu_format import QemuBlock

SHUT, PONG, REQUEST_NAMED, REQUEST, BITMAP, RESUMED = 1, 2, 3, 4, 5, 6
PACKAGE_LOADED = 0x42
"""The value of a Ping that QEMU 10.2 and later put into the package. Until it is answered, QEMU keeps the right to run
the VM: it does so when the connection is cut."""
BITMAP_END = 0x0123456789ABCDEF

_HEADER = struct.Struct(">HH")


def _message(kind: int, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def shut(error: int = 0) -> bytes:
    """The last message. 0: everything has arrived."""
    return _message(SHUT, struct.pack(">I", error))


def pong(value: int) -> bytes:
    """Answer to a Ping."""
    return _message(PONG, struct.pack(">I", value))


def resumed() -> bytes:
    """Answer to Resume."""
    return _message(RESUMED, struct.pack(">I", 1))


def bitmap(block: str, received: bytes) -> bytes:
    """Answer to AskBitmap: a bit for each page, little endian, in whole words of 64 bits."""
    name = block.encode()
    words = struct.pack(">Q", len(received)) + received + struct.pack(">Q", BITMAP_END)
    return _message(BITMAP, bytes([len(name)]) + name) + words


class Requests:
    """What is requested of one connection after the other: each host page once. ``blocks`` are QEMU's."""

    def __init__(self, blocks: Sequence[QemuBlock]) -> None:
        self._blocks = blocks
        self._asked = [bytearray(block.size // block.page_size) for block in blocks]
        self._last = -1

    def request(self, place: int, offset: int, length: int) -> bytes:
        """The message for all host pages that the range touches and that were not requested; empty: there are none.
        Raises ValueError outside of the block."""
        block, asked = self._blocks[place], self._asked[place]
        first, end = offset // block.page_size, -(-(offset + length) // block.page_size)
        if not 0 <= first < end <= len(asked):
            raise ValueError(f"{length} bytes at {offset} of RAM block {block.name}")
        first = asked.find(0, first, end)
        if first < 0:
            return b""
        asked[first:end] = b"\1" * (end - first)
        where = struct.pack(">QI", first * block.page_size, (end - first) * block.page_size)
        if place == self._last:
            return _message(REQUEST, where)
        self._last = place
        name = block.name.encode()
        return _message(REQUEST_NAMED, where + bytes([len(name)]) + name)

    def forget(self, place: int, offset: int, length: int) -> None:
        """These pages are not on their way: they may be requested."""
        size = self._blocks[place].page_size
        first, end = offset // size, -(-(offset + length) // size)
        self._asked[place][first:end] = bytes(end - first)

    def reconnected(self) -> None:
        """A new connection: nothing is on its way, and it has seen no name."""
        self._last = -1
        for asked in self._asked:
            asked[:] = bytes(len(asked))
