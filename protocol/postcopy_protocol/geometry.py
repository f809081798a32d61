"""Pages, ranges and the address space of one client.

Regions of one client never overlap, so an address belongs to at most one, and a bisection finds it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import BadMessage

PAGE_4K = 4096
PAGE_2M = 2 * 1024 * 1024
PAGE_SIZES = (PAGE_4K, PAGE_2M)

ADDRESS_LIMIT = 1 << 64


def page_count(size: int, page_size: int) -> int:
    """Pages that ``size`` bytes need; the last one may be partial."""
    return -(-size // page_size)


@dataclass(frozen=True, slots=True)
class Region:
    """``length`` bytes at ``address`` are the block's from ``offset``; ``mode`` is private, shared or own."""

    block: int
    mode: str
    address: int
    length: int
    offset: int

    @property
    def end(self) -> int:
        """First address behind the region."""
        return self.address + self.length

    def address_of(self, offset: int) -> int | None:
        """Address of the block's byte ``offset`` in this region; None if it is not in it."""
        inside = offset - self.offset
        return self.address + inside if 0 <= inside < self.length else None

    def shares_pages(self, other: Region) -> bool:
        """Whether both show a same byte of a block."""
        same = self.block == other.block
        return same and self.offset < other.offset + other.length and other.offset < self.offset + self.length


class AddressSpace:
    """The regions of one client, by address."""

    __slots__ = ("_regions", "_starts")

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self._starts: list[int] = []
        self._regions: dict[int, Region] = {}
        for region in regions:
            self.add(region)

    def __iter__(self) -> Iterator[Region]:
        """Regions in the order of their addresses."""
        return (self._regions[start] for start in self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, region: Region, page_size: int = PAGE_4K) -> None:
        """Raises BadMessage on misalignment, an empty or impossible range and overlap."""
        if (region.address | region.length | region.offset) % page_size:
            raise BadMessage(f"region at {region.address:#x} is not aligned to pages of {page_size}")
        if region.address <= 0 or region.length <= 0 or region.offset < 0 or region.end > ADDRESS_LIMIT:
            raise BadMessage(f"region of {region.length} bytes at {region.address:#x} is no range of addresses")
        if self.overlaps(region.address, region.end):
            raise BadMessage(f"region of {region.length} bytes at {region.address:#x} overlaps another")
        insort(self._starts, region.address)
        self._regions[region.address] = region

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any region shares an address with ``[start, end)``."""
        before = bisect_right(self._starts, end - 1)
        return before > 0 and self._regions[self._starts[before - 1]].end > start

    def remove(self, address: int) -> Region:
        """Remove and return the region that starts at ``address``. Raises BadMessage if there is none."""
        region = self._regions.pop(address, None)
        if region is None:
            raise BadMessage(f"no region starts at {address:#x}")
        self._starts.remove(address)
        return region

    def find(self, address: int) -> tuple[Region, int] | None:
        """The region of ``address`` and the offset in its block, or None."""
        index = bisect_right(self._starts, address)
        if not index:
            return None
        start = self._starts[index - 1]
        region = self._regions[start]
        inside = address - start
        return (region, inside + region.offset) if inside < region.length else None


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Merge page numbers, in any order and with repetitions, into ascending half-open runs."""
    start = stop = -1
    for page in sorted(set(pages)):
        if page == stop:
            stop += 1
            continue
        if stop > start:
            yield start, stop
        start, stop = page, page + 1
    if stop > start:
        yield start, stop
