"""``postcopy pack``: an image becomes chunks in a store, an index and a sidecar.

One thread reads in order; others find what is zero, hash, ask the store, compress and upload. At most a few chunks per
thread are in memory. The store is asked for each different chunk before it is compressed, so what is there, from an
earlier snapshot or from a pack that was interrupted, is neither compressed nor sent again. The index comes last."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from postcopy_protocol.caibx import SHA256, chunk_path, digest_of, index_of
from postcopy_protocol.errors import PageLost, PostcopyError
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.sidecar import bitmap

from ..source import PageSource
from .compression import DEFAULT_LEVEL, check_installed, packed
from .snapshots import Snapshot, check_writable, publish
from .stores import Store

CHUNK_BYTES = 256 << 10
"""Default. 64 KiB packs 3 % worse, 1 MiB makes reading one page three times as long."""
COLLECTING_MARK = "postcopy-gc.running"
PACKING_MARK = ".packing"
"""An object with this ending is there while a pack runs: ``gc`` must not remove what it is about to name."""

Progress = Callable[[int], object]
"""Is called with the bytes that have been dealt with since the last call."""

_ZERO_PAGE = bytes(PAGE_4K)


@dataclass(slots=True)
class Counted:
    """What a pack did. Bytes; ``uploaded`` as compressed."""

    size: int = 0
    chunks: int = 0
    unique: int = 0
    new: int = 0
    uploaded: int = 0
    zero_pages: int = 0


@dataclass(slots=True)
class _Work:
    """What the threads of one pack share; ``known`` has the ids of chunks that some thread takes care of."""

    store: Store
    digest: str
    level: int
    counted: Counted = field(default_factory=Counted)
    known: set[bytes] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def chunk(self, data: bytes | None, length: int) -> tuple[bytes, int, list[int]]:
        """Put a chunk (None: zeros) into the store unless it is there. Its id, length and zero pages."""
        if data is None:
            data = bytes(length)
        chunk = digest_of(data, self.digest)
        with self.lock:
            first = chunk not in self.known
            self.known.add(chunk)
        if first:
            key, sent = chunk_path(chunk), 0
            if not self.store.has(key):
                frame = packed(data, self.level)
                sent = len(frame) if self.store.put(key, frame) else 0
            with self.lock:
                self.counted.unique += 1
                self.counted.new += sent > 0
                self.counted.uploaded += sent
        return chunk, length, zero_pages(data)


def zero_pages(data: bytes) -> list[int]:
    """The numbers of the pages in ``data`` that are all zeros; the last one may be partial."""
    whole, rest = divmod(len(data), PAGE_4K)
    found = [page for page in range(whole) if data.startswith(_ZERO_PAGE, page * PAGE_4K)]
    if rest and not any(data[whole * PAGE_4K :]):
        found.append(whole)
    return found


def pack(
    source: PageSource,
    store: Store,
    name: str,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    digest: str = SHA256,
    level: int = DEFAULT_LEVEL,
    threads: int = 0,
    progress: Progress = lambda done: None,
) -> tuple[Snapshot, Counted]:
    """Pack all of ``source``. Raises PostcopyError: PageLost when a page cannot be read, StoreFailed."""
    check_installed()
    check_writable(store)
    work = _Work(store, digest, level)
    threads = threads or min(32, 8 + 2 * (os.cpu_count() or 1))
    chunks: list[tuple[bytes, int]] = []
    zeros: list[int] = []
    with _marked(store, name), ThreadPoolExecutor(threads, "pack") as pool:
        try:
            for chunk, length, zero in _in_order(pool, work, _pieces(source, chunk_bytes), 2 * threads):
                first = len(chunks) * chunk_bytes // PAGE_4K
                zeros += [first + page for page in zero]
                chunks.append((chunk, length))
                progress(length)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        work.counted.size, work.counted.chunks = source.size, len(chunks)
        work.counted.zero_pages = len(zeros)
        image = bitmap(page_count(source.size, PAGE_4K), zeros)
        return publish(store, name, index_of(chunks, chunk_bytes, digest), image), work.counted


def _pieces(source: PageSource, chunk_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    for offset in range(0, source.size, chunk_bytes):
        length = min(chunk_bytes, source.size - offset)
        try:
            data = source.read(offset, length)
        except PageLost as error:
            raise PostcopyError(f"cannot pack {source.name}: at byte {offset}: {error}") from None
        yield (None if data is None else bytes(data)), length


def _in_order(
    pool: ThreadPoolExecutor, work: _Work, pieces: Iterator[tuple[bytes | None, int]], most: int
) -> Iterator[tuple[bytes, int, list[int]]]:
    """The result of every piece, in order; at most ``most`` pieces are in memory."""
    waiting = deque(pool.submit(work.chunk, *piece) for piece in islice(pieces, most))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(work.chunk, *piece) for piece in islice(pieces, 1))


@contextmanager
def _marked(store: Store, name: str) -> Iterator[None]:
    """The store shows that this pack runs. Raises PostcopyError while a ``gc`` runs."""
    mark = f"{name}{PACKING_MARK}"
    store.put(mark, b"postcopy pack\n", replace=True)
    try:
        if store.has(COLLECTING_MARK):
            raise PostcopyError(
                f"postcopy gc runs in {store.shown}: wait for its end (it was killed? remove {COLLECTING_MARK} there)"
            )
        yield
    finally:
        store.delete([mark])
