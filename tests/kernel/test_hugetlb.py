"""Huge pages: where hugetlb differs from shmem. The pages are reserved for a test and given back after it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from postcopy_kernel import memory
from postcopy_kernel.memory import PAGE_2M as HUGE
from postcopy_kernel.memory import Mapping, huge_pages
from postcopy_kernel.userfaultfd import (
    Ioctl,
    Outcome,
    RegisterMode,
    Status,
    Userfaultfd,
    open_userfaultfd,
    stuck_faults,
)
from tests.kernel.huge_pool import reserved
from tests.kernel.touching import Page, Toucher, next_fault

pytestmark = [
    pytest.mark.hugetlb,
    pytest.mark.usefixtures("require_userfaultfd", "pool"),
]


@pytest.fixture
def pool() -> Iterator[None]:
    with reserved(2):
        yield


@contextmanager
def registered(
    pages: int, mode: RegisterMode = RegisterMode.MISSING
) -> Iterator[tuple[int, Mapping, Userfaultfd, Ioctl]]:
    fd = memory.create_memfd("huge", pages * HUGE, HUGE)
    try:
        with Mapping.of(fd, pages * HUGE) as mapping, open_userfaultfd() as ufd:
            ufd.handshake()
            yield fd, mapping, ufd, ufd.register(mapping.address, mapping.length, mode)
    finally:
        os.close(fd)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


@pytest.mark.parametrize(
    ("mode", "mask"), [(RegisterMode.MISSING, 0x10C), (RegisterMode.WP, 0x14C), (RegisterMode.MINOR, 0x18C)]
)
def test_what_can_be_done_about_faults_of_huge_pages(mode: RegisterMode, mask: int) -> None:
    with registered(1, mode) as (_, _, _, ioctls):
        assert int(ioctls) == mask
        assert Ioctl.ZEROPAGE not in ioctls


def test_a_huge_page_is_placed_whole_and_its_waiter_woken_anywhere_in_it() -> None:
    page = Page(b"huge", pages=HUGE // 4096)
    with registered(2) as (fd, mapping, ufd, _):
        toucher = Toucher(mapping.address + HUGE, HUGE)
        fault = next_fault(ufd)
        assert fault.address == mapping.address + HUGE
        assert ufd.copy(fault.address, page.address, HUGE, wake=False) == Outcome(Status.DONE, HUGE)
        ufd.wake(fault.address, HUGE)
        assert toucher.result() == 0
        assert os.pread(fd, 4, HUGE + 8) == b"huge"
        assert huge_pages().free == 1


def test_pieces_of_a_huge_page_are_a_bug() -> None:
    page = Page(pages=HUGE // 4096)
    with registered(1) as (_, mapping, ufd, _):
        assert refused(lambda: ufd.copy(mapping.address, page.address, 4096)) == errno.EINVAL
        assert refused(lambda: ufd.zeropage(mapping.address, HUGE)) == errno.EINVAL
        assert refused(lambda: ufd.register(mapping.address, 4096)) == errno.EINVAL


def test_presence_is_asked_by_continue_for_seeking_lies() -> None:
    page = Page(pages=HUGE // 4096)
    with registered(2) as (fd, mapping, ufd, _):
        assert memory.is_present(fd, 0)  # it is not
        assert list(memory.data_runs(fd, 0, 2 * HUGE)) == [(0, 2 * HUGE)]
        assert ufd.continue_(mapping.address, HUGE) == Outcome(Status.UNREADABLE, 0)
        assert ufd.copy(mapping.address, page.address, HUGE).status is Status.DONE
        assert ufd.continue_(mapping.address, HUGE) == Outcome(Status.PRESENT, 0)  # and mapped
        mapping.advise(memory.DONTNEED, 0, HUGE)
        assert ufd.continue_(mapping.address, HUGE) == Outcome(Status.DONE, HUGE)  # present, was not mapped


def test_an_empty_pool_is_told_as_present() -> None:
    """EEXIST, then wake, then the same fault: an endless loop, unless presence is asked for."""
    page = Page(pages=HUGE // 4096)
    with registered(3) as (_, mapping, ufd, _):
        for number in range(2):
            ufd.copy(mapping.address + number * HUGE, page.address, HUGE)
        toucher = Toucher(mapping.address + 2 * HUGE, HUGE)
        missing = next_fault(ufd).address
        assert ufd.copy(missing, page.address, HUGE) == Outcome(Status.PRESENT, 0)
        assert ufd.continue_(missing, HUGE) == Outcome(Status.UNREADABLE, 0)
        assert stuck_faults(ufd.fd) == (0, 1)
        ufd.poison(missing, HUGE)
        assert toucher.result() != 0


def test_poison_of_a_huge_page_heals_by_continue() -> None:
    page = Page(pages=HUGE // 4096)
    with registered(1) as (fd, mapping, ufd, _), Mapping.of(fd, HUGE) as placing, open_userfaultfd() as placer:
        placer.handshake()
        placer.register(placing.address, HUGE)
        assert ufd.poison(mapping.address, HUGE) == Outcome(Status.DONE, HUGE)
        assert Toucher(mapping.address, HUGE).result() != 0
        assert placer.copy(placing.address, page.address, HUGE).status is Status.DONE
        assert Toucher(mapping.address, HUGE).result() != 0
        assert ufd.continue_(mapping.address, HUGE) == Outcome(Status.DONE, HUGE)
        assert Toucher(mapping.address, HUGE).result() == 0


def test_a_private_mapping_takes_the_pool_unless_it_reserves_nothing() -> None:
    fd = memory.create_memfd("huge", 2 * HUGE, HUGE)
    try:
        with Mapping.of(fd, 2 * HUGE, shared=False):
            assert huge_pages().available == 2
        with Mapping.of(fd, 2 * HUGE, shared=False, reserve=True):
            assert huge_pages().available == 0
    finally:
        os.close(fd)


def test_a_private_client_of_a_read_only_descriptor_maps_the_blocks_huge_page() -> None:
    page = Page(b"huge", pages=HUGE // 4096)
    with registered(1) as (fd, placing, placer, _):
        read_only = memory.reopen(fd, writable=False)
        with Mapping.of(read_only, HUGE, shared=False) as mapping, open_userfaultfd() as ufd:
            os.close(read_only)
            ufd.handshake()
            ufd.register(mapping.address, HUGE)
            toucher = Toucher(mapping.address, 4096)
            next_fault(ufd)
            assert placer.copy(placing.address, page.address, HUGE).status is Status.DONE
            assert ufd.continue_(mapping.address, HUGE) == Outcome(Status.DONE, HUGE)
            assert toucher.result() == 0
            assert huge_pages().free == 1  # one page for both


def test_sizes_are_whole_huge_pages() -> None:
    with pytest.raises(ValueError, match="size"):
        memory.create_memfd("huge", HUGE + 4096, HUGE)
