"""Where a worker takes the bytes of a local block from: a file, a function, or nothing at all (zeros).

A source answers one question: at which address of this process do the bytes of a range of whole pages lie, ready for
UFFDIO_COPY? Python never touches the bytes of a file: COPY reads them from the mapping, and a file that was cut gives
EFAULT there instead of a SIGBUS here. Because a cut *inside* a page would be copied as data followed by zeros with no
error at all (measured on 6.18), the file's size is looked at before every page and its size and time before every
window.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from postcopy_kernel.memory import Mapping
from postcopy_protocol.errors import PageLost
from postcopy_protocol.messages import BlockGrant

Handler = Callable[[int, int], "bytes | bytearray | memoryview | None"]

_BASE_PAGE = 4096


class SourceChanged(Exception):
    """The file is not what it was when it was served: no missing page can be trusted to it any more."""


class HandlerFailed(Exception):
    """A user's handler function raised, or gave something that is not the bytes that were asked for."""


class PageSource(Protocol):
    """What a block asks of its source; offsets and lengths are bytes, multiples of the block's page size."""

    linear: int
    """Address of offset 0 when the whole block can be copied from one place, else 0."""
    descriptor: int
    """The file's descriptor when its size must be looked at before a page, else -1."""
    size: int

    def locate(self, offset: int, length: int) -> int:
        """Address of the bytes; raises PageLost, SourceChanged or HandlerFailed."""

    def check(self) -> None:
        """Raise SourceChanged if the source is not what it was."""

    def content(self, offset: int, length: int) -> bytes:
        """The bytes themselves, padded with zeros: for the rare comparison with a page that was there before."""

    def forget(self) -> None:
        """Drop page-table entries that reading has cost this process; the data stays where it is."""


class FilePages:
    """The bytes of a file, copied straight from its mapping."""

    def __init__(self, grant: BlockGrant, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = grant.source_size
        self._time = grant.source_mtime_ns
        self._page_size = grant.page_size
        mapped = -(-self.size // _BASE_PAGE) * _BASE_PAGE
        self._mapping = Mapping.of(descriptor, mapped, shared=True, writable=False)
        # A last huge page that the file fills only in part has no mapping behind its end: it is staged.
        self._staged_from = grant.size - grant.size % grant.page_size if mapped % grant.page_size else 1 << 62
        self._staging: Mapping | None = None
        self.linear = 0 if mapped % grant.page_size else self._mapping.address

    def locate(self, offset: int, length: int) -> int:
        if offset + length <= self._staged_from:
            return self._mapping.address + offset
        return self._staged(offset, length)

    def _staged(self, offset: int, length: int) -> int:
        if self._staging is None or self._staging.length < length:
            self._staging = Mapping.anonymous(length)
        view = self._staging.view(length, writable=True)
        wanted, done = min(length, self.size - offset), 0
        while done < wanted:
            got = os.preadv(self.descriptor, [view[done:wanted]], offset + done)
            if not got:
                raise SourceChanged(f"the file ends at {offset + done}, it had {self.size} bytes")
            done += got
        return self._staging.address

    def check(self) -> None:
        try:
            now = os.fstat(self.descriptor)
        except OSError as error:  # ESTALE: a network file system has lost it
            raise SourceChanged(f"the file cannot be looked at: {error.strerror}") from None
        if now.st_size != self.size:
            raise SourceChanged(f"the file has {now.st_size} bytes, it had {self.size}")
        if now.st_mtime_ns != self._time:
            raise SourceChanged("the file was written to since it is served")

    def content(self, offset: int, length: int) -> bytes:
        wanted = max(0, min(length, self.size - offset))
        data = os.pread(self.descriptor, wanted, offset)
        if len(data) != wanted:
            raise SourceChanged(f"the file ends at {offset + len(data)}, it had {self.size} bytes")
        return data.ljust(length, b"\0")

    def forget(self) -> None:
        from postcopy_kernel.memory import DONTNEED

        self._mapping.advise(DONTNEED)


class ZeroPages:
    """Pages that are zeros by intention (``zero:SIZE``), copied from one stretch of untouched anonymous memory."""

    descriptor = -1
    linear = 0

    def __init__(self, grant: BlockGrant, stretch: int) -> None:
        self.size = grant.size
        self._zeros = Mapping.anonymous(max(stretch, grant.page_size))

    def locate(self, offset: int, length: int) -> int:
        return self._zeros.address

    def check(self) -> None:
        return None

    def content(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def forget(self) -> None:
        return None


class NoPages:
    """No source, for ``reason``: a quarantined client, a handler that cannot be imported. What is missing is poisoned
    for this client only."""

    descriptor = -1
    linear = 0

    def __init__(self, grant: BlockGrant, reason: str) -> None:
        self.size = grant.size
        self._reason = reason

    def locate(self, offset: int, length: int) -> int:
        raise HandlerFailed(self._reason)

    def check(self) -> None:
        return None

    def content(self, offset: int, length: int) -> bytes:
        raise HandlerFailed(self._reason)

    def forget(self) -> None:
        return None


class Elsewhere(Exception):
    """The bytes are not to be had in this process: the supervisor is asked for the page."""


class RemotePages:
    """Pages that come over a return path, placed by the supervisor: a worker only asks and wakes."""

    descriptor = -1
    linear = 0

    def __init__(self, grant: BlockGrant) -> None:
        self.size = grant.size

    def locate(self, offset: int, length: int) -> int:
        raise Elsewhere

    def check(self) -> None:
        return None

    def content(self, offset: int, length: int) -> bytes:
        raise HandlerFailed("a page that nobody of ours placed cannot be compared with its source here")

    def forget(self) -> None:
        return None


class HandlerPages:
    """Pages made by a user's function ``(offset, length) -> bytes | None``; it may raise PageLost.

    The last call of a block is asked only for bytes inside the block's exact size; the rest of the page is zeros.
    """

    descriptor = -1
    linear = 0

    def __init__(self, grant: BlockGrant, function: Handler, stretch: int) -> None:
        self.size = grant.size
        self._function = function
        self._staging = Mapping.anonymous(max(stretch, grant.page_size))
        self._view = self._staging.view(writable=True)

    def locate(self, offset: int, length: int) -> int:
        made = self._made(offset, min(length, self.size - offset))
        self._view[: len(made)] = made
        if len(made) < length:
            self._view[len(made) : length] = bytes(length - len(made))
        return self._staging.address

    def _made(self, offset: int, length: int) -> memoryview:
        try:
            result = self._function(offset, length)
        except PageLost:
            raise
        except Exception as error:
            raise HandlerFailed(f"{type(error).__name__}: {error}") from error
        if isinstance(result, PageLost):
            raise result
        if result is None:
            return memoryview(bytes(length))
        try:
            made = memoryview(result).cast("B")
        except TypeError:
            raise HandlerFailed(f"gave {type(result).__name__}, wanted bytes, None or PageLost") from None
        if len(made) != length:
            raise HandlerFailed(f"gave {len(made)} bytes, was asked for {length}")
        return made

    def check(self) -> None:
        return None

    def content(self, offset: int, length: int) -> bytes:
        return bytes(self._made(offset, min(length, self.size - offset))).ljust(length, b"\0")

    def forget(self) -> None:
        return None
