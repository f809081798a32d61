"""The chunks of one store, for any number of snapshots in it: from memory, from the cache of this host, or fetched
from another host that has them, else from the store.

Whatever gave a chunk, it is checked before a byte of it is used. A chunk is fetched once at a time, in this process and
on this host. A fetch that fails is tried again, after a pause that doubles and varies. Then the chunk is *lost*:
its readers get the reason at once, while a thread continues to try, ever more rarely, and reports it when it has it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from postcopy_protocol.caibx import Bytes, chunk_path
from postcopy_protocol.errors import PageLost, PostcopyError

from .chunk_cache import TOUCH_SECONDS, CachedChunk, ChunkCache
from .compression import WrongChunk, check, largest_frame, unpacked
from .pace import Pace
from .stores import Missing, Refused, Store, StoreFailed

if TYPE_CHECKING:
    from .peers import Peers

TRIES = 4
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
FETCH_SECONDS = 10.0
"""After it no further try begins."""
PEER_SECONDS = 3.0
"""How long other hosts are asked, all of them together, before the store is."""
WAIT_SECONDS = 8.0
"""How long a chunk is left to another process that fetches it. All of it together is shorter than a source's
``--read-timeout``, after which the pages are lost without a reason."""
STORE_PAUSE = 2.0
"""So long after a failure the store counts as busy: other hosts are asked first, even loaded ones."""
ROOM_SECONDS = 5.0
"""Background waits at most so long for room at the store."""
FIRST_HEAL, LONGEST_HEAL = 0.5, 30.0
MEMORY = 64 << 20
"""Bytes of chunks that are kept in memory."""
OPEN_CHUNKS = 1024
"""Files of the cache that are open."""

log = logging.getLogger(__name__)

OnHealed = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk: its id, the length and the digest that it must have; where it is in a block that ``peers`` may have."""

    id: bytes
    length: int
    digest: str
    offset: int = 0
    peers: Peers | None = None


@dataclass(slots=True)
class _Lost:
    wanted: Wanted
    reason: str
    pause: float
    due: float


