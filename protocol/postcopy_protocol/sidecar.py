"""What postcopy keeps beside the index of a snapshot: its pages of zeros, and which pages were needed (``.postcopy``).

Other tools need none of it and do not see it. Everything is little endian:

    magic       20 B   ``postcopy-sidecar-1`` and two newlines
    digest      32 B   SHA-256 of all that follows
    body        msgpack [SHA-256 of the index file, size of the image, zero pages, runs, chunk ids, needed pages]

Zero pages are a bitmap, one bit for each 4096 bytes, compressed by zlib. The needed pages are a *working set*: 20 bytes
each, in the order of their first use. A page is named by its chunk's id, so the set also fits a later snapshot, as far
as its chunks are the same.

A sidecar that is damaged, or belongs to another index, is not used: a page is fetched rather than taken for zeros."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped, unused-ignore]

from .caibx import ID_BYTES, Index
from .errors import BadInput
from .geometry import PAGE_4K, page_count

SIDECAR_ENDING = ".postcopy"
LARGEST_SIDECAR = 64 << 20
"""Bytes of the largest sidecar that is read."""
LARGEST_BITMAP = 64 << 20
"""Bytes of the largest bitmap of zero pages, which is that of an image of 2 TiB. The size in a sidecar is a claim."""
MOST_PAGES = 1 << 20
"""Pages of the largest working set: 4 GiB. More would not be a working set."""

_MAGIC = b"postcopy-sidecar-1\n\n"
_PAGE = struct.Struct("<IIQI")  # number of the chunk id, page in the chunk, page in the image, runs that needed it


@dataclass(frozen=True, slots=True)
class NeededPage:
    """A page of a working set: its chunk and its place in it, where it was in the image, how many runs needed it."""

    chunk: bytes
    inside: int
    page: int
    count: int


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Which pages ``runs`` runs needed, in the order of their first use."""

    runs: int = 0
    pages: Sequence[NeededPage] = ()

    def merged(self, index: Index, needed: Iterable[int]) -> WorkingSet:
        """With one more run, which needed these pages of ``index``, in this order. Pages keep their first order."""
        found = {(page.chunk, page.inside, page.page): page for page in self.pages}
        for number in dict.fromkeys(needed):
            chunk, inside = place_of(index, number)
            key = (chunk, inside, number)
            before = found.get(key)
            found[key] = NeededPage(*key, 1 + (before.count if before else 0))
        pages = list(found.values())
        if len(pages) > MOST_PAGES:  # the ones that most runs needed stay
            kept = sorted(range(len(pages)), key=lambda at: -pages[at].count)[:MOST_PAGES]
            pages = [pages[at] for at in sorted(kept)]
        return WorkingSet(self.runs + 1, pages)

    def pages_in(self, index: Index) -> list[int]:
        """The pages of ``index`` to fetch, in order. A chunk that has moved is found by its id. A page of a chunk that
        has changed is taken to be where it was, if at least half of all pages are in chunks that are still there."""
        places: dict[bytes, list[int]] = {}
        for number in range(len(index)):
            places.setdefault(index.id(number), []).append(number)
        pages, kept, limit = dict[int, bool](), 0, page_count(index.size, PAGE_4K)
        for page in self.pages:
            numbers = places.get(page.chunk)
            if numbers is None:
                pages.setdefault(page.page, False)
                continue
            kept += 1
            starts = [index.span(number)[0] // PAGE_4K + page.inside for number in numbers]
            pages[min(starts, key=lambda start: abs(start - page.page))] = True
        guess = 2 * kept >= len(self.pages)
        return [page for page, certain in pages.items() if page < limit and (certain or guess)]


def place_of(index: Index, page: int) -> tuple[bytes, int]:
    """The chunk of a page's first byte, and how many whole pages of the image it is behind the chunk's start."""
    number = index.at(page * PAGE_4K)
    return index.id(number), page - index.span(number)[0] // PAGE_4K


@dataclass(frozen=True, slots=True)
class Sidecar:
    """``index``: SHA-256 of the index file; ``size``: bytes of the image; ``zeros``: a bit for each page, the lowest
    bit of a byte first."""

    index: bytes
    size: int
    zeros: bytes
    working_set: WorkingSet = field(default_factory=WorkingSet)

    def is_zero(self, first: int, pages: int) -> bool:
        """Are all these pages zeros?"""
        bits, shift = self.zeros[first >> 3 : (first + pages + 7) >> 3], first & 7
        mask = (1 << pages) - 1
        return (int.from_bytes(bits, "little") >> shift) & mask == mask

    @property
    def zero_pages(self) -> int:
        return int.from_bytes(self.zeros, "little").bit_count()


def bitmap(pages: int, zero: Iterable[int]) -> bytes:
    """The bitmap of these page numbers."""
    bits = bytearray((pages + 7) >> 3)
    for page in zero:
        bits[page >> 3] |= 1 << (page & 7)
    return bytes(bits)


def format_sidecar(sidecar: Sidecar) -> bytes:
    """The bytes of the file."""
    pages = sidecar.working_set.pages
    ids = {chunk: number for number, chunk in enumerate(dict.fromkeys(page.chunk for page in pages))}
    needed = b"".join(_PAGE.pack(ids[page.chunk], page.inside, page.page, page.count) for page in pages)
    fields = [sidecar.index, sidecar.size, zlib.compress(sidecar.zeros, 6), sidecar.working_set.runs]
    body: bytes = msgpack.packb([*fields, b"".join(ids), zlib.compress(needed, 6)])
    return _MAGIC + hashlib.sha256(body).digest() + body


def parse_sidecar(data: bytes) -> Sidecar:
    """Parse a file. Raises BadInput, in one line, for one that is damaged or of another version."""
    start = len(_MAGIC) + ID_BYTES
    if data[: len(_MAGIC)] != _MAGIC:
        raise BadInput("it is no sidecar, or one of another version")
    body = data[start:]
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        raise BadInput("its digest is wrong: it is damaged")
    try:
        return _sidecar(*_fields(body))
    except (ValueError, TypeError, struct.error, zlib.error, OverflowError, msgpack.OutOfData) as error:
        raise BadInput(f"it cannot be understood: {type(error).__name__}") from None


def _fields(body: bytes) -> list[object]:
    """Six of them; a list or map in place of one would take much more memory than the file."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(body)), max_array_len=0, max_map_len=0)
    unpacker.feed(body)
    if unpacker.read_array_header() != 6:
        raise ValueError
    return [unpacker.unpack() for _ in range(6)]


def _sidecar(index: object, size: object, zeros: object, runs: object, ids: object, needed: object) -> Sidecar:
    if not (isinstance(index, bytes) and isinstance(zeros, bytes) and isinstance(ids, bytes)):
        raise TypeError
    if not (isinstance(size, int) and isinstance(runs, int) and isinstance(needed, bytes)):
        raise TypeError
    if len(index) != ID_BYTES or len(ids) % ID_BYTES or not 0 <= size < 1 << 56 or not 0 <= runs < 1 << 32:
        raise ValueError
    length = (page_count(size, PAGE_4K) + 7) >> 3
    if length > LARGEST_BITMAP:
        raise ValueError
    zeros, needed = _inflated(zeros, length), _inflated(needed, MOST_PAGES * _PAGE.size)
    if len(zeros) != length or len(needed) % _PAGE.size:
        raise ValueError
    return Sidecar(index, size, zeros, WorkingSet(runs, list(_pages(ids, needed))))


def _pages(ids: bytes, needed: bytes) -> Iterator[NeededPage]:
    for number, inside, page, count in _PAGE.iter_unpack(needed):
        chunk = ids[number * ID_BYTES : (number + 1) * ID_BYTES]
        if not chunk:
            raise ValueError
        yield NeededPage(chunk, inside, page, count)


def _inflated(data: bytes, limit: int) -> bytes:
    """At most ``limit`` bytes. Raises ValueError for more, or for what is cut short."""
    engine = zlib.decompressobj()
    found = engine.decompress(data, limit + 1)
    if len(found) > limit or not engine.eof or engine.unused_data:
        raise ValueError
    return found


def runs_of(pages: Iterable[int], gap: int, longest: int) -> Iterator[tuple[int, int]]:
    """Pages in order as (first, count) ranges: a page that follows within ``gap`` pages joins, up to ``longest``."""
    first = end = -1
    for page in pages:
        if first >= 0 and end <= page <= end + gap and page + 1 - first <= longest:
            end = page + 1
            continue
        if first >= 0:
            yield first, end - first
        first, end = page, page + 1
    if first >= 0:
        yield first, end - first
