"""The plan of a probe: guest memory, requests, and the pages that must fault.

Guest memory is one file. Each queue has three pages of ring (descriptors, available, used). Each request has a page
with header, status and indirect table, and its pages of data. The first requests of every queue are on the ring before
the back-end maps it, so it finds rings, headers and buffers in missing pages. Every later request uses untouched pages.
So the set of pages that must arrive is known exactly."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .. import blk
from ..virtqueue import Piece, Ring, chain

PAGE = 4096
RING_SIZE = 256
SLOT = 3
"""Descriptors of a request: header, data, status."""
MOST_IN_FLIGHT = RING_SIZE // SLOT
RING_PAGES = 3
STATUS_AT, TABLE_AT = 2048, 64
MOST_DATA_PAGES = 4


@dataclass(frozen=True, slots=True)
class Planned:
    """A request: its pages begin at ``page``, the header's; ``pages`` of data follow."""

    number: int
    queue: int
    kind: int
    sector: int
    page: int
    pages: int
    indirect: bool

    @property
    def header_at(self) -> int:
        return self.page * PAGE

    @property
    def data_at(self) -> int:
        return (self.page + 1) * PAGE

    @property
    def status_at(self) -> int:
        return self.page * PAGE + STATUS_AT

    @property
    def length(self) -> int:
        return blk.ID_BYTES if self.kind == blk.GET_ID else self.pages * PAGE

    def pieces(self) -> list[Piece]:
        return blk.request(self.kind, self.header_at, [(self.data_at, self.length)], self.status_at)

    def touched(self) -> range:
        """The pages that a device cannot avoid."""
        return range(self.page, self.page + 1 + self.pages)

    def pattern(self) -> bytes:
        """What a write writes: every page is different."""
        return b"".join((self.number * 8 + n).to_bytes(8, "little") * (PAGE // 8) for n in range(self.pages))


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """``sectors`` are the device's; with ``writes`` its upper half is overwritten."""

    requests: int
    queues: int
    depth: int
    sectors: int
    writes: bool
    indirect: bool
    seed: int = 1
    after: int = 32
    """Requests after the end of post-copy."""


class Plan:
    """All requests, in order, and the file that is the guest's memory."""

    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings
        self._random = random.Random(settings.seed)
        page = settings.queues * RING_PAGES
        self.requests: list[Planned] = []
        for number in range(settings.requests + settings.after):
            planned = self._request(number, page)
            self.requests.append(planned)
            page += 1 + planned.pages
        self.pages = page

    def _request(self, number: int, page: int) -> Planned:
        settings, chance = self.settings, self._random.random()
        kind = blk.GET_ID if chance < 0.05 else blk.WRITE if settings.writes and chance < 0.25 else blk.READ
        pages = 1 if kind == blk.GET_ID else self._random.randint(1, MOST_DATA_PAGES)
        low, high = (settings.sectors // 2, settings.sectors) if kind == blk.WRITE else (0, settings.sectors // 2)
        if not settings.writes:
            low, high = 0, settings.sectors
        sector = 0 if kind == blk.GET_ID else self._random.randrange(low, high - pages * 8 + 1)
        if kind == blk.WRITE:  # writes must not overlap, because the order of overlapping writes is undefined
            room = (high - low) // (MOST_DATA_PAGES * 8)
            sector = low + number % room * MOST_DATA_PAGES * 8
        indirect = settings.indirect and self._random.random() < 0.25
        return Planned(number, number % settings.queues, kind, sector, page, pages, indirect)

    def ring_offsets(self, queue: int) -> tuple[int, int, int]:
        """Descriptors, available, used."""
        first = queue * RING_PAGES * PAGE
        return first, first + PAGE, first + 2 * PAGE

    def ring(self, queue: int, memory: memoryview) -> Ring:
        return Ring(memory, RING_SIZE, *self.ring_offsets(queue))

    def of_queue(self, queue: int) -> Iterator[Planned]:
        return (request for request in self.requests[: self.settings.requests] if request.queue == queue)

    def first(self, queue: int) -> list[Planned]:
        """The requests that are on the ring before it is mapped."""
        return [request for _, request in zip(range(self.settings.depth), self.of_queue(queue), strict=False)]

    def expected(self, done: Iterable[Planned]) -> set[int]:
        """Exactly the pages that must be present when these requests are done."""
        found = set(range(self.settings.queues * RING_PAGES))
        for request in done:
            found.update(request.touched())
        return found

    def write(self, path: str) -> None:
        """Write the file of the guest memory."""
        with open(path, "wb") as file:
            file.truncate(self.pages * PAGE)
            rings = bytearray(self.settings.queues * RING_PAGES * PAGE)
            for queue in range(self.settings.queues):
                ring = self.ring(queue, memoryview(rings))
                for slot, request in enumerate(self.first(queue)):
                    offer(ring, request, slot)
            os.pwrite(file.fileno(), rings, 0)
            for request in self.requests:
                os.pwrite(file.fileno(), head(request), request.header_at)
                if request.kind == blk.WRITE:
                    os.pwrite(file.fileno(), request.pattern(), request.data_at)


def head(request: Planned) -> bytes:
    """Header, indirect table and pending status of a request: the beginning of its page."""
    start = blk.header(request.kind, request.sector).ljust(TABLE_AT, b"\0") + chain(request.pieces())
    return start.ljust(STATUS_AT, b"\0") + bytes([blk.PENDING])


def offer(ring: Ring, request: Planned, slot: int) -> None:
    """Put a request on its ring."""
    if request.indirect:
        ring.submit_indirect(Piece(request.header_at + TABLE_AT, 16 * SLOT), slot * SLOT)
    else:
        ring.submit(request.pieces(), slot * SLOT)
