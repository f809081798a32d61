"""Chunks on the disk of this host, shared by all page sources of one user: bounded, and never believed unchecked.

A chunk lies unpacked under ``xx/ID``, and behind it the SHA-256 of each of its pages and of that table. So one page is
read and checked alone, in microseconds. A file that was torn by a crash, cut or changed is noticed, removed and fetched
again; nothing needs to be written in order, and nothing is synced. Reading a chunk sets its time, and the chunks with
the oldest times are removed first.

A lock on a byte of one file, chosen by the id, says that a process of this host fetches that chunk. The kernel gives it
back when the process dies. A cache that cannot be written is still read; without any, only memory is used."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

from postcopy_protocol.caibx import ID_BYTES
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_4K, page_count

CACHE_DIR = "POSTCOPY_CHUNK_CACHE"
DEFAULT_SIZE = 10 << 30
TOUCH_SECONDS = 60.0
WARN_SECONDS = 60.0
_LOCK_FILE = "lock"
_FLOCK = "hhqqi"  # struct flock: type, whence, start, length, pid
_WAITS = (0.001, 0.02)
_SHARE_TO_KEEP = 0.9
_STEPS = 64
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOATIME

log = logging.getLogger(__name__)


def default_directory(environ: dict[str, str] | os._Environ[str]) -> str:
    """``$POSTCOPY_CHUNK_CACHE``, else /var/cache/postcopy for root, else ~/.cache/postcopy."""
    if chosen := environ.get(CACHE_DIR):
        return chosen
    if os.geteuid() == 0:
        return "/var/cache/postcopy/chunks"
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "postcopy", "chunks")


def table_of(chunk: bytes, name: bytes) -> bytes:
    """What follows a chunk in its file: the digest of every page, and of the id and these digests."""
    digests = [hashlib.sha256(chunk[at : at + PAGE_4K]).digest() for at in range(0, len(chunk), PAGE_4K)]
    table = b"".join(digests)
    return table + hashlib.sha256(name + table).digest()


class CachedChunk:
    """An open file of the cache, whose table was checked. Raises OSError or ValueError for one that is damaged."""

    __slots__ = ("_fd", "_table", "length")

    def __init__(self, path: str, name: bytes, length: int, *, wait: bool) -> None:
        """Without ``wait`` BlockingIOError is raised for a table that is not in memory."""
        self.length = length
        self._fd = os.open(path, _READ)
        try:
            size = (page_count(length, PAGE_4K) + 1) * ID_BYTES
            if os.fstat(self._fd).st_size != length + size:
                raise ValueError("its size is another one")
            data = bytearray(size)
            if os.preadv(self._fd, (data,), length, 0 if wait else os.RWF_NOWAIT) != size:
                raise ValueError("it is cut short")
            self._table = bytes(data[:-ID_BYTES])
            if hashlib.sha256(name + self._table).digest() != data[-ID_BYTES:]:
                raise ValueError("its table is damaged")
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, inside: int, length: int, *, wait: bool) -> bytearray:
        """Bytes of it, in whole pages unless they end with the chunk, checked. Raises BlockingIOError without ``wait``,
        ValueError, OSError."""
        data = bytearray(length)
        if os.preadv(self._fd, (data,), inside, 0 if wait else os.RWF_NOWAIT) != length:
            if not wait:
                raise BlockingIOError
            raise ValueError("it is cut short")
        first = inside // PAGE_4K
        view = memoryview(data)
        for number, at in enumerate(range(0, length, PAGE_4K), first):
            if (
                hashlib.sha256(view[at : at + PAGE_4K]).digest()
                != self._table[number * ID_BYTES : (number + 1) * ID_BYTES]
            ):
                raise ValueError("a page of it is damaged")
        return data

    def touch(self) -> None:
        """It was used just now."""
        with suppress(OSError):
            os.utime(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class ChunkCache:
    """The cache in ``directory``, of at most about ``limit`` bytes. Raises BadInput for a directory that others may
    write; one that cannot be made is reported, and then nothing is kept."""

    def __init__(self, directory: str, limit: int) -> None:
        self.directory, self._limit = directory, limit
        self._numbers = count()
        self._written = 0
        self._lock = threading.Lock()
        self._trimming = threading.Lock()
        self._warned = -1e9
        self._locks = -1
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
            _check_ours(directory)
        except OSError as error:
            self._warn(error)
        self._open_locks()
        self.trim()

    def open(self, chunk: bytes, length: int, *, wait: bool = True) -> CachedChunk | None:
        """The cached chunk; None: it is not there. A damaged one is removed. Raises BlockingIOError (no ``wait``)."""
        path = self._path(chunk)
        try:
            found = CachedChunk(path, chunk, length, wait=wait)
        except BlockingIOError:
            raise
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.damaged(chunk, error)
            return None
        found.touch()
        return found

    def damaged(self, chunk: bytes, error: Exception) -> None:
        """Remove a chunk that cannot be read or is not what it should be."""
        log.warning("chunk cache %s: %s is removed: %s", self.directory, chunk.hex()[:16], error)
        with suppress(OSError):
            os.unlink(self._path(chunk))

    def put(self, chunk: bytes, data: bytes) -> None:
        """Keep a chunk that was checked. A failure is reported once a minute and costs only speed."""
        path = self._path(chunk)
        temporary = f"{path}.tmp-{os.getpid()}-{next(self._numbers)}"
        table = table_of(data, chunk)
        try:
            try:
                _write(temporary, data, table)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                _write(temporary, data, table)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            self._warn(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.trim(0.5)
            return
        with self._lock:
            self._written += len(data) + len(table)
            full = self._written > self._limit // _STEPS
            self._written = 0 if full else self._written
        if full:
            self.trim()

    def keep_file(self, name: str, data: bytes) -> None:
        """Keep a copy of an index or a sidecar, under a name that says where it is from. It is not trimmed."""
        path = self._kept(name)
        temporary = f"{path}.tmp-{os.getpid()}-{next(self._numbers)}"
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            _write(temporary, hashlib.sha256(data).digest(), data)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            self._warn(error)

    def kept_file(self, name: str) -> bytes | None:
        """The copy; None: there is none that is whole."""
        try:
            with open(self._kept(name), "rb") as file:
                digest, data = file.read(ID_BYTES), file.read()
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == digest else None

    def _kept(self, name: str) -> str:
        return os.path.join(self.directory, "index", hashlib.sha256(name.encode()).hexdigest())

    def trim(self, share: float = _SHARE_TO_KEEP) -> None:
        """Remove the chunks that were used longest ago when the limit is exceeded (or, with another ``share``, so that
        only this share of what is there stays)."""
        if not self._trimming.acquire(blocking=False):
            return
        try:
            found = sorted(self._files())
            total = sum(size for _, size, _ in found)
            if share == _SHARE_TO_KEEP and total <= self._limit:
                return
            keep = min(self._limit, total) * share
            for _, size, path in found:
                if total <= keep:
                    break
                with suppress(OSError):
                    os.unlink(path)
                total -= size
        except OSError as error:
            self._warn(error)
        finally:
            self._trimming.release()

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Time, size and path of every chunk. What killed programs left counts as the oldest."""
        now = time.time()
        with os.scandir(self.directory) as folders:
            names = [
                folder.path for folder in folders if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False)
            ]
        for name in names:
            with suppress(FileNotFoundError), os.scandir(name) as files:
                for file in files:
                    with suppress(FileNotFoundError):
                        found = file.stat(follow_symlinks=False)
                        left = ".tmp-" in file.name and abs(now - found.st_mtime) > TOUCH_SECONDS
                        # A time in the future: the clock was wrong, then or now.
                        yield 0.0 if left else min(found.st_mtime, now), found.st_size, file.path

    @contextmanager
    def fetching(self, chunk: bytes, patience: float) -> Iterator[bool]:
        """While it lasts, no other process of this host fetches this chunk. Waits for one that does, at most
        ``patience`` seconds. True: another one had it first, so the chunk may be in the cache now."""
        start = int.from_bytes(chunk[:7], "big")
        deadline, pause, waited = time.monotonic() + patience, _WAITS[0], False
        while not (locked := self._set_lock(fcntl.F_WRLCK, start)) and self._locks >= 0 and time.monotonic() < deadline:
            time.sleep(pause)
            pause, waited = min(2 * pause, _WAITS[1]), True
        try:
            yield waited
        finally:
            if locked:
                self._set_lock(fcntl.F_UNLCK, start)

    def _set_lock(self, kind: int, start: int) -> bool:
        if self._locks < 0:
            return False
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, 1, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                self._locks = -1  # a file system without locks: every process fetches for itself
            return False
        return True

    def _open_locks(self) -> None:
        path = os.path.join(self.directory, _LOCK_FILE)
        with suppress(OSError):
            self._locks = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self) -> None:
        """Give back the locks. What is kept stays."""
        if self._locks >= 0:
            os.close(self._locks)
            self._locks = -1

    def __enter__(self) -> ChunkCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, chunk: bytes) -> str:
        name = chunk.hex()
        return os.path.join(self.directory, name[:2], name)

    def _warn(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._warned > WARN_SECONDS:
            self._warned = now
            log.warning("chunk cache %s: chunks are not kept: %s", self.directory, error.strerror)


def _write(path: str, data: bytes, table: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.writev(fd, (data, table)) != len(data) + len(table):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def _check_ours(directory: str) -> None:
    """What is in it is given to clients as far as its digests are right, and those are in it too."""
    found = os.stat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BadInput(f"chunk cache {directory}: other users may write it: choose another with --chunk-cache")
