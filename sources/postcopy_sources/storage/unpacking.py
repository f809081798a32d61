"""``postcopy unpack``: a snapshot becomes a file again, every chunk checked; and ``inspect --check``.

The file is written beside its place and renamed when it is whole. Chunks that an interrupted unpack has written are
checked there and not fetched again. Zero chunks become holes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from postcopy_protocol.caibx import LARGEST_CHUNK, chunk_path, digest_of
from postcopy_protocol.errors import BadInput, PostcopyError

from .compression import WrongChunk, check_installed, largest_frame, unpacked
from .snapshots import Snapshot
from .stores import Missing, Store

MEMORY = 256 << 20
"""Bytes of chunks that are in memory at once."""
MOST_THREADS = 32
PARTIAL = ".postcopy-partial"

Progress = Callable[[int], object]
Item = TypeVar("Item")


@dataclass(slots=True)
class Extracted:
    """What an unpack did, in bytes: the image, what was found written already, what was fetched (as compressed)."""

    size: int = 0
    resumed: int = 0
    fetched: int = 0


def fetch(store: Store, chunk: bytes, length: int, digest: str) -> tuple[bytes, int]:
    """A chunk, checked, and the bytes of its frame. Raises StoreFailed, WrongChunk."""
    frame = store.get(chunk_path(chunk), largest_frame(length))
    return unpacked(frame, chunk, length, digest), len(frame)


def unpack(store: Store, snapshot: Snapshot, path: str, progress: Progress = lambda done: None) -> Extracted:
    """Write the image to ``path``. Raises PostcopyError, OSError."""
    check_installed()
    done = Extracted(snapshot.index.size)
    with _partial(path) as file:
        resumes = os.fstat(file).st_size > 0
        os.ftruncate(file, snapshot.index.size)
        zeros: dict[int, bytes] = {}

        def extract(number: int) -> int:
            chunk, (start, end) = snapshot.index.id(number), snapshot.index.span(number)
            length, digest = end - start, snapshot.index.digest
            if length not in zeros:
                zeros[length] = digest_of(bytes(length), digest)
            if resumes and digest_of(os.pread(file, length, start), digest) == chunk:
                done.resumed += length
                return length
            if chunk == zeros[length]:
                if resumes:
                    _write(file, bytes(length), start)
                return length
            data, sent = _fetched(store, snapshot, number)
            _write(file, data, start)
            done.fetched += sent
            return length

        for length in _parallel(extract, range(len(snapshot.index)), _threads(snapshot)):
            progress(length)
        os.fsync(file)
    return done


def _fetched(store: Store, snapshot: Snapshot, number: int) -> tuple[bytes, int]:
    """A chunk by its number. Raises PostcopyError that names it."""
    chunk, (start, end) = snapshot.index.id(number), snapshot.index.span(number)
    try:
        return fetch(store, chunk, end - start, snapshot.index.digest)
    except Missing:
        raise PostcopyError(f"chunk {chunk.hex()} of {snapshot.name} is missing in {store.shown}") from None
    except WrongChunk as error:
        raise PostcopyError(f"chunk {chunk.hex()} of {snapshot.name} in {store.shown} is damaged: {error}") from None


def check(store: Store, snapshot: Snapshot, progress: Progress = lambda done: None) -> tuple[list[str], list[str]]:
    """Fetch every different chunk: the ids of those that are missing, and of those that are damaged, with the cause.
    Raises StoreFailed when the store fails otherwise."""
    check_installed()
    missing, damaged = list[str](), list[str]()
    digest = snapshot.index.digest

    def look(item: tuple[bytes, int]) -> int:
        chunk, length = item
        try:
            fetch(store, chunk, length, digest)
        except Missing:
            missing.append(chunk.hex())
        except WrongChunk as error:
            damaged.append(f"{chunk.hex()}: {error}")
        return length

    for length in _parallel(look, snapshot.index.unique().items(), _threads(snapshot)):
        progress(length)
    return missing, damaged


def _threads(snapshot: Snapshot) -> int:
    largest = max(1, min(snapshot.index.largest, LARGEST_CHUNK))
    return max(2, min(MOST_THREADS, MEMORY // (2 * largest)))


def _parallel(call: Callable[[Item], int], items: Iterable[Item], threads: int) -> Iterator[int]:
    """Call for every item, and yield the results as they come. The first exception ends it."""
    rest = iter(items)
    with ThreadPoolExecutor(threads, "unpack") as pool:
        running: set[Future[int]] = {pool.submit(call, item) for item in islice(rest, 2 * threads)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                running |= {pool.submit(call, item) for item in islice(rest, len(done))}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _partial(path: str) -> Iterator[int]:
    """A locked file beside ``path``, renamed to it at the end. It stays when the work is interrupted."""
    folder, name = os.path.split(path)
    if not name or os.path.isdir(path):
        raise BadInput(f"cannot write {path}: it is a directory")
    partial = os.path.join(folder, name + PARTIAL)
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PostcopyError(f"another unpack writes {path}") from None
        yield file
        os.replace(partial, path)
    finally:
        os.close(file)


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
