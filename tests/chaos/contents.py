"""What stands in a page: a function of block, page and seed, so that every byte that anybody reads can be checked.

A page begins with its own name (seed, block, number); the rest is a piece of one pool of random bytes, at a place that
the name chooses: a page of zeros, another block's page, an old round's page all differ, and ``describe`` says which.

Every ``SLOT_EVERY``-th page ends in slots, 8 bytes for each seat, which the shared client of that seat may write. A
word in a slot is that of the file, or one that the owner of the slot may have written: anything else is wrong.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from zlib import crc32

PAGE = 4096
NAME = struct.Struct("<8sQQQ")
MARK = b"postcopy"
POOL = 1 << 20
SEATS = 64
SLOT_EVERY = 4
ZONE = PAGE - 8 * SEATS
"""Where the slots of a page begin; private clients write before it."""


class Contents:
    """All pages of all blocks of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._pool = random.Random(seed).randbytes(POOL + PAGE)

    def page(self, block: int, number: int) -> bytes:
        """The bytes of a page as its file has them."""
        at = (number * 2654435761 + block * 40503) % POOL
        return NAME.pack(MARK, self.seed, block, number) + self._pool[at : at + PAGE - NAME.size]

    def slot_key(self, block: int, number: int, seat: int) -> int:
        """The upper half of every word that a client of this seat writes into its slot."""
        return crc32(struct.pack("<QQQQ", self.seed, block, number, seat))

    def check(self, block: int, number: int, found: bytes, ours: dict[int, int] | None = None) -> list[int]:
        """Offsets of the wrong bytes of a page (of the first of each wrong slot). ``ours``: words that we wrote into
        slots of this page and nobody else may have changed, by seat."""
        want = self.page(block, number)
        if found == want and not ours:
            return []
        if number % SLOT_EVERY:
            return _differing(found, want)
        wrong = _differing(found[:ZONE], want[:ZONE])
        for seat in range(SEATS):
            at = ZONE + 8 * seat
            word = int.from_bytes(found[at : at + 8], "little")
            if ours and seat in ours:
                good = word == ours[seat]
            else:
                good = found[at : at + 8] == want[at : at + 8] or word >> 32 == self.slot_key(block, number, seat)
            if not good:
                wrong.append(at)
        return wrong

    def describe(self, found: bytes) -> str:
        """What page these bytes look like, for people."""
        if not any(found):
            return "zeros"
        mark, seed, block, number = NAME.unpack_from(found)
        return f"page {number} of block {block}, seed {seed}" if mark == MARK else f"begins with {found[:16].hex()}"

    def write_file(self, path: Path, block: int, pages: int) -> None:
        with path.open("wb") as file:
            for first in range(0, pages, 1024):
                file.write(b"".join(self.page(block, number) for number in range(first, min(pages, first + 1024))))


def _differing(found: bytes, want: bytes) -> list[int]:
    if found == want:
        return []
    return [at for at in range(len(want)) if found[at : at + 1] != want[at : at + 1]]
