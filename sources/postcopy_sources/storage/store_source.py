"""A snapshot in a store as a page source: what ``serve NAME=store:STORE/NAME`` starts.

A page of zeros is known from the sidecar and needs no fetch. Any other page comes from its chunk: out of memory or the
chunk cache in the loop's own thread, else from the store in another one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from postcopy_protocol.caibx import Bytes
from postcopy_protocol.errors import PageLost
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.sidecar import runs_of
from postcopy_protocol.sources import RemoteSource
from postcopy_protocol.sources import StoreSource as Location

from ..pushing import PushStream
from .chunk_cache import ChunkCache
from .chunk_reader import MEMORY, ChunkReader, Wanted
from .compression import check_installed
from .opening import SERVING_SECONDS, open_store
from .pace import LARGEST_WINDOW
from .peers import Peers
from .snapshots import Snapshot, load
from .stores import Store
from .working_sets import Recording, Replay

AT_ONCE = 64 << 10
"""Bytes of the largest range that is read in the loop's own thread: hashing more would delay other supervisors."""
PUSHED = 256 << 10
"""Bytes of the largest range that is pushed: a client may wait behind it."""
MOST_PARALLEL = int(LARGEST_WINDOW)
"""Threads that fetch; how many of them do at once follows the store (pace.py)."""
WATCH_SECONDS = 1.0

log = logging.getLogger(__name__)


