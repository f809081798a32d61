"""What has arrived of a VM's memory: a sparse memfd for each RAM block, which takes pages that are not requested yet.

A page is missing, data, or zeros. STALE is a missing page that has old bytes in the memfd: they are removed before it
counts as zeros. A read that finds a page missing waits at that page, and goes on when it comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence

from postcopy_kernel.memory import create_memfd, punch
from postcopy_protocol.errors import BadInput, PageLost
from postcopy_protocol.qemu_format import PAGE, QemuBlock, offered_names

MISSING, DATA, ZEROS = 0, 1, 2
_ZERO_MARK = bytes([ZEROS])

Call = Callable[[], object]
Wanted = Callable[[int, int, bool], object]  # receives offset, length, urgency


class StagedBlock:
    """A RAM block as page source (see PageSource). ``wanted`` is called with offset, length and urgency of a read
    that has to wait."""

    page_size = PAGE

    def __init__(self, name: str, block: QemuBlock, identity: str, wanted: Wanted) -> None:
        """Raises BadInput when there is no memory for it."""
        self.name, self.size, self.qemu = name, block.size, block
        self._identity, self._wanted = identity, wanted
        try:
            self._memory = create_memfd(f"qemu-{name}", block.size)
        except OSError as error:
            raise BadInput(f"no memory for RAM block {name} of {block.size} bytes: {error.strerror}") from None
        self.pages = block.size // PAGE
        self.present = bytearray(self.pages)
        self.received = 0
        self.usable = True
        """False: the VM still runs, and what is here may change."""
        self.offered = True
        self.lost = ""  # why missing pages never come
        self._stale: set[int] = set()  # missing or zero pages with old bytes
        self._waiting: dict[int, list[tuple[int, Call]]] = {}  # by page: end of the range, and what to call

    def identity(self) -> str:
        return self._identity

    def read_now(self, offset: int, length: int) -> bytes | None:
        """See PageSource. Raises BlockingIOError for what has not come, PageLost for what never will."""
        if not self._check(offset, length):
            return None
        return os.pread(self._memory, length, offset)

    read = read_now

    def read_into(self, offset: int, view: memoryview) -> bool:
        return self._check(offset, len(view)) and os.preadv(self._memory, (view,), offset) == len(view)

    def _check(self, offset: int, length: int) -> bool:
        """False: all of it is zeros."""
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        if not self.usable or self.present.find(MISSING, first, end) >= 0:
            if self.lost:
                raise PageLost(self.lost)
            raise BlockingIOError
        return self.present.find(DATA, first, end) >= 0

    def when_ready(self, offset: int, length: int, urgent: bool, call: Call) -> None:
        """Call ``call``, in the thread of the loop, when ``read_now`` will not raise BlockingIOError."""
        self._wait(offset // PAGE, -(-(offset + length) // PAGE), call)
        self._wanted(offset, length, urgent)

    def _wait(self, page: int, end: int, call: Call) -> None:
        missing = self.present.find(MISSING, page, end)
        if self.usable and missing < 0:
            call()
        else:
            self._waiting.setdefault(missing if missing >= 0 else page, []).append((end, call))

    def place(self, offset: int, pages: Sequence[memoryview]) -> int:
        """Neighbouring pages have come; returns how many of them are new."""
        first = offset // PAGE
        end = first + len(pages)
        if os.pwritev(self._memory, pages, offset) != PAGE * len(pages):
            raise OSError("no memory for pages of the VM")
        if self._stale:
            self._stale.difference_update(range(first, end))
        return self._mark(first, end, b"\1" * len(pages))

    def zero(self, offset: int, length: int) -> int:
        """As ``place``, for pages of zeros."""
        first, end = offset // PAGE, (offset + length) // PAGE
        if self._stale or self.present.find(DATA, first, end) >= 0:
            punch(self._memory, offset, length)
            self._stale.difference_update(range(first, end))
        return self._mark(first, end, _ZERO_MARK * (end - first))

    def discard(self, offset: int, length: int) -> int:
        """What came of these pages is old; returns how many."""
        first, end = offset // PAGE, (offset + length) // PAGE
        at = self.present.find(DATA, first, end)
        while at >= 0:
            self._stale.add(at)
            at = self.present.find(DATA, at + 1, end)
        old = end - first - self.present.count(MISSING, first, end)
        self.present[first:end] = bytes(end - first)
        self.received -= old
        return old

    def _mark(self, first: int, end: int, marks: bytes) -> int:
        new = self.present.count(MISSING, first, end)
        self.present[first:end] = marks
        self.received += new
        if self._waiting and self.usable:
            for page in range(first, end):
                for stop, call in self._waiting.pop(page, ()):
                    self._wait(page + 1, stop, call)
        return new

    def use(self) -> None:
        """From now on what is here does not change."""
        self.usable = True
        self._wake()

    def lose(self, reason: str) -> None:
        """Missing pages never come."""
        self.lost = reason
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for page, waiters in waiting.items():
            for end, call in waiters:
                if self.lost:
                    call()
                else:
                    self._wait(page, end, call)

    def close(self) -> None:
        os.close(self._memory)

    def waited_for(self) -> list[int]:
        """Offsets of the missing pages at which reads wait."""
        return [page * PAGE for page in self._waiting]

    def bitmap(self) -> bytes:
        """Which pages are here, as QEMU wants to know it: little endian, whole words of 64 bits."""
        ones = int(self.present.translate(b"0" + b"1" * 255)[::-1], 2)
        return ones.to_bytes(-(-self.pages // 64) * 8, "little")


class VmMemory:
    """All RAM blocks of a VM; a PageSink of the stream. ``identity``: distinguishes this moment of this VM."""

    def __init__(self, identity: str, *, usable: bool = True) -> None:
        self.blocks: list[StagedBlock] = []
        self.wanted: Callable[[int, int, int, bool], object] = _ignore
        """Receives block, offset, length and urgency of a read that has to wait."""
        self.received = self.pages = 0
        self._identity, self._usable = identity, usable

    def begin(self, blocks: tuple[QemuBlock, ...]) -> None:
        for place, (name, block) in enumerate(zip(offered_names(blocks), blocks, strict=True)):
            staged = StagedBlock(name, block, f"{self._identity}-{name}", self._asker(place))
            staged.usable = self._usable
            self.blocks.append(staged)
            self.pages += staged.pages

    def _asker(self, place: int) -> Wanted:
        return lambda offset, length, urgent: self.wanted(place, offset, length, urgent)

    def place(self, block: int, offset: int, pages: Sequence[memoryview]) -> None:
        self.received += self.blocks[block].place(offset, pages)

    def zero(self, block: int, offset: int, length: int) -> None:
        self.received += self.blocks[block].zero(offset, length)

    def discard(self, block: int, offset: int, length: int) -> None:
        self.received -= self.blocks[block].discard(offset, length)

    def keep_only(self, names: Container[str]) -> None:
        """Other blocks of QEMU do not belong to the migration: nothing comes, and they are not offered."""
        for block in self.blocks:
            block.offered = block.qemu.name in names
        self.pages = sum(block.pages for block in self.blocks if block.offered)

    @property
    def complete(self) -> bool:
        return bool(self.blocks) and self.received == self.pages

    def use(self) -> None:
        """The VM stands still: what is here does not change any more."""
        for block in self.blocks:
            block.use()

    def close(self) -> None:
        for block in self.blocks:
            block.close()

    def lose(self, reason: str) -> None:
        """Missing pages never come."""
        for block in self.blocks:
            block.lose(reason)


def _ignore(block: int, offset: int, length: int, urgent: bool) -> None:
    return None
