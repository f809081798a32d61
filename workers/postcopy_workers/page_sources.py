"""Where a worker takes the bytes of a block from: a file, a function, zeros, or the supervisor (remote).

A source answers one question: at which address of this process are the bytes of a range of whole pages, ready for
UFFDIO_COPY? Under a lease COPY reads the bytes of a file from its mapping. Without a lease the file may change at any
time, and a cut *inside* a page would be copied as data followed by zeros without any error (measured on Linux 6.18). So
they are read into memory of our own, and the file's stamp is checked after that, before they are placed.

A file that is not cached is read as the faults ask for it: one page for a fault, a window and the next one for a
window. Left to itself the kernel reads the device's read-ahead around every page of a mapping: 8 MiB on some machines,
which takes 2 to 10 ms instead of 20 us.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Protocol

from postcopy_kernel.filedigest import PageDigests
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.memory import DONTNEED, RANDOM, Mapping
from postcopy_protocol.errors import PageLost, text_of
from postcopy_protocol.messages import BlockGrant
from postcopy_protocol.qemu_ram_file import runs_of
from postcopy_protocol.received_map import TRUST

_BASE_PAGE = 4096

Handler = Callable[[int, int], bytes | bytearray | memoryview | None]
"""A user's function that makes pages: the bytes of (offset, length), None for zeros; it may raise PageLost."""


class SourceChanged(Exception):
    """The file has changed since it is served: its missing pages cannot be served any more."""


class HandlerFailed(Exception):
    """A user's handler function raised, or did not return the requested bytes."""


class PageSource(Protocol):
    """What a block needs of its source. Offsets and lengths are bytes, multiples of the block's page size."""

    linear: int  # address of offset 0 when the whole block can be copied from one place, else 0
    descriptor: int  # the file's descriptor when its size must be checked before a page, else -1
    size: int

    def locate(self, offset: int, length: int) -> int:
        """Address of the bytes. Raises PageLost, SourceChanged, HandlerFailed or Elsewhere."""

    def check(self) -> None:
        """Raise SourceChanged if the source has changed since it is served."""

    def content(self, offset: int, length: int) -> bytes:
        """The bytes themselves, padded with zeros: for the rare comparison with a page that is present already."""

    def forget(self) -> None:
        """Drop the page-table entries of this process for the source; the data stays where it is."""


class FilePages:
    """The bytes of a file, copied straight from its mapping while a lease is held. Without a lease they are read first,
    and placed only if the file's stamp shows no change after that. A file that cannot be mapped is always read."""

    def __init__(
        self, grant: BlockGrant, descriptor: int, received: memoryview, digests: PageDigests | None = None
    ) -> None:
        self.descriptor = descriptor
        self.size = grant.source_size
        self._stamp = Stamp.from_bytes(grant.source_stamp)
        self._digests = digests
        self._received, self._trust_at = received, grant.pages + TRUST
        mapped = -(-self.size // _BASE_PAGE) * _BASE_PAGE
        self._mapping = _mapping_of(descriptor, mapped)
        if self._mapping is not None:
            self._mapping.advise(RANDOM)
        self._probe = (bytearray(1),)
        # The mapping ends before the end of a last huge page that the file fills only in part: that page is staged.
        self._staged_from = grant.size - grant.size % grant.page_size if mapped % grant.page_size else 1 << 62
        self._staging: Mapping | None = None
        self.linear = 0 if self._mapping is None or mapped % grant.page_size else self._mapping.address

    def locate(self, offset: int, length: int) -> int:
        mapping = self._mapping
        if mapping is None or self._received[self._trust_at] or offset + length > self._staged_from:
            return self._staged(offset, length)
        if length > _BASE_PAGE:
            self._read_ahead(offset, length)
        return mapping.address + offset

    def _read_ahead(self, offset: int, length: int) -> None:
        """Start reading a window and the one behind it, in large pieces, unless they are in the page cache."""
        end = min(offset + 2 * length, self.size)
        try:
            os.preadv(self.descriptor, self._probe, end - 1, os.RWF_NOWAIT)
        except OSError:  # not cached; or EOPNOTSUPP: this file system does not say what is cached
            os.posix_fadvise(self.descriptor, offset, end - offset, os.POSIX_FADV_WILLNEED)

    def _staged(self, offset: int, length: int) -> int:
        if self._staging is None or self._staging.length < length:
            self._staging = Mapping.anonymous(length)
        view = self._staging.view(length, writable=True)
        wanted = min(length, self.size - offset)
        try:
            self._fill(view[:wanted], offset)
        except OSError as error:
            raise PageLost(f"its source cannot be read: {error.strerror}") from error
        view[wanted:] = bytes(length - wanted)
        self.check()
        return self._staging.address

    def _fill(self, view: memoryview, offset: int) -> None:
        self._read_file(view, offset)

    def _read_file(self, view: memoryview, offset: int) -> None:
        """Read from a place in the file. Raises SourceChanged, OSError."""
        done = 0
        while done < len(view):
            got = os.preadv(self.descriptor, [view[done:]], offset + done)
            if not got:
                raise SourceChanged(f"the file ends at {offset + done}, it was longer")
            done += got
        self._compare(view, offset)

    def _compare(self, data: memoryview, offset: int) -> None:
        if self._digests is not None and self._digests.differs(data, offset):
            raise SourceChanged("the file was written to through a mapping since it is served")

    def check(self) -> None:
        try:
            reason = self._stamp.change(self.descriptor)
        except OSError as error:  # ESTALE: a network file system has lost it
            reason = f"its size cannot be read: {error.strerror}"
        if reason:
            raise SourceChanged(reason)

    def content(self, offset: int, length: int) -> bytes:
        wanted = max(0, min(length, self.size - offset))
        data = os.pread(self.descriptor, wanted, offset)
        if len(data) != wanted:
            raise SourceChanged(f"the file ends at {offset + len(data)}, it had {self.size} bytes")
        self._compare(memoryview(data), offset)
        return data.ljust(length, b"\0")

    def forget(self) -> None:
        if self._mapping is not None:
            self._mapping.advise(DONTNEED)


class MappedRamPages(FilePages):
    """A RAM block in a mapped-ram file of QEMU: a bitmap says which pages are in the file, the others are zeros. A page
    is always read, because its neighbour in the file may be no page at all."""

    def __init__(
        self, grant: BlockGrant, descriptor: int, received: memoryview, digests: PageDigests | None = None
    ) -> None:
        super().__init__(grant, descriptor, received, digests)
        bitmap, pages, _ = grant.detail.split(":")
        self._bitmap, self._pages = int(bitmap), int(pages)
        self.size, self.linear = grant.size, 0

    def locate(self, offset: int, length: int) -> int:
        return self._staged(offset, length)

    def _fill(self, view: memoryview, offset: int) -> None:
        first, count = offset // _BASE_PAGE, -(-len(view) // _BASE_PAGE)
        at, end = first // 8, (first + count + 7) // 8
        bits = os.pread(self.descriptor, end - at, self._bitmap + at)
        for start, stop, there in runs_of(bits, first, count):
            part = view[start * _BASE_PAGE - offset : stop * _BASE_PAGE - offset]
            if there:
                self._read_file(part, self._pages + start * _BASE_PAGE)
            else:
                part[:] = bytes(len(part))

    def content(self, offset: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self.size - offset)))
        self._fill(memoryview(data), offset)
        return bytes(data).ljust(length, b"\0")


