"""A snapshot in a store as a page source: what ``serve NAME=store:STORE/NAME`` starts.

A page of zeros is known from the sidecar and needs no fetch. Any other page comes from its chunk: out of memory or the
chunk cache in the loop's own thread, else from the store in another one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from postcopy_protocol.caibx import Bytes
from postcopy_protocol.errors import PageLost
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.sources import StoreSource as Location

from ..pushing import PushStream
from .chunk_cache import ChunkCache
from .chunk_reader import ChunkReader, Wanted
from .compression import check_installed
from .opening import SERVING_SECONDS, open_store
from .snapshots import Snapshot, load
from .stores import Store

AT_ONCE = 64 << 10
"""Bytes of the largest range that is read in the loop's own thread: hashing more would delay other supervisors."""
PARALLEL = 16
WATCH_SECONDS = 1.0


class SnapshotSource:
    """See PageSource. ``pool`` fetches the chunks of a range beside one another."""

    page_size = PAGE_4K

    def __init__(self, name: str, snapshot: Snapshot, reader: ChunkReader, pool: ThreadPoolExecutor) -> None:
        self.name, self.size = name, snapshot.index.size
        self._snapshot, self._index, self._sidecar = snapshot, snapshot.index, snapshot.sidecar
        self._reader, self._pool = reader, pool
        self._numbers: dict[bytes, list[int]] = {}  # the chunks of each id
        for number in range(len(self._index)):
            self._numbers.setdefault(self._index.id(number), []).append(number)
        self._healed: list[bytes] = []
        self._changed = threading.Condition()
        reader.on_healed.append(self._on_healed)

    def identity(self) -> str:
        """That of the index, which names the content of every chunk."""
        return self._snapshot.identity

    def read_now(self, offset: int, length: int) -> Bytes | None:
        """See PageSource."""
        if self._is_zero(offset, length):
            return None
        if length > AT_ONCE:
            raise BlockingIOError
        number = self._index.at(offset)
        start, end = self._index.span(number)
        inside = offset - start
        # Other tools' chunks may begin inside a page: such a page is put together in another thread.
        if offset + length > end or inside % PAGE_4K:
            raise BlockingIOError
        return self._reader.read_now(self._wanted(number), inside, length)

    def read(self, offset: int, length: int) -> Bytes | None:
        """See PageSource. Waits for the store. Raises PageLost."""
        if self._is_zero(offset, length):
            return None
        numbers = self._index.within(offset, length)
        if len(numbers) == 1:
            start = self._index.span(numbers[0])[0]
            return self._chunk(numbers[0])[offset - start : offset - start + length]
        parts = self._together(numbers)
        start = self._index.span(numbers[0])[0]
        return b"".join(parts)[offset - start : offset - start + length]

    def _together(self, numbers: Sequence[int]) -> list[bytes]:
        """The data of these chunks; zeros are not fetched."""
        futures = [self._pool.submit(self._chunk, number) for number in numbers]
        return [future.result() for future in futures]

    def _chunk(self, number: int) -> bytes:
        start, end = self._index.span(number)
        first = start // PAGE_4K
        if start % PAGE_4K == 0 and self._is_zero(start, end - start, first):
            return bytes(end - start)
        return self._reader.chunk(self._wanted(number))

    def _wanted(self, number: int) -> Wanted:
        start, end = self._index.span(number)
        return Wanted(self._index.id(number), end - start, self._index.digest)

    def _is_zero(self, offset: int, length: int, first: int = -1) -> bool:
        first = offset // PAGE_4K if first < 0 else first
        return self._sidecar is not None and self._sidecar.is_zero(first, page_count(length, PAGE_4K))

    def _on_healed(self, chunk: bytes) -> None:
        if chunk in self._numbers:
            with self._changed:
                self._healed.append(chunk)
                self._changed.notify_all()

    def listening(self, stream: PushStream) -> None:
        """Push the pages of chunks that were lost and are there again."""
        done = len(self._healed)
        while not stream.ended:
            with self._changed:
                if len(self._healed) == done:
                    self._changed.wait(WATCH_SECONDS)
                healed, done = self._healed[done:], len(self._healed)
            for chunk in healed:
                for number in self._numbers[chunk]:
                    self._push(stream, number)

    def _push(self, stream: PushStream, number: int) -> None:
        """Push the pages that begin in a chunk, in pieces that the wire takes."""
        start, end = self._index.span(number)
        start = page_count(start, stream.page_size) * stream.page_size
        while start < end and not stream.ended:
            length = min(max(stream.page_size, AT_ONCE), self.size - start)
            try:
                data = self.read(start, length)
            except PageLost:  # a neighbour is still lost: its turn comes
                return
            stream.push(start, data, length)
            start += length


def open_sources(places: dict[str, Location], cache: ChunkCache | None) -> list[SnapshotSource]:
    """Sources by block name; snapshots of one store share what is fetched. Raises PostcopyError."""
    check_installed()
    stores: dict[str, tuple[Store, ChunkReader]] = {}
    pool = ThreadPoolExecutor(PARALLEL, "fetch")
    found = []
    for name, place in places.items():
        if place.store not in stores:
            store = open_store(place.store, SERVING_SECONDS)
            stores[place.store] = store, ChunkReader(store, cache)
        store, reader = stores[place.store]
        found.append(SnapshotSource(name, load(store, place.name), reader, pool))
    return found