class ChunkReader:
    """``fetched`` counts the chunks that came from the store, ``bytes`` theirs as compressed."""

    def __init__(self, store: Store, cache: ChunkCache | None, sleep: Callable[[float], object] = time.sleep) -> None:
        self.fetched = self.bytes = 0
        self.pace = Pace()
        """Of the store."""
        self._room = threading.Condition()
        self._hurried: set[bytes] = set()  # chunks being read that a client has come to wait for
        self._store_failed = -1e9
        self._store, self._cache, self._sleep = store, cache, sleep
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._open: OrderedDict[bytes, tuple[CachedChunk, float]] = OrderedDict()
        self._running: dict[bytes, Future[bytes]] = {}
        self._lost: dict[bytes, _Lost] = {}
        self._changed = threading.Condition(self._lock)
        self._healer: threading.Thread | None = None
        self._logged = -1e9
        self.on_healed: list[OnHealed] = []

    def read_now(self, wanted: Wanted, inside: int, length: int) -> Bytes:
        """Bytes of a chunk from memory or the cache. Raises BlockingIOError for all others. One thread calls it."""
        data = self._memory.get(wanted.id)
        if data is not None:
            return data[inside : inside + length]
        if self._cache is None:
            raise BlockingIOError
        try:
            return self._cached(wanted, wait=False).read(inside, length, wait=False)
        except ValueError as error:
            self._forget(wanted.id, error)
            raise BlockingIOError from None

    def _cached(self, wanted: Wanted, *, wait: bool) -> CachedChunk:
        """The open file of a chunk. Raises BlockingIOError when it is not in the cache."""
        assert self._cache is not None
        now = time.monotonic()
        found, touched = self._open.get(wanted.id, (None, 0.0))
        if found is None:
            found, touched = self._cache.open(wanted.id, wanted.length, wait=wait), now
            if found is None:
                raise BlockingIOError
        elif now - touched < TOUCH_SECONDS:
            return found
        else:
            found.touch()
        self._open[wanted.id] = found, now
        if len(self._open) > OPEN_CHUNKS:
            self._open.popitem(last=False)[1][0].close()
        return found

    def _forget(self, chunk: bytes, error: Exception) -> None:
        found = self._open.pop(chunk, None)
        if found is not None:
            found[0].close()
        if self._cache is not None:
            self._cache.damaged(chunk, error)

    def chunk(self, wanted: Wanted, *, urgent: bool = True) -> bytes:
        """The whole chunk. Waits; any thread may call. Chunks that are not ``urgent`` wait until the store has room.
        Raises PageLost."""
        with self._lock:
            data = self._memory.get(wanted.id)
            if data is not None:
                self._memory.move_to_end(wanted.id)
                return data
            lost = self._lost.get(wanted.id)
            if lost is not None:
                raise PageLost(lost.reason)
            running = self._running.get(wanted.id)
            if running is None:
                mine = self._running[wanted.id] = Future()
            elif urgent:
                self._hurried.add(wanted.id)
        if running is not None:
            if urgent:
                with self._room:
                    self._room.notify_all()
            return running.result()
        try:
            data = self._read(wanted, TRIES, urgent=urgent)
        except BaseException as error:
            reason = str(error) if isinstance(error, PostcopyError) else f"{type(error).__name__}: {error}"
            self._give_up(wanted, reason)
            self._ended(wanted.id)
            mine.set_exception(PageLost(reason))
            raise PageLost(reason) from None
        self._remember(wanted.id, data)
        self._ended(wanted.id)
        mine.set_result(data)
        return data

    def _ended(self, chunk: bytes) -> None:
        with self._lock:
            del self._running[chunk]
            self._hurried.discard(chunk)

    def knows(self, chunk: bytes) -> bool:
        """Is it in memory, or being fetched, or lost?"""
        return chunk in self._memory or chunk in self._running or chunk in self._lost

    def _read(self, wanted: Wanted, tries: int, *, urgent: bool = True) -> bytes:
        """From the cache, else from another host or the store. Raises PostcopyError."""
        data = self._from_cache(wanted)
        if data is not None:
            return data
        if not urgent:
            self._await_room(wanted.id)
        if self._cache is None:
            return self._fetch(wanted, tries)
        with self._cache.fetching(wanted.id, WAIT_SECONDS) as waited:
            data = self._from_cache(wanted) if waited else None
            if data is None:
                data = self._fetch(wanted, tries)
                self._cache.put(wanted.id, data)
        return data

    def _from_cache(self, wanted: Wanted) -> bytes | None:
        if self._cache is None:
            return None
        found = self._cache.open(wanted.id, wanted.length)
        if found is None:
            return None
        try:
            data = bytes(found.read(0, wanted.length, wait=True))
            check(data, wanted.id, wanted.digest)
        except (OSError, ValueError, WrongChunk) as error:
            self._cache.damaged(wanted.id, error)
            return None
        finally:
            found.close()
        return data

    def _fetch(self, wanted: Wanted, tries: int) -> bytes:
        deadline, pause = time.monotonic() + FETCH_SECONDS, FIRST_PAUSE
        for number in range(1, tries + 1):
            if wanted.peers is not None and (near := self._from_peers(wanted, wanted.peers, deadline)) is not None:
                return near
            try:
                frame = self._get(wanted)
                data = unpacked(frame, wanted.id, wanted.length, wanted.digest)
            except (Missing, Refused):
                raise
            except (StoreFailed, WrongChunk) as error:
                failed, self._store_failed = error, time.monotonic()
            else:
                with self._lock:
                    self.fetched += 1
                    self.bytes += len(frame)
                return data
            if number == tries or time.monotonic() + pause > deadline:
                break
            log.debug("chunk %s: %s; it is fetched again", wanted.id.hex()[:16], failed)
            self._sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)
        if isinstance(failed, WrongChunk):
            raise PostcopyError(f"chunk {wanted.id.hex()[:16]} in {self._store.shown} is damaged: {failed}")
        raise failed

    def _from_peers(self, wanted: Wanted, peers: Peers, deadline: float) -> bytes | None:
        now = time.monotonic()
        ready = self.pace.room > 0 and now - self._store_failed > STORE_PAUSE
        return peers.chunk(
            wanted.id, wanted.offset, wanted.length, wanted.digest, ready, min(deadline, now + PEER_SECONDS)
        )

    def _get(self, wanted: Wanted) -> bytes:
        """The frame of a chunk, once. Raises StoreFailed."""
        with self._room:
            self.pace.sent()
        began = time.monotonic()

        def on_answer() -> None:
            with self._room:
                self.pace.answered(time.monotonic() - began, time.monotonic())

        try:
            return self._store.get(chunk_path(wanted.id), largest_frame(wanted.length), on_answer)
        except StoreFailed:
            self.pace.failed()
            raise
        finally:
            with self._room:
                self.pace.ended()
                self._room.notify_all()

    def _await_room(self, chunk: bytes) -> None:
        with self._room:
            self._room.wait_for(lambda: self.pace.room or chunk in self._hurried, ROOM_SECONDS)

    def _remember(self, chunk: bytes, data: bytes) -> None:
        with self._lock:
            if chunk not in self._memory:
                self._memory[chunk] = data
                self._memory_bytes += len(data)
            while self._memory_bytes > MEMORY and len(self._memory) > 1:
                self._memory_bytes -= len(self._memory.popitem(last=False)[1])

    def _give_up(self, wanted: Wanted, reason: str) -> None:
        """The chunk is lost, until the healer has it."""
        log.log(self._level(), "chunk %s is lost: %s", wanted.id.hex()[:16], reason)
        with self._changed:
            self._lost[wanted.id] = _Lost(wanted, reason, FIRST_HEAL, time.monotonic() + FIRST_HEAL)
            if self._healer is None:
                self._healer = threading.Thread(target=self._heal, name="healer", daemon=True)
                self._healer.start()
            self._changed.notify()

    def _level(self) -> int:
        """A store that is away makes many lines, of which one a second is for people."""
        now = time.monotonic()
        shown = now - self._logged > 1.0
        self._logged = now if shown else self._logged
        return logging.WARNING if shown else logging.DEBUG

    def _heal(self) -> None:
        while True:
            with self._changed:
                while not self._lost or (wait := min(lost.due for lost in self._lost.values()) - time.monotonic()) > 0:
                    self._changed.wait(wait if self._lost else None)
                lost = min(self._lost.values(), key=lambda lost: lost.due)
            self._try_to_heal(lost)

    def _try_to_heal(self, lost: _Lost) -> None:
        try:
            data = self._read(lost.wanted, 1)
        except Exception as error:
            with self._lock:
                lost.pause = min(2 * lost.pause, LONGEST_HEAL)
                lost.due = time.monotonic() + lost.pause * random.uniform(0.5, 1.5)
                lost.reason = str(error) if isinstance(error, PostcopyError) else lost.reason
            return
        self._remember(lost.wanted.id, data)
        with self._lock:
            del self._lost[lost.wanted.id]
            for other in self._lost.values():  # the store may be back
                other.due = min(other.due, time.monotonic())
        log.log(self._level(), "chunk %s is there again", lost.wanted.id.hex()[:16])
        for on_healed in self.on_healed:
            on_healed(lost.wanted.id)