def _mapping_of(descriptor: int, length: int) -> Mapping | None:
    """A read-only mapping of a file; None where its file system cannot map it (ENODEV: FUSE with direct_io, sysfs)."""
    try:
        return Mapping.of(descriptor, length, shared=True, writable=False)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EACCES):
            return None
        raise


class Unmapped:
    """What all sources but a file have in common: nothing to check, and no mapping of a whole block."""

    descriptor = -1
    linear = 0

    def __init__(self, grant: BlockGrant) -> None:
        self.size = grant.size

    def check(self) -> None:
        return None

    def forget(self) -> None:
        return None


class ZeroPages(Unmapped):
    """Pages that are meant to be zeros (``zero:SIZE``), copied from one stretch of untouched anonymous memory."""

    def __init__(self, grant: BlockGrant, stretch: int) -> None:
        super().__init__(grant)
        self._zeros = Mapping.anonymous(max(stretch, grant.page_size))

    def locate(self, offset: int, length: int) -> int:
        return self._zeros.address

    def content(self, offset: int, length: int) -> bytes:
        return bytes(length)


class NoPages(Unmapped):
    """No source, for ``reason``: a quarantined client, or a handler that cannot be imported. Missing pages are poisoned
    for this client only."""

    def __init__(self, grant: BlockGrant, reason: str) -> None:
        super().__init__(grant)
        self._reason = reason

    def locate(self, offset: int, length: int) -> int:
        raise HandlerFailed(self._reason)

    def content(self, offset: int, length: int) -> bytes:
        raise HandlerFailed(self._reason)


class Elsewhere(Exception):
    """The bytes are not available in this process: the page must be requested from the supervisor."""


class RemotePages(Unmapped):
    """Pages that come over a return path and are placed by the supervisor: a worker only requests and wakes."""

    def locate(self, offset: int, length: int) -> int:
        raise Elsewhere

    def content(self, offset: int, length: int) -> bytes:
        raise HandlerFailed("a page that no worker of ours placed cannot be compared with its source here")


class HandlerPages(Unmapped):
    """Pages made by a user's function (see ``Handler``). It is called only for bytes inside the block's exact size; the
    rest of the last page is zeros."""

    def __init__(self, grant: BlockGrant, function: Handler, stretch: int) -> None:
        super().__init__(grant)
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
        """What the function returns. Whatever it raises, SystemExit and KeyboardInterrupt too, costs this page only."""
        process = os.getpid()
        try:
            return _bytes_of(self._function(offset, length), length)
        except HandlerFailed:
            raise
        except PageLost as error:
            raise PageLost(text_of(error)) from error
        except BaseException as error:
            text = text_of(error)
            raise HandlerFailed(f"{type(error).__name__}{': ' if text else ''}{text}") from error
        finally:
            if os.getpid() != process:  # a child that the function has forked: it must not serve the client, too
                os._exit(os.EX_OK)

    def content(self, offset: int, length: int) -> bytes:
        return bytes(self._made(offset, min(length, self.size - offset))).ljust(length, b"\0")


def _bytes_of(result: object, length: int) -> memoryview:
    """The ``length`` bytes that a function has returned. Raises PageLost, and HandlerFailed for anything else."""
    if isinstance(result, PageLost):
        raise result
    if result is None:
        return memoryview(bytes(length))
    try:
        made = memoryview(result).cast("B")  # type: ignore[arg-type]
    except TypeError:
        raise HandlerFailed(f"returned {type(result).__name__}; bytes, None or PageLost is needed") from None
    if len(made) != length:
        raise HandlerFailed(f"returned {len(made)} bytes, {length} are needed")
    return made
