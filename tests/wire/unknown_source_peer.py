"""A page source written from chapters 1 and 6 of protocol/README.md alone: no msgpack library, nothing of postcopy, and
of all forms of a number or a length always the longest.

``python unknown_source_peer.py FILE ENDPOINT`` serves FILE as block ram0.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path
from typing import Any

import zmq

PAGE = 4096
UINT, STR, BIN, ARRAY = b"\xcf", b"\xdb", b"\xc6", b"\xdd"
ADVISE, LISTEN, REQUEST, COMPLETE, PING = range(110, 115)
ADVISED, PAGES, REFUSED, PONG = range(120, 124)


def length_of(first: int) -> tuple[int, int]:
    """What a first byte says of lengths: (length itself, or bytes in which it follows)."""
    if 0x90 <= first <= 0x9F:
        return first & 15, 0
    if 0xA0 <= first <= 0xBF:
        return first & 31, 0
    return 0, {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4, 0xDC: 2, 0xDD: 4}[first]


def read(data: bytes, at: int = 0) -> tuple[Any, int]:
    """The value at a place, and where the next one begins."""
    first, at = data[at], at + 1
    if first < 0x80:
        return first, at
    if 0xCC <= first <= 0xCF:
        size = 1 << (first - 0xCC)
        return int.from_bytes(data[at : at + size], "big"), at + size
    if first in (0xC2, 0xC3):
        return first == 0xC3, at
    length, follows = length_of(first)
    if follows:
        length, at = int.from_bytes(data[at : at + follows], "big"), at + follows
    if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
        items = []
        for _ in range(length):
            item, at = read(data, at)
            items.append(item)
        return items, at
    raw = data[at : at + length]
    return (raw if 0xC4 <= first <= 0xC6 else raw.decode()), at + length


def write(value: Any) -> bytes:
    match value:
        case int():
            return UINT + struct.pack(">Q", value)
        case str():
            return STR + struct.pack(">I", len(value.encode())) + value.encode()
        case bytes():
            return BIN + struct.pack(">I", len(value)) + value
    return ARRAY + struct.pack(">I", len(value)) + b"".join(map(write, value))


class Source:
    def __init__(self, path: str) -> None:
        self.data = Path(path).read_bytes()
        self.size = len(self.data)
        self.data += bytes(-self.size % PAGE)
        self.last = random.getrandbits(40)
        self.streams: set[int] = set()

    def answer(self, frame: bytes) -> list[bytes]:
        """The frames that answer a frame, if any."""
        (version, tag, *fields), _ = read(frame)
        if version != 1:
            return self.refused("bad-version", f"{version}, and mine is 1")
        if tag == PING:
            return [write([1, PONG, fields[0]])]
        if tag == ADVISE:
            return self.advised(*fields)
        if tag == REQUEST:
            return self.pages(*fields)
        if fields[0] not in self.streams:
            return self.refused("out-of-phase", "this stream is unknown")
        if tag == COMPLETE:
            self.streams.discard(fields[0])
            print("complete", flush=True)
        return []

    def advised(self, name: str, page_size: int, features: list[str]) -> list[bytes]:
        if name != "ram0" or page_size != PAGE:
            return self.refused("no-such-block" if name != "ram0" else "bad-page-size", "ram0 in pages of 4096")
        self.last += 1
        self.streams.add(self.last)
        return [write([1, ADVISED, name, self.last, self.size, "peer", []])]

    def pages(self, request: int, stream: int, urgent: bool, ranges: bytes) -> list[bytes]:
        if stream not in self.streams:
            return self.refused("out-of-phase", "this stream is unknown")
        pairs = list(struct.iter_unpack("<QQ", ranges))
        head = write([1, PAGES, stream, request, ranges, bytes(len(pairs)), ""])
        return [head, *(self.data[offset : offset + length] for offset, length in pairs)]

    def refused(self, code: str, reason: str) -> list[bytes]:
        return [write([1, REFUSED, code, "ram0", reason])]


def main(path: str, endpoint: str) -> None:
    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.bind(endpoint)
    source = Source(path)
    while True:
        sender, frame = router.recv_multipart()
        answer = source.answer(frame)
        if answer:
            router.send_multipart([sender, *answer])


if __name__ == "__main__":
    main(*sys.argv[1:])
