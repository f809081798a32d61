"""A store: objects by key, in a directory here (``DirectoryStore``) or elsewhere (``object_stores``).

Keys are relative paths with ``/``. An object appears whole or not at all, and several programs may write at once."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from postcopy_kernel.filesystem import sync_file_system
from postcopy_protocol.errors import PostcopyError

LEFT_OVER = ".tmp-postcopy-"
"""Begins the name of a temporary file: what a killed program leaves."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class StoreFailed(PostcopyError):
    """A store did not do what was asked. The text names the store and the cause, and holds no secret."""


class Missing(StoreFailed):
    """The store has no such object."""


class Refused(StoreFailed):
    """The store does not let these credentials do it; asking again does not help."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An object: its key, and its size in bytes."""

    key: str
    size: int


OnAnswer = Callable[[], object]


def ignore() -> None:
    """An ``OnAnswer`` for a caller that measures nothing."""


class Store(Protocol):
    """``shown`` names it to people. Every method raises StoreFailed; several threads may call at once."""

    shown: str
    writable: bool

    def get(self, key: str, limit: int, on_answer: OnAnswer = ignore) -> bytes:
        """The object. ``on_answer`` is called when the answer begins. Raises Missing; StoreFailed also for one of more
        than ``limit`` bytes."""

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        """Write an object. Without ``replace`` one that is there stays, and the answer is False. With it the object is
        safe from a loss of power at the end."""

    def has(self, key: str) -> bool:
        """Is there such an object, which is not empty?"""

    def list(self) -> Iterator[Entry]:
        """The objects that are in no folder: indexes and sidecars."""

    def walk(self) -> Iterator[Entry]:
        """All objects."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are missing are no error."""

    def settle(self) -> None:
        """Return when all that was put before is safe from a loss of power."""


class DirectoryStore:
    """A directory of this machine. A chunk is written to a temporary file beside it, and renamed."""

    writable = True

    def __init__(self, path: str) -> None:
        self.shown = path
        self._path = path
        self._numbers = count()
        self._made: set[str] = set()
        self._lock = threading.Lock()

    def get(self, key: str, limit: int, on_answer: OnAnswer = ignore) -> bytes:
        try:
            fd = os.open(self._at(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._failed("read", key, error) from None
        on_answer()
        with open(fd, "rb", buffering=0) as file:
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise StoreFailed(f"{self._at(key)} is no file")
                if found.st_size > limit:
                    raise StoreFailed(f"{self._at(key)} has {found.st_size} bytes, more than {limit}")
                return file.read(limit + 1)
            except OSError as error:
                raise self._failed("read", key, error) from None

    def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        if not replace and self.has(key):
            return False
        path = self._at(key)
        folder = os.path.dirname(path)
        temporary = os.path.join(folder, f"{LEFT_OVER}{os.getpid()}-{next(self._numbers)}")
        try:
            self._make(folder)
            fd = os.open(temporary, _NEW_FILE, 0o666)
            try:
                with open(fd, "wb", buffering=0) as file:
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    if replace:
                        os.fsync(fd)
                    else:  # the disk begins at once, so that ``settle`` has less to wait for
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise self._failed("write", key, error) from None
        return True

    def has(self, key: str) -> bool:
        try:
            return os.stat(self._at(key)).st_size > 0
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failed("read", key, error) from None

    def list(self) -> Iterator[Entry]:
        return self._entries("")

    def walk(self) -> Iterator[Entry]:
        yield from self._entries("")
        try:
            with os.scandir(self._path) as entries:
                folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError as error:
            raise self._failed("read", "", error) from None
        for folder in folders:
            yield from self._entries(folder)

    def _entries(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(self._at(folder)) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        yield Entry(os.path.join(folder, entry.name), entry.stat(follow_symlinks=False).st_size)
        except OSError as error:
            raise self._failed("read", folder, error) from None

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                os.unlink(self._at(key))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._failed("remove", key, error) from None
            with suppress(OSError):  # others are in it, or it is needed again
                os.rmdir(os.path.dirname(self._at(key)))
                self._made.discard(os.path.dirname(self._at(key)))

    def settle(self) -> None:
        try:
            sync_file_system(self._path)
        except OSError as error:
            raise self._failed("write", "", error) from None

    def _at(self, key: str) -> str:
        return os.path.join(self._path, key) if key else self._path

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            os.makedirs(folder, exist_ok=True)
            with self._lock:
                self._made.add(folder)

    def _failed(self, what: str, key: str, error: OSError) -> StoreFailed:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and what == "read"
        kind = Missing if missing else Refused if isinstance(error, PermissionError) else StoreFailed
        return kind(f"cannot {what} {self._at(key)}: {error.strerror}")
