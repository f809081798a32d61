"""Placing in a block: what each answer of the kernel means, which marks it leaves, and real page sources."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from postcopy_kernel.filestamp import Stamp
from postcopy_protocol.messages import BlockGrant
from postcopy_protocol.received_map import FLAGS, LEASED, LOST, MISSING, PLACING, RECEIVED, SHARED, WATCHED
from postcopy_workers.page_sources import FilePages, HandlerFailed, NoPages, SourceChanged
from postcopy_workers.placing import COPY_DONTWAKE, Block, Calls
from tests.conftest import SourceFile
from tests.simulated.kernel import failure
from tests.simulated.world import Kind, World

PAGES = 8


class Bench:
    """One block of one worker that nobody interrupts; ``refuse`` makes the next COPYs fail."""

    def __init__(self, *, kind: str = "file", page_size: int = 4096, pages: int = PAGES) -> None:
        self.world = World([Kind("private")], pages, kind=kind, page_size=page_size)
        kernel = self.world.kernel
        self.refuse: list[int] = []
        self.asked: list[int] = []

        def ioctl(descriptor: int, request: int, buffer: bytearray) -> int:
            self.asked.append(request)
            if self.refuse:
                raise failure(self.refuse.pop(0))
            return kernel.ioctl(descriptor, request, buffer)

        self.block: Block = self.world.block(Calls(ioctl, kernel.lseek, kernel.pread, kernel.pwrite))

    def place(self, page: int) -> None:
        """Another worker places a page and marks it."""
        self.world.memory.pages[page] = self.world.source.page(page)
        self.world.map[page] = RECEIVED

    def widen(self, first: int, end: int) -> int:
        own = self.block.own
        return self.block.widen(own.userfaultfd, own.address, first, end, COPY_DONTWAKE)

    @property
    def marks(self) -> list[int]:
        return list(self.world.map[:-FLAGS])

    @property
    def whole(self) -> bool:
        pages = self.world.memory.pages
        return all(content == self.world.source.page(page) for page, content in pages.items())


def test_marks_follow_the_pages() -> None:
    bench = Bench()
    assert bench.block.fill_own(2, 3) == 0
    assert bench.marks == [MISSING] * 2 + [RECEIVED] * 3 + [MISSING] * 3
    assert sorted(bench.world.memory.pages) == [2, 3, 4] and bench.whole


def test_a_present_page_in_the_middle_is_passed() -> None:
    bench = Bench()
    bench.place(3)
    assert bench.block.fill_own(1, 5) == 0
    assert bench.marks[1:6] == [RECEIVED] * 5 and bench.whole
    assert bench.block.placed_by_others == 1


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOENT, errno.ESRCH, errno.EFAULT, errno.ENOSPC, errno.EINVAL])
def test_what_stops_a_copy_is_told_and_marks_nothing(code: int) -> None:
    bench = Bench()
    bench.refuse.append(code)
    assert bench.block.fill_own(2, 2) == code
    assert bench.marks[2:4] == [PLACING, PLACING]
    assert len(bench.asked) == 1, "what the kernel refuses outright is not tried again here"


def test_a_part_is_marked_and_the_rest_tells_why() -> None:
    bench = Bench()
    bench.world.memory.room = 2
    assert bench.block.fill_own(1, 4) == errno.ENOSPC
    assert bench.marks[:5] == [MISSING, RECEIVED, RECEIVED, PLACING, PLACING]
    bench.world.memory.room = None
    assert bench.block.fill_own(3, 2) == 0
    assert bench.marks[1:5] == [RECEIVED] * 4


def test_a_window_takes_what_is_missing_and_stops_at_what_nobody_marked() -> None:
    bench = Bench()
    bench.place(2)
    bench.world.pollute(5)
    assert bench.widen(0, PAGES) == 4
    assert bench.marks == [RECEIVED] * 5 + [MISSING] * 3
    assert bench.world.memory.pages[5] == bytes(4096), "repaired by nobody: it may have been written to since"


def test_a_window_leaves_alone_what_another_worker_has_in_hand() -> None:
    bench = Bench()
    bench.world.map[1] = PLACING
    bench.world.map[3] = LOST
    assert bench.widen(0, 5) == 3
    assert bench.marks[:5] == [RECEIVED, PLACING, RECEIVED, LOST, RECEIVED]


@pytest.mark.parametrize("shared", [False, True])
def test_a_page_that_differs_is_mended_only_where_nobody_may_write(shared: bool) -> None:
    bench = Bench()
    bench.world.map[PAGES + SHARED] = shared
    bench.world.pollute(3)
    assert bench.block.fill_own(3, 1) == 0
    assert bench.marks[3] == RECEIVED
    assert bench.world.memory.pages[3] == (bytes(4096) if shared else bench.world.source.page(3))
    assert bench.world.reported("polluted") == ([] if shared else [3])


def test_another_workers_page_is_neither_mended_nor_reported() -> None:
    bench = Bench()
    bench.place(3)
    bench.world.map[3] = PLACING
    assert bench.block.accept_present(3) == 0
    assert bench.marks[3] == RECEIVED and bench.world.reports == []


def test_a_changed_file_mends_nothing() -> None:
    bench = Bench()
    bench.place(3)
    bench.world.map[3] = PLACING
    bench.world.source.rewrite()
    with pytest.raises(SourceChanged):
        bench.block.accept_present(3)
    assert bench.whole


def test_an_empty_pool_of_huge_pages_says_eexist_and_means_enospc() -> None:
    bench = Bench(page_size=2 << 20, pages=3)
    assert not bench.block.present(1)
    bench.world.memory.room = 0
    assert bench.block.fill_own(1, 1) == errno.ENOSPC
    bench.world.memory.room = None
    assert bench.block.fill_own(1, 1) == 0
    assert bench.block.present(1) and not bench.block.present(2)
    assert bench.block.all_present(1, 2) and not bench.block.all_present(0, 3)


def test_presence_is_asked_of_the_kernel() -> None:
    bench = Bench()
    bench.place(2)
    bench.place(3)
    bench.world.map[0] = RECEIVED
    assert [bench.block.present(page) for page in range(4)] == [False, False, True, True]
    assert bench.block.all_present(2, 4)
    assert not bench.block.all_present(1, 4) and not bench.block.all_present(2, PAGES)


def test_a_shrinking_file_is_never_padded_with_zeros(source_file: SourceFile) -> None:
    path = source_file(3 * 4096 + 100)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pages = _file_pages(descriptor)
        data = path.read_bytes()
        pages.check()
        assert pages.content(3 * 4096, 4096) == data[3 * 4096 :].ljust(4096, b"\0")
        os.truncate(path, 2 * 4096 + 50)
        assert pages.content(4096, 4096) == data[4096:8192]
        for offset in (2 * 4096, 3 * 4096):
            with pytest.raises(SourceChanged):
                pages.content(offset, 4096)
        with pytest.raises(SourceChanged):
            pages.check()
    finally:
        os.close(descriptor)


def _file_pages(descriptor: int, trust: int = LEASED) -> FilePages:
    stamp = Stamp.of(descriptor)
    pages = -(-stamp.size // 4096)
    grant = BlockGrant(0, "ram0", stamp.size, 4096, pages, "file", "", stamp.size, bytes(stamp), 0, 1, 2)
    return FilePages(grant, descriptor, memoryview(bytearray((*bytes(pages + 1), trust))))


def test_without_a_lease_bytes_are_read_and_then_the_file_is_looked_at(source_file: SourceFile) -> None:
    path = source_file(3 * 4096 + 100)
    data = path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pages = _file_pages(descriptor, WATCHED)
        for offset, length in ((0, 8192), (8192, 8192)):
            at = pages.locate(offset, length)
            assert ctypes.string_at(at, length) == data[offset : offset + length].ljust(length, b"\0")
        facts = path.stat()
        with path.open("r+b") as file:
            file.write(b"new")
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        with pytest.raises(SourceChanged, match="put back"):
            pages.locate(4096, 4096)
    finally:
        os.close(descriptor)


def test_a_file_that_cannot_be_mapped_is_read() -> None:
    path = "/sys/kernel/btf/vmlinux"
    if not Path(path).exists():
        pytest.skip("no file that cannot be mapped")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pages = _file_pages(descriptor)
        assert pages.linear == 0 or ctypes.string_at(pages.locate(0, 4096), 4096)
        assert ctypes.string_at(pages.locate(4096, 4096), 4096) == os.pread(descriptor, 4096, 4096)
        pages.forget()
    finally:
        os.close(descriptor)


def test_no_pages_are_no_zeros_either() -> None:
    pages = NoPages(BlockGrant(0, "ram0", 4096, 4096, 1, "quarantined", "", 0, b"", 0, 1, -1), "why")
    with pytest.raises(HandlerFailed, match="why"):
        pages.locate(0, 4096)