class SnapshotSource:
    """See PageSource. ``pool`` fetches the chunks of a range beside one another."""

    page_size = PAGE_4K

    def __init__(
        self,
        name: str,
        snapshot: Snapshot,
        reader: ChunkReader,
        pool: ThreadPoolExecutor,
        recording: Recording | None = None,
        replays: bool = False,
        peers: Peers | None = None,
    ) -> None:
        self.name, self.size = name, snapshot.index.size
        self._snapshot, self._index, self._sidecar = snapshot, snapshot.index, snapshot.sidecar
        self._reader, self._pool = reader, pool
        self._peers = peers
        self._background_ends = self._in_order = 0  # the chunk behind the last background read; reads in order
        self._numbers: dict[bytes, list[int]] = {}  # the chunks of each id
        for number in range(len(self._index)):
            self._numbers.setdefault(self._index.id(number), []).append(number)
        self.recording = recording
        self._replay: Replay | None = None
        self._pages_to_replay: list[int] = []
        if replays and snapshot.sidecar is not None:
            self._pages_to_replay = snapshot.sidecar.working_set.pages_in(self._index)
        if replays and not self._pages_to_replay:
            log.warning("%s has no working set to replay: record one with serve --record-working-set", name)
        self._healed: list[bytes] = []
        self._changed = threading.Condition()
        reader.on_healed.append(self._on_healed)

    def identity(self) -> str:
        """That of the index, which names the content of every chunk."""
        return self._snapshot.identity

    def read_now(self, offset: int, length: int) -> Bytes | None:
        """See PageSource."""
        if length <= AT_ONCE and self._observed:
            self._observe(offset, length)
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
        return self._read(offset, length, urgent=True)

    def read_background(self, offset: int, length: int) -> Bytes | None:
        """As ``read``, but it waits until the store has room, and what follows is fetched ahead."""
        return self._read(offset, length, urgent=False)

    def _read(self, offset: int, length: int, *, urgent: bool) -> Bytes | None:
        if self._is_zero(offset, length):
            return None
        numbers = self._index.within(offset, length)
        if not urgent:
            self._read_ahead(numbers)
        start = self._index.span(numbers[0])[0]
        data = self._chunk(numbers[0], urgent=urgent) if len(numbers) == 1 else self._together(numbers, urgent=urgent)
        return data[offset - start : offset - start + length]

    @property
    def _observed(self) -> bool:
        return self.recording is not None or self._replay is not None

    def _observe(self, offset: int, length: int) -> None:
        """A client waits for these pages: the background asks for larger pieces, or not at all while it is recorded."""
        first, replay = offset // PAGE_4K, self._replay
        if self.recording is not None:
            self.recording.needed(first, page_count(length, PAGE_4K))
        elif replay is not None:
            replay.asked(first)

    def _together(self, numbers: Sequence[int], *, urgent: bool) -> bytes:
        """The data of these chunks; zeros are not fetched."""
        futures = [self._pool.submit(self._chunk, number, urgent=urgent) for number in numbers]
        return b"".join([future.result() for future in futures])

    def _read_ahead(self, numbers: Sequence[int]) -> None:
        """While the background reads in order, fetch what follows, as much as the store has room for."""
        first = numbers[-1] + 1
        in_order = numbers[0] <= self._background_ends <= first
        self._in_order = self._in_order + 1 if in_order else 0
        if self._in_order > 2:
            for number in range(first, min(first + self._width(), len(self._index))):
                if not self._reader.knows(self._index.id(number)) and not self._is_zero_chunk(number):
                    self._prefetch(number)
        self._background_ends = first

    def _width(self) -> int:
        """Chunks that are fetched beside one another, as far as memory keeps them."""
        return min(int(self._reader.pace.window), max(1, MEMORY // 2 // max(1, self._index.largest)))

    def _is_zero_chunk(self, number: int) -> bool:
        start, end = self._index.span(number)
        return start % PAGE_4K == 0 and self._is_zero(start, end - start)

    def _chunk(self, number: int, *, urgent: bool = True) -> bytes:
        start, end = self._index.span(number)
        if self._is_zero_chunk(number):
            return bytes(end - start)
        return self._reader.chunk(self._wanted(number), urgent=urgent)

    def _wanted(self, number: int) -> Wanted:
        start, end = self._index.span(number)
        return Wanted(self._index.id(number), end - start, self._index.digest, start, self._peers)

    def _is_zero(self, offset: int, length: int) -> bool:
        return self._sidecar is not None and self._sidecar.is_zero(offset // PAGE_4K, page_count(length, PAGE_4K))

    def _on_healed(self, chunk: bytes) -> None:
        if chunk in self._numbers:
            with self._changed:
                self._healed.append(chunk)
                self._changed.notify_all()

    def listening(self, stream: PushStream) -> None:
        """Push the working set, then the pages of chunks that were lost and are there again."""
        done = len(self._healed)
        if self._pages_to_replay:
            replay = self._replay = Replay(self.name, self._index, self._pages_to_replay)
            replay.send(partial(self._push_pages, stream), self._prefetch, self._width)
            self._replay = None
        while not stream.ended:
            with self._changed:
                if len(self._healed) == done:
                    self._changed.wait(WATCH_SECONDS)
                healed, done = self._healed[done:], len(self._healed)
            for chunk in healed:
                for number in self._numbers[chunk]:
                    self._push(stream, number)

    def end(self) -> None:
        """Write what was recorded, and leave the other hosts. The program ends."""
        if self.recording is not None:
            self.recording.close()
        counts = {"the store": self._reader.fetched}
        if self._peers is not None:
            counts |= self._peers.served()
            self._peers.close()
        log.info("%s: chunks came from %s", self.name, ", ".join(f"{host}: {count}" for host, count in counts.items()))

    def _prefetch(self, number: int) -> None:
        self._pool.submit(self._chunk, number, urgent=False)

    def _push_pages(self, stream: PushStream, number: int, pages: Sequence[int]) -> None:
        """Push pages that begin in one chunk, in ranges. A chunk that is lost is left out."""
        size = max(stream.page_size, PAGE_4K) // PAGE_4K
        whole = dict.fromkeys(page - page % size for page in pages)
        try:
            for first, count in runs_of(whole if size == 1 else sorted(whole), size - 1, max(size, PUSHED // PAGE_4K)):
                offset = first * PAGE_4K
                length = min(page_count(count, size) * size * PAGE_4K, self.size - offset)
                stream.push(offset, self.read(offset, length), length)
        except PageLost:
            log.debug("replay of %s: chunk %d is lost", self.name, number)

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


OpenPeers = Callable[[str, Sequence[RemoteSource], int], Peers]
"""Connects to other hosts for a block of so many bytes."""


def open_sources(
    places: dict[str, Location],
    cache: ChunkCache | None,
    open_peers: OpenPeers = Peers,
    *,
    record: bool = False,
    replay: bool = False,
) -> list[SnapshotSource]:
    """Sources by block name; snapshots of one store share what is fetched. ``record`` their working sets, or ``replay``
    them. Raises PostcopyError."""
    check_installed()
    stores: dict[str, tuple[Store, ChunkReader]] = {}
    pool = ThreadPoolExecutor(MOST_PARALLEL, "fetch")
    found = []
    for name, place in places.items():
        if place.store not in stores:
            store = open_store(place.store, SERVING_SECONDS)
            stores[place.store] = store, ChunkReader(store, cache)
        store, reader = stores[place.store]
        snapshot = load(store, place.name, cache)
        recording = Recording(store, snapshot) if record else None
        peers = open_peers(name, place.peers, snapshot.index.size) if place.peers else None
        found.append(SnapshotSource(name, snapshot, reader, pool, recording, replay, peers))
    return found
