"""A RAM block in this process's address space.

A block stays attached until ``close()`` or the end of the process, also without a reference to it: an array made of it
may still exist. ``close()`` with such an array (or slice) alive raises BufferError, as ``mmap.mmap`` does.

Some libraries (``torch.frombuffer``) keep only a reference to ``buf`` itself, and use its address without an export
that ``close()`` could see. So the memory stays attached, behind a closed block, until the last reference to ``buf`` is
gone."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from operator import index
from typing import Literal, Protocol

from postcopy_kernel.memory import POPULATE_READ, Mapping, advise
from postcopy_protocol.geometry import PAGE_2M
from postcopy_protocol.received_map import RECEIVED
from postcopy_protocol.sizes import format_size

from . import populate
from .attach_socket import OpenedBlock
from .deadline import Deadline
from .errors import PageLost
from .populate import PopulateJob
from .session import Session

log = logging.getLogger("postcopy")

Mode = Literal["private", "shared"]

_COUNT_AT_ONCE = 1 << 20
_GRACE = 0.2  # seconds for a helper thread to finish its step, before close() makes the memory inaccessible


class BlockOwner(Protocol):
    """What a block needs of the client that attached it."""

    directory: str

    def detach(self, block: Block) -> None:
        """Unmap ``block`` and inform the supervisor."""

    def ending_of(self, block: Block) -> str | None:
        """Why the supervisor of ``block`` ended, if it gave a reason."""

    def cause_of(self, block: Block, offset: int) -> str:
        """Why the page at ``offset`` is lost, in the words of its source; empty when they are not known."""

    def reduce(self, block: Block) -> tuple[object, ...]:
        """A pickle of ``block``: the function that attaches it again, and its arguments."""


class Block:
    """Memory of ``size`` bytes whose pages arrive when they are touched. Made by ``postcopy.attach``.

    ``mode`` ``"private"``: writes stay in this process (copy-on-write); ``"shared"``: every client sees them.
    ``page_size`` is 4096 or 2 MiB. A touch of a lost page is SIGBUS; ``ensure`` raises PageLost instead.

    Example::

        with postcopy.attach("ram0") as block:
            block.prefetch(0, 1 << 20)           # request the first MiB in the background
            header = bytes(block.buf[:4096])     # waits for one page
            block.ensure(timeout=60.0)           # wait for all pages
    """

    def __init__(self, client: BlockOwner, session: Session, opened: OpenedBlock, mapping: Mapping) -> None:
        self.name = opened.name
        self.size = opened.size
        self.page_size = opened.page_size
        self.mode = opened.mode
        self.runtime_dir = client.directory
        self.pages = opened.pages
        self.identity = opened.identity()
        self.session = session
        self.number = opened.number
        self.mapping = mapping
        self._client = client
        self._closed = self._detached = False
        self._last_use: weakref.ref[memoryview] | None = None
        self._forbidden = ""
        self._buf = mapping.view(opened.size)
        self._received = Mapping.of(opened.received, opened.pages, writable=False)
        self._map = self._received.view()
        self.reset_locks()

    @property
    def buf(self) -> memoryview:
        """The memory: exactly ``size`` bytes, writable (see ``readonly``). Raises ValueError once the block is
        closed."""
        self._require_open()
        return self._buf

    @property
    def __array_interface__(self) -> dict[str, object]:
        """numpy.asarray(block) without a copy. The slice is what the array keeps alive, and what close() notices."""
        return {"version": 3, "shape": (self.size,), "typestr": "|u1", "data": self.buf[:]}

    def __len__(self) -> int:
        return self.size

    @property
    def received(self) -> memoryview:
        """The received map, one byte a page (see ``postcopy_protocol.received_map``), read-only. A mark is
        never early and may be late. Raises ValueError once the block is closed."""
        self._require_open()
        return self._map

    def ensure(self, offset: int = 0, length: int | None = None, timeout: float | None = None) -> None:
        """Wait until the pages of the range are present, without the GIL.

        Raises PageLost for a lost page, PageTimeout (a TimeoutError) after ``timeout`` seconds, ValueError for a range
        outside the block. Ctrl-C works; a few MiB may still arrive after it.

        Example::

            block.ensure(0, 1 << 20, timeout=5.0)
        """
        start, stop = self._whole_pages(offset, length)
        if self._forbidden:
            raise self.lost(start)
        if start < stop:
            populate.wait_for(PopulateJob(self, start, stop), Deadline(timeout))

    async def ensure_async(self, offset: int = 0, length: int | None = None, timeout: float | None = None) -> None:
        """``ensure`` for asyncio: the event loop goes on meanwhile. Raises the same exceptions; may be cancelled.

        A few threads of this process wait for the pages of all such calls, however many there are.

        Example::

            await asyncio.gather(*(block.ensure_async(offset, 1 << 20, timeout=60.0) for offset in offsets))
        """
        start, stop = self._whole_pages(offset, length)
        if self._forbidden:
            raise self.lost(start)
        if start < stop:
            present = self.resident(offset, length) == 1.0
            await populate.wait_async(PopulateJob(self, start, stop), Deadline(timeout), present=present)

    def prefetch(self, offset: int = 0, length: int | None = None) -> None:
        """Request the pages of the range and return at once. Raises ValueError for a range outside the block."""
        start, stop = self._whole_pages(offset, length)
        if start < stop:
            populate.prefetcher.submit(PopulateJob(self, start, stop))

    def resident(self, offset: int = 0, length: int | None = None) -> float:
        """The fraction of the range's pages that is marked in the received map: never too high, maybe too low."""
        start, stop = self._whole_pages(offset, length)
        first, last = start // self.page_size, stop // self.page_size
        if first == last:
            return 1.0
        wanted = bytes((RECEIVED,))
        present = sum(
            bytes(self._map[at : min(at + _COUNT_AT_ONCE, last)]).count(wanted)
            for at in range(first, last, _COUNT_AT_ONCE)
        )
        return present / (last - first)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Release ``buf`` and unmap the memory. A second call does nothing.

        Raises BufferError while a slice of ``buf`` or an array made of the block is alive; the block stays open then.
        While something else refers to ``buf`` itself the memory stays mapped: it may be a library that uses its
        address.
        """
        with self._closing:
            if self._closed:
                return
            self._release_view()
            self._closed = True
            self._last_use = weakref.ref(self._buf, self._detach)
            del self._buf
            if self._last_use() is None:
                self._detach()

    def _release_view(self) -> None:
        try:
            self._buf.release()
        except BufferError as error:
            raise self._in_use() from error
        if self.mapping.exported:  # a slice does not prevent release(), but it shows the same memory
            self._buf = self.mapping.view(self.size)
            raise self._in_use()

    def _detach(self, _: object = None) -> None:
        """Unmap: now nothing can refer to the memory."""
        with self._closing:
            if self._detached:
                return
            self._detached = True
            self._client.detach(self)
            self._map.release()
            self._received.close()

    def _in_use(self) -> BufferError:
        return BufferError(f"block {self.name} cannot be closed: views of its memory (slices, arrays) still exist")

    def __enter__(self) -> Block:
        self._require_open()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except BufferError:
            if error is None:  # otherwise frames of that error hold the views, and the error is more important
                raise

    def __reduce__(self) -> tuple[object, ...]:
        """A pickle holds name, directory and mode; unpickling attaches."""
        self._require_open()
        return self._client.reduce(self)

    def __repr__(self) -> str:
        page = "2M" if self.page_size == PAGE_2M else "4K"
        state = "closed" if self._closed else f"attached at {self.mapping.address:#x}"
        return f"<postcopy.Block {self.name!r}: {format_size(self.size)}, {self.mode}, {page} pages, {state}>"

    def populate(self, offset: int, length: int) -> int | None:
        """Populate a range of whole pages. Returns 0, an errno, or None when the block is closed. Releases the GIL."""
        with self._steps:
            if self._closed:
                return None
            self._busy += 1
        try:
            return advise(self.mapping.address + offset, length, POPULATE_READ)
        finally:
            with self._steps:
                self._busy -= 1
                self._steps.notify_all()

    def idle(self, timeout: float) -> bool:
        """Wait until no helper thread accesses the memory. False after ``timeout`` seconds."""
        with self._steps:
            return self._steps.wait_for(lambda: self._busy == 0, timeout)

    def lost(self, offset: int) -> PageLost:
        """The exception for the lost page at ``offset``, with the words of its source or handler if they are known."""
        ending = self._client.ending_of(self)
        if self._forbidden:
            reason = f"it could not be attached after a fork: {self._forbidden}"
        elif ending is not None:
            reason = f"the supervisor ended ({ending})"
        else:
            reason = self._client.cause_of(self, offset) or "its source cannot supply it"
        text = f"block {self.name}: the page at offset {offset} is lost: {reason}"
        return PageLost(text, block=self.name, offset=offset)

    def withdraw(self) -> None:
        """Stop helper threads from accessing the memory. Those that sleep in a fault are woken to find it forbidden."""
        if not self.idle(_GRACE):
            self.mapping.forbid()
            self.session.wake(self.mapping.address, self.mapping.length)
            self.idle(_GRACE * 25)

    def discard(self, *, keep_addresses: bool) -> None:
        """Undo the constructor, for a block that was not handed out."""
        self._closed = True
        if keep_addresses:
            self.mapping.forbid()
        self._buf.release()
        if not keep_addresses:
            self.mapping.close()
        self._map.release()
        self._received.close()

    def reset_locks(self) -> None:
        """New locks: in the constructor, and in a forked child, where the holders of the old locks do not exist."""
        self._closing = threading.RLock()
        self._steps = threading.Condition()
        self._busy = 0

    def adopt(self, session: Session, opened: OpenedBlock) -> None:
        """In a forked child: move this block to ``session``, at the same address."""
        received = Mapping.of(opened.received, opened.pages, writable=False)
        self._map.release()
        self._received.close()
        self.session, self.number = session, opened.number
        self._received, self._map = received, received.view()

    def forbid(self, reason: str) -> None:
        """In a forked child that could not attach: a touch is SIGSEGV, never zeros."""
        self.mapping.forbid()
        self._forbidden = reason
        log.error("block %s is not attached in process %d after a fork: %s", self.name, os.getpid(), reason)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"block {self.name} is closed")

    def _whole_pages(self, offset: int, length: int | None) -> tuple[int, int]:
        """The range, widened to whole pages. Raises ValueError outside the block, TypeError for what is no integer."""
        self._require_open()
        offset, length = index(offset), length if length is None else index(length)
        stop = self.size if length is None else offset + length
        if not 0 <= offset <= stop <= self.size:
            raise ValueError(f"bytes {offset} to {stop} are not inside block {self.name} of {self.size} bytes")
        if offset == stop:
            return 0, 0
        return offset - offset % self.page_size, -(-stop // self.page_size) * self.page_size
