"""Placing and waking within one process: what every ioctl answers, and who runs on.

That nobody was woken is not waited for but read off the kernel's gauge: a waiter stands in ``total`` until it is woken.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopy_kernel import abi, memory
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import (
    EHWPOISON,
    UFFDIO_COPY,
    FaultFlag,
    Feature,
    Outcome,
    PageFault,
    RegisterMode,
    Status,
    open_userfaultfd,
    outcome_of,
    stuck_faults,
)
from tests.kernel.touching import Arena, Child, Page, Reader, Toucher, fetch, next_events, next_fault

pytestmark = pytest.mark.usefixtures("require_userfaultfd")


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena() as made:
        yield made


@pytest.fixture
def page() -> Page:
    return Page(bytes(range(1, 129)))


def waiters(arena: Arena) -> int:
    return stuck_faults(arena.ufd.fd)[1]


def test_a_fault_is_told_answered_and_over(arena: Arena, page: Page) -> None:
    assert arena.ufd.read() == []
    toucher = Toucher(arena.page(2))
    assert next_fault(arena.ufd) == PageFault(arena.page(2), FaultFlag(0), 0)
    assert toucher.asleep
    assert arena.ufd.copy(arena.page(2), page.address, PAGE) == Outcome(Status.DONE, PAGE)
    assert toucher.result() == 0
    assert fetch(arena.page(2), PAGE) == page.bytes
    assert arena.ufd.read() == []


def test_a_write_is_told_as_one(arena: Arena, page: Page) -> None:
    toucher = Toucher(arena.page(0), write=True)
    assert next_fault(arena.ufd).flags == FaultFlag.WRITE
    arena.ufd.copy(arena.page(0), page.address, PAGE)
    assert toucher.result() == 0


def test_the_address_is_the_pages_beginning(arena: Arena, page: Page) -> None:
    toucher = Reader(arena.page(1) + 17)
    assert next_fault(arena.ufd).address == arena.page(1)  # no Feature.EXACT_ADDRESS: rounded down
    arena.ufd.copy(arena.page(1), page.address, PAGE)
    assert toucher.result() == page.bytes[17:18]
    with Arena(features=Feature.EXACT_ADDRESS) as exact:
        toucher = Reader(exact.page(1) + 17)
        assert next_fault(exact.ufd).address == exact.page(1) + 17
        exact.ufd.copy(exact.page(1), page.address, PAGE)
        assert toucher.result() == page.bytes[17:18]


def test_without_wake_the_waiter_sleeps_until_it_is_woken(arena: Arena, page: Page) -> None:
    toucher = Toucher(arena.page(0))
    next_fault(arena.ufd)
    assert arena.ufd.copy(arena.page(0), page.address, PAGE, wake=False).status is Status.DONE
    assert waiters(arena) == 1
    arena.ufd.wake(arena.page(0), PAGE)
    assert waiters(arena) == 0
    assert toucher.result() == 0


def test_present_wakes_nobody(arena: Arena, page: Page) -> None:
    toucher = Toucher(arena.page(0))
    next_fault(arena.ufd)
    os.pwrite(arena.fd, page.bytes, 0)  # somebody else puts the page into the block
    assert arena.ufd.copy(arena.page(0), page.address, PAGE) == Outcome(Status.PRESENT, 0)
    assert waiters(arena) == 1
    arena.ufd.wake(arena.page(0), PAGE)
    assert toucher.result() == 0


def test_a_run_stops_at_a_present_page_and_says_how_far_it_came(arena: Arena) -> None:
    pages = Page(pages=4)
    first = Toucher(arena.page(0))
    next_fault(arena.ufd)
    os.pwrite(arena.fd, b"y" * PAGE, 2 * PAGE)
    assert arena.ufd.copy(arena.start, pages.address, 4 * PAGE) == Outcome(Status.PARTIAL, 2 * PAGE)
    assert waiters(arena) == 0  # the part that was placed is woken
    assert first.result() == 0
    rest = (arena.page(2), pages.address, 2 * PAGE)
    assert arena.ufd.copy(*rest) == Outcome(Status.PRESENT, 0)  # the next call gives the real reason
    assert list(memory.data_runs(arena.fd, 0, arena.length)) == [(0, 3 * PAGE)]


def test_a_stale_range(arena: Arena, page: Page) -> None:
    pages = Page(pages=2)
    assert arena.ufd.copy(page.address & -PAGE, page.address, PAGE).status is Status.STALE  # never registered
    arena.ufd.unregister(arena.page(3), PAGE)
    assert arena.ufd.copy(arena.page(2), pages.address, 2 * PAGE).status is Status.STALE  # across a boundary
    assert arena.ufd.copy(arena.page(2), pages.address, PAGE).status is Status.DONE


def test_a_window_over_a_split_mapping_is_stale_and_its_pages_are_not(arena: Arena) -> None:
    pages = Page(pages=2)
    arena.mapping.advise(memory.DONTDUMP, 0, PAGE)  # innocent, and makes two mappings of one
    assert arena.ufd.copy(arena.start, pages.address, 2 * PAGE).status is Status.STALE
    assert arena.ufd.copy(arena.page(0), pages.address, PAGE).status is Status.DONE
    assert arena.ufd.copy(arena.page(1), pages.address, PAGE).status is Status.DONE


def test_any_userfaultfd_of_the_address_space_can_place_but_not_wake_or_unregister(arena: Arena, page: Page) -> None:
    """The kernel asks whether the memory is registered, not with whom (validate_dst_vma, Linux 6.12)."""
    toucher = Toucher(arena.page(0))
    next_fault(arena.ufd)
    with open_userfaultfd() as other:
        other.handshake()
        assert other.copy(arena.page(0), page.address, PAGE).status is Status.DONE
        other.wake(arena.page(0), PAGE)
        assert waiters(arena) == 1  # it wakes its own waiters only
        with pytest.raises(OSError) as caught:
            other.unregister(arena.start, arena.length)
        assert caught.value.errno == errno.EINVAL  # Linux up to 6.12 unregistered it
    arena.ufd.wake(arena.page(0), PAGE)
    assert toucher.result() == 0


def test_a_truncated_source_file_is_unreadable_and_no_signal(arena: Arena) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"s" * 2 * PAGE)
        file.flush()
        with Mapping.of(file.fileno(), 2 * PAGE, writable=False) as source:
            assert arena.ufd.copy(arena.page(0), source.address, PAGE).status is Status.DONE
            file.truncate(PAGE)
            assert arena.ufd.copy(arena.page(1), source.address + PAGE, PAGE) == Outcome(Status.UNREADABLE, 0)
            file.truncate(100)  # inside a page: data, then zeros, and no error
            assert arena.ufd.copy(arena.page(1), source.address, PAGE).status is Status.DONE
    assert fetch(arena.page(0), PAGE) == b"s" * PAGE
    assert fetch(arena.page(1), PAGE) == b"s" * 100 + b"\0" * (PAGE - 100)


def test_the_source_need_not_be_aligned(arena: Arena) -> None:
    pages = Page(bytes(range(256)), pages=2)
    assert arena.ufd.copy(arena.start, pages.address + 5, PAGE).status is Status.DONE
    assert fetch(arena.start, PAGE) == pages.bytes[5 : 5 + PAGE]


@pytest.mark.parametrize(("shift", "length"), [(1, PAGE), (0, 0), (0, 17)])
def test_an_unaligned_destination_is_a_bug(arena: Arena, page: Page, shift: int, length: int) -> None:
    with pytest.raises(OSError) as caught:
        arena.ufd.copy(arena.start + shift, page.address, length)
    assert caught.value.errno == errno.EINVAL


def test_zeropage_makes_a_page_in_the_block(arena: Arena) -> None:
    toucher = Toucher(arena.page(1))
    next_fault(arena.ufd)
    assert arena.ufd.zeropage(arena.page(1), PAGE) == Outcome(Status.DONE, PAGE)
    assert toucher.result() == 0
    assert list(memory.data_runs(arena.fd, 0, arena.length)) == [(PAGE, 2 * PAGE)]
    assert os.fstat(arena.fd).st_blocks * 512 == PAGE


def test_continue_maps_what_the_block_has(arena: Arena, page: Page) -> None:
    """Registered MISSING only: Linux 6.18 does not ask for MINOR."""
    toucher = Toucher(arena.page(0))
    next_fault(arena.ufd)
    assert arena.ufd.continue_(arena.page(0), PAGE) == Outcome(Status.UNREADABLE, 0)  # absent
    assert waiters(arena) == 1
    os.pwrite(arena.fd, page.bytes, 0)
    assert arena.ufd.continue_(arena.page(0), PAGE) == Outcome(Status.DONE, PAGE)
    assert toucher.result() == 0
    assert arena.ufd.continue_(arena.page(0), PAGE).status is Status.PRESENT
    assert fetch(arena.page(0), PAGE) == page.bytes


def test_a_minor_fault_announces_a_page_that_somebody_else_made(page: Page) -> None:
    with Arena(mode=RegisterMode.MISSING | RegisterMode.MINOR) as arena:
        os.pwrite(arena.fd, b"?" * PAGE, 0)
        toucher = Toucher(arena.page(0))
        assert next_fault(arena.ufd).flags == FaultFlag.MINOR
        os.pwrite(arena.fd, page.bytes, 0)  # repaired before anybody sees it
        arena.ufd.continue_(arena.page(0), PAGE)
        assert toucher.result() == 0
        assert fetch(arena.page(0), PAGE) == page.bytes


def test_wake_alone_brings_the_message_again(arena: Arena, page: Page) -> None:
    """What a successor does for the waiters whose messages died with its predecessor."""
    touchers = [Toucher(arena.page(number)) for number in (0, 1, 3)]
    seen: set[int] = set()
    while len(seen) < 3:
        seen |= {event.address for event in next_events(arena.ufd) if isinstance(event, PageFault)}
    assert arena.ufd.read() == []
    os.pwrite(arena.fd, page.bytes, PAGE)  # one of them came meanwhile: that toucher just runs on
    arena.ufd.wake(arena.start, arena.length)
    assert touchers[1].result() == 0
    again: set[int] = set()
    while len(again) < 2:
        again |= {event.address for event in next_events(arena.ufd) if isinstance(event, PageFault)}
    assert again == {arena.page(0), arena.page(3)}
    arena.ufd.zeropage(arena.page(0), PAGE)
    arena.ufd.zeropage(arena.page(3), PAGE)
    assert [toucher.result() for toucher in touchers] == [0, 0, 0]


def test_wake_of_a_range_leaves_the_others_asleep(arena: Arena, page: Page) -> None:
    touchers = [Toucher(arena.page(number)) for number in (0, 1)]
    while waiters(arena) < 2 or arena.ufd.read():
        pass
    os.pwrite(arena.fd, page.bytes * 2, 0)
    arena.ufd.wake(arena.page(0), PAGE)
    assert touchers[0].result() == 0
    assert waiters(arena) == 1
    arena.ufd.wake(arena.page(1), PAGE)
    assert touchers[1].result() == 0


def test_wake_proves_nothing(arena: Arena) -> None:
    arena.ufd.wake(arena.start, arena.length)
    arena.ufd.wake(mmap.PAGESIZE, PAGE)  # nothing is mapped there
    with pytest.raises(OSError) as caught:
        arena.ufd.wake(arena.start, 0)
    assert caught.value.errno == errno.EINVAL


def test_two_threads_on_one_page_are_two_messages(arena: Arena, page: Page) -> None:
    touchers = [Toucher(arena.page(0)) for _ in range(2)]
    faults = [next_fault(arena.ufd), next_fault(arena.ufd)]
    assert [fault.address for fault in faults] == [arena.page(0)] * 2
    arena.ufd.copy(arena.page(0), page.address, PAGE)  # one answer for both
    assert [toucher.result() for toucher in touchers] == [0, 0]


def test_read_gives_no_more_than_asked_for(arena: Arena, page: Page) -> None:
    touchers = [Toucher(arena.page(number)) for number in range(3)]
    faults = next_events(arena.ufd, limit=1) + next_events(arena.ufd, limit=1) + next_events(arena.ufd, limit=1)
    assert len(faults) == 3
    for number in range(3):
        arena.ufd.copy(arena.page(number), page.address, PAGE)
    assert [toucher.result() for toucher in touchers] == [0, 0, 0]


def test_poison_is_an_error_for_the_toucher_and_no_zeros(arena: Arena) -> None:
    toucher = Toucher(arena.page(0))
    next_fault(arena.ufd)
    assert arena.ufd.poison(arena.page(0), PAGE) == Outcome(Status.DONE, PAGE)
    assert toucher.result() == EHWPOISON
    assert not memory.is_present(arena.fd, 0)
    assert arena.ufd.read() == []


def test_poison_heals_by_placing_and_continue_not_by_copy(arena: Arena, page: Page) -> None:
    arena.ufd.poison(arena.page(0), PAGE)
    os.pwrite(arena.fd, page.bytes, 0)
    assert Toucher(arena.page(0)).result() == EHWPOISON  # placing alone does not heal
    assert arena.ufd.copy(arena.page(0), page.address, PAGE).status is Status.PRESENT
    assert Toucher(arena.page(0)).result() == EHWPOISON
    assert arena.ufd.continue_(arena.page(0), PAGE) == Outcome(Status.DONE, PAGE)
    assert Toucher(arena.page(0)).result() == 0
    assert fetch(arena.page(0), PAGE) == page.bytes


def test_poison_stops_at_a_mapped_page_and_takes_one_that_is_only_in_the_block(arena: Arena, page: Page) -> None:
    arena.ufd.copy(arena.page(2), page.address, PAGE)
    assert arena.ufd.poison(arena.page(2), PAGE) == Outcome(Status.PRESENT, 0)
    assert arena.ufd.poison(arena.start, arena.length) == Outcome(Status.PARTIAL, 2 * PAGE)
    os.pwrite(arena.fd, page.bytes, 3 * PAGE)
    assert arena.ufd.poison(arena.page(3), PAGE).status is Status.DONE  # so ask for presence first
    assert Toucher(arena.page(3)).result() == EHWPOISON


def test_write_protection_stops_a_writer_until_it_is_lifted(page: Page) -> None:
    with Arena(mode=RegisterMode.MISSING | RegisterMode.WP) as arena:
        assert arena.ufd.copy(arena.page(0), page.address, PAGE, protect=True).status is Status.DONE
        arena.ufd.copy(arena.page(1), page.address, PAGE)
        assert arena.ufd.writeprotect(arena.page(1), PAGE, True) == Outcome(Status.DONE, PAGE)
        for number in (0, 1):
            assert Toucher(arena.page(number)).result() == 0  # reading goes on
            writer = Toucher(arena.page(number), write=True)
            assert next_fault(arena.ufd).flags == FaultFlag.WRITE | FaultFlag.WP
            assert arena.ufd.writeprotect(arena.page(number), PAGE, False, wake=False).status is Status.DONE
            assert waiters(arena) == 1
            arena.ufd.wake(arena.page(number), PAGE)
            assert writer.result() == 0
        assert arena.ufd.writeprotect(PAGE, PAGE, True).status is Status.STALE


def test_a_full_file_system_is_exhausted(page: Page, tmp_path: Path) -> None:
    def body(_: socket.socket) -> None:
        with full_tmpfs(tmp_path) as fd, Mapping.of(fd, 2 * PAGE) as mapping, open_userfaultfd() as ufd:
            ufd.handshake()
            ufd.register(mapping.address, 2 * PAGE)
            assert ufd.copy(mapping.address, page.address, PAGE).status is Status.DONE
            assert ufd.copy(mapping.address + PAGE, page.address, PAGE) == Outcome(Status.EXHAUSTED, 0)

    with Child(body) as child:
        assert child.exit_code() == 0


@contextmanager
def full_tmpfs(path: Path) -> Iterator[int]:
    """A file of two pages on a file system with room for one, in a mount namespace of the calling process."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private = 0x20000, 0x44000
    assert libc.unshare(new_namespace) == 0
    assert libc.mount(None, b"/", None, ctypes.c_ulong(recursive_private), None) == 0
    assert libc.mount(b"tmpfs", bytes(path), b"tmpfs", ctypes.c_ulong(0), b"size=4096") == 0
    with (path / "file").open("wb+") as file:
        file.truncate(2 * PAGE)
        yield file.fileno()


