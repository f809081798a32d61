"""A page source: a program that supplies the pages of a remote block.

    python examples/page_source.py ipc:///tmp/squares.sock &
    postcopy serve squares=ipc:///tmp/squares.sock/squares --background-rate 0 &
    postcopy cat squares --offset 80 --length 8 | od -A n -t d8        # 100

The supervisor asks for a page at its first touch. SIGTERM ends the source in order.
"""

from __future__ import annotations

import logging
import struct
import sys

from postcopy_sources import PageLost, serve

LOST_PAGE = 13


class Squares:
    """A block of 64 MiB: the 8-byte integer number N is N squared."""

    name = "squares"
    size = 64 << 20
    page_size = 4096

    def identity(self) -> str:
        """Names the content. A source with the same size and identity may replace this one."""
        return "squares, version 1"

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range of whole pages. Called from several threads."""
        if offset <= LOST_PAGE * self.page_size < offset + length:
            raise PageLost(f"page {LOST_PAGE} cannot be supplied")  # a client gets SIGBUS, or PageLost from ensure()
        first = offset // 8
        return struct.pack(f"<{length // 8}q", *(n * n for n in range(first, first + length // 8)))


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    serve([Squares()], listen=sys.argv[1])
