"""A program whose sources do everything wrong that a source can do; see test_source.py.

``python own_sources.py ENDPOINT GATE [READERS]``: what is gated waits until the file GATE is there.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from postcopy_protocol.errors import PageLost
from postcopy_sources import PushStream, serve

PAGE = 4096
SIZE = 64 * PAGE - 5


def page_of(offset: int, length: int) -> bytes:
    return b"".join(bytes([place // PAGE % 255 + 1]) * PAGE for place in range(offset, offset + length, PAGE))[:length]


class Own:
    """A source that reads with ``reader``."""

    page_size = PAGE
    size = SIZE

    def __init__(self, name: str, reader: Callable[[int, int], object]) -> None:
        self.name = name
        self._reader = reader

    def identity(self) -> str:
        return "own"

    def read(self, offset: int, length: int) -> bytes | None:
        return self._reader(offset, length)  # type: ignore[return-value]  # some of it is wrong on purpose


class Pushing(Own):
    """Pushes all its pages unasked, in order, then zeros and a loss."""

    def listening(self, stream: PushStream) -> None:
        for offset in range(0, 60 * PAGE, PAGE):
            stream.push(offset, page_of(offset, PAGE))
        stream.push(60 * PAGE, None, 2 * PAGE)
        stream.lost(62 * PAGE, PAGE, "not this one")
        stream.push(63 * PAGE, page_of(63 * PAGE, PAGE)[: PAGE - 5])


class Failing(Own):
    def listening(self, stream: PushStream) -> None:
        stream.push(1, b"?")


class Large(Own):
    """Of 1 MiB and a piece, page by page another byte."""

    size = (1 << 20) + 5 * PAGE + 77


class Into(Large):
    """Reads into memory that it is given, and does wrong there what can be done wrong, piece by piece."""

    def read_now(self, offset: int, length: int) -> bytes:
        return page_of(offset, length)

    def read_into(self, offset: int, view: memoryview) -> bool:
        if self.name == "into-raises":
            view[:PAGE] = b"?" * PAGE
            raise OSError("not today")
        if self.name == "into-blocks":
            raise BlockingIOError
        if self.name == "into-zeros":
            return False
        view[:] = page_of(offset, len(view))
        return True


class Huge(Own):
    page_size = 2 << 20
    size = (4 << 20) + 1


def hangs(offset: int, length: int) -> bytes:
    while offset == 0:
        time.sleep(3600)
    return page_of(offset, length)


def raises(offset: int, length: int) -> bytes:
    if offset // PAGE <= 3 < (offset + length + PAGE - 1) // PAGE:
        raise OSError("page 3\nis broken")
    return page_of(offset, length)


def loses(offset: int, length: int) -> bytes:
    if length > PAGE or offset == PAGE:
        raise PageLost("the tape is torn")
    return page_of(offset, length)


def exits(offset: int, length: int) -> bytes:
    sys.exit(7)


def main(endpoint: str, gate: str, readers: int) -> None:
    def gated(offset: int, length: int) -> bytes:
        while not Path(gate).exists():
            time.sleep(0.01)
        return page_of(offset, length)

    serve(
        [
            Own("good", page_of),
            Own("zeros", lambda offset, length: None),
            Own("gated", gated),
            Own("hangs", hangs),
            Own("raises", raises),
            Own("loses", loses),
            Own("exits", exits),
            Own("short", lambda offset, length: b"x" * (length - 1)),
            Own("text", lambda offset, length: "x" * length),
            Own("view", lambda offset, length: memoryview(bytearray(page_of(offset, length)))),
            Large("large", page_of),
            *(Into(name, page_of) for name in ("into", "into-raises", "into-blocks", "into-zeros")),
            Huge("huge", lambda offset, length: b"h" * length),
            Pushing("pushes", page_of),
            Failing("fails", page_of),
        ],
        endpoint,
        readers=readers,
        read_timeout=1.0 if gate == "-" else 60.0,
    )


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 4)