def test_what_the_errnos_mean() -> None:
    def outcome(code: int, done: int = 0) -> Outcome:
        return outcome_of(OSError(code, "told"), done)

    assert outcome(errno.EAGAIN, PAGE) == Outcome(Status.PARTIAL, PAGE)
    assert outcome(errno.EAGAIN, -errno.EAGAIN) == Outcome(Status.RETRY, 0)
    assert outcome(errno.EAGAIN) == Outcome(Status.RETRY, 0)  # WRITEPROTECT has no result field
    assert outcome(errno.EEXIST, -errno.EEXIST) == Outcome(Status.PRESENT, 0)
    assert outcome(errno.ESRCH, 77) == Outcome(Status.GONE, 0)  # an untouched field of the call before
    assert outcome(errno.ENOSPC).status is outcome(errno.ENOMEM).status is Status.EXHAUSTED
    assert outcome(EHWPOISON).status is Status.POISONED
    for code in (errno.EINVAL, errno.EBADF):
        with pytest.raises(OSError) as caught:
            outcome(code)
        assert caught.value.errno == code


def test_a_closed_userfaultfd_raises_and_closes_twice_in_peace(arena: Arena) -> None:
    ufd = open_userfaultfd()
    ufd.close()
    ufd.close()
    for call in (ufd.read, ufd.handshake, lambda: ufd.copy(arena.start, 0, PAGE)):
        with pytest.raises((OSError, ValueError)):
            call()


def test_the_size_of_a_copy_argument_is_the_one_in_its_number() -> None:
    sizes = {
        abi.UFFDIO_API: abi.API_LAYOUT,
        abi.UFFDIO_REGISTER: abi.REGISTER_LAYOUT,
        abi.UFFDIO_UNREGISTER: abi.RANGE_LAYOUT,
        abi.UFFDIO_WAKE: abi.RANGE_LAYOUT,
        UFFDIO_COPY: abi.COPY_LAYOUT,
        abi.UFFDIO_MOVE: abi.COPY_LAYOUT,
        abi.UFFDIO_ZEROPAGE: abi.RANGE_MODE_LAYOUT,
        abi.UFFDIO_CONTINUE: abi.RANGE_MODE_LAYOUT,
        abi.UFFDIO_POISON: abi.RANGE_MODE_LAYOUT,
        abi.UFFDIO_WRITEPROTECT: abi.WRITEPROTECT_LAYOUT,
    }
    for number, layout in sizes.items():
        assert number >> 16 & 0x3FFF == layout.size
