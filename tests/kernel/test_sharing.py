"""One block, several processes: what a page placed for one is for the others, and what a death leaves behind."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from postcopy_kernel import memory
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import (
    EHWPOISON,
    FaultFlag,
    Outcome,
    RegisterMode,
    Status,
    open_userfaultfd,
    stuck_faults,
)
from tests.kernel.clients import Client
from tests.kernel.touching import Arena, Child, Page, Reader, Toucher, fetch, next_fault, readable

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

PAGES = 4
KINDS = ("shared", "private")


@pytest.fixture
def block() -> Iterator[int]:
    fd = memory.create_memfd("block", PAGES * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def page() -> Page:
    return Page(b"data")


@pytest.mark.parametrize("kind", ["shared", "anonymous"])
def test_copy_fills_the_memory_of_another_process(block: int, page: Page, kind: str) -> None:
    with Client(block, PAGES, kind) as client:
        client.fault(1)
        assert client.ufd.copy(client.page(1), page.address, PAGE) == Outcome(Status.DONE, PAGE)
        assert client.answer() == b"data"
    assert memory.is_present(block, PAGE) == (kind == "shared")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["wake", "continue"])
def test_a_page_placed_elsewhere_wakes_nobody_until_the_client_is_woken(
    block: int, page: Page, kind: str, by: str
) -> None:
    with Client(block, PAGES, kind) as client, Client(block, PAGES) as other:
        client.fault(1)
        other.fault(1)
        assert other.ufd.copy(other.page(1), page.address, PAGE).status is Status.DONE
        assert other.answer() == b"data"
        assert stuck_faults(client.ufd.fd) == (0, 1)
        if by == "wake":
            client.ufd.wake(client.page(1), PAGE)
        else:
            assert client.ufd.continue_(client.page(1), PAGE) == Outcome(Status.DONE, PAGE)
        assert client.answer() == b"data"
        assert client.ufd.read() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_that_the_block_has_is_mapped_without_a_fault(block: int, page: Page, kind: str) -> None:
    with Client(block, PAGES, kind) as client:
        os.pwrite(block, page.bytes, 0)
        assert client.do("read", 0) == b"data"
        assert client.ufd.read() == []


@pytest.mark.parametrize("mapped_by_continue", [False, True])
def test_a_private_clients_writes_are_its_own(block: int, page: Page, mapped_by_continue: bool) -> None:
    """MAP_PRIVATE of a read-only descriptor: registers, faults, maps the block's page, copies on write."""
    with Client(block, PAGES, "private") as one, Client(block, PAGES, "private") as two:
        one.fault(0, "write", b"mine")
        os.pwrite(block, page.bytes, 0)
        if mapped_by_continue:
            assert one.ufd.continue_(one.page(0), PAGE).status is Status.DONE
        else:
            one.ufd.wake(one.page(0), PAGE)
        assert one.answer() == b"done"
        assert (one.do("read", 0), two.do("read", 0), os.pread(block, 4, 0)) == (b"mine", b"data", b"data")


def test_copy_to_a_private_client_is_its_own_and_not_in_the_block(block: int, page: Page) -> None:
    """Why a private client is served by CONTINUE: COPY would make an anonymous page for this one."""
    with Client(block, PAGES, "private") as client:
        client.fault(0)
        assert client.ufd.copy(client.page(0), page.address, PAGE).status is Status.DONE
        assert client.answer() == b"data"
        assert not memory.is_present(block, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_poison_and_healing_of_another_process(block: int, page: Page, kind: str) -> None:
    with Client(block, PAGES, kind) as client, Client(block, PAGES, kind) as victim:
        for one in (client, victim):
            one.fault(0)
            assert one.ufd.poison(one.page(0), PAGE, wake=one is victim).status is Status.DONE
        assert victim.exit_code() == -signal.SIGBUS
        assert stuck_faults(client.ufd.fd) == (0, 1)
        os.pwrite(block, page.bytes, 0)
        assert client.ufd.continue_(client.page(0), PAGE).status is Status.DONE  # clears, maps, wakes
        assert client.answer() == b"data"


def test_poison_heals_when_the_client_drops_it(block: int, page: Page) -> None:
    with Client(block, PAGES) as client:
        client.ufd.poison(client.page(0), PAGE)
        client.do("discard", 0)
        client.fault(0)
        client.ufd.copy(client.page(0), page.address, PAGE)
        assert client.answer() == b"data"


def test_copy_after_the_owner_died(block: int, page: Page) -> None:
    with Client(block, PAGES) as client:
        client.fault(0)
        twin = type(client.ufd)(os.dup(client.ufd.fd))
        client.kill()
        try:
            assert not readable(twin, 0)  # poll says nothing, ever: watch the process by a pidfd
            assert twin.read() == []
            for place in (twin.continue_, twin.zeropage, twin.poison):
                assert place(client.page(0), PAGE) == Outcome(Status.GONE, 0)
            assert twin.copy(client.page(0), page.address, PAGE) == Outcome(Status.GONE, 0)
            assert twin.writeprotect(client.page(0), PAGE, False) == Outcome(Status.GONE, 0)
            twin.wake(client.page(0), PAGE)  # proves nothing
            for refused in (twin.register, twin.unregister):
                with pytest.raises(OSError) as caught:
                    refused(client.page(0), PAGE)
                assert caught.value.errno == errno.ENOMEM
        finally:
            twin.close()


def test_the_last_close_turns_waiters_into_zeros(block: int) -> None:
    """The hazard that the keeping of duplicates is for. The child's own descriptor must go as well."""

    def body(sock: socket.socket) -> None:
        with Arena() as arena:
            toucher = Toucher(arena.page(0))
            next_fault(arena.ufd)
            twin = os.dup(arena.ufd.fd)
            arena.ufd.close()
            assert toucher.asleep
            os.close(twin)
            assert toucher.result() == 0
            assert fetch(arena.page(0)) == b"\0"

    with Child(body) as child:
        assert child.exit_code() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_successor_hears_everything_after_one_wake(block: int, page: Page, kind: str) -> None:
    with Client(block, PAGES, kind) as client:
        client.begin("read", 2)

        def handler(_: socket.socket) -> None:
            next_fault(client.ufd)
            os.kill(os.getpid(), signal.SIGKILL)

        with Child(handler) as first:
            assert first.exit_code() == -signal.SIGKILL
        assert client.ufd.read() == []  # the message died with its reader
        assert stuck_faults(client.ufd.fd) == (0, 1)
        client.ufd.wake(client.start, client.length)
        assert next_fault(client.ufd).address == client.page(2)
        os.pwrite(block, page.bytes, 2 * PAGE)
        client.ufd.wake(client.start, client.length)
        assert client.answer() == b"data"


def test_a_page_marked_and_punched_faults_for_ever_if_one_only_wakes(block: int, page: Page) -> None:
    with Client(block, PAGES) as honest, Client(block, PAGES) as hostile:
        os.pwrite(block, page.bytes, 0)
        assert hostile.do("read", 0) == b"data"
        hostile.do("punch", 0)
        honest.fault(0)
        for _ in range(20):
            honest.ufd.wake(honest.page(0), PAGE)
            assert next_fault(honest.ufd).address == honest.page(0)
        assert not memory.is_present(block, 0)  # so: confirm, and place anew
        assert honest.ufd.copy(honest.page(0), page.address, PAGE).status is Status.DONE
        assert honest.answer() == b"data"


def test_an_unregistered_mapping_makes_zeros_for_everybody(block: int) -> None:
    with Client(block, PAGES) as client, Mapping.of(block, PAGES * PAGE) as stray:
        assert os.pread(block, 4, 0) == bytes(4)
        assert not memory.is_present(block, 0)  # reading the file makes nothing
        assert Toucher(stray.address).result() == 0
        assert list(memory.data_runs(block, 0, PAGES * PAGE)) == [(0, PAGE)]
        assert client.do("read", 0) == bytes(4)
        assert client.ufd.read() == []


def test_an_announced_client_is_told_of_such_a_page_before_it_sees_it(block: int, page: Page) -> None:
    with Client(block, PAGES, mode=RegisterMode.MISSING | RegisterMode.MINOR) as client:
        os.pwrite(block, bytes(PAGE), 0)
        client.begin("read", 0)
        assert next_fault(client.ufd).flags == FaultFlag.MINOR
        os.pwrite(block, page.bytes, 0)
        client.ufd.continue_(client.page(0), PAGE)
        assert client.answer() == b"data"


def test_registering_again_for_less_takes_nothing_away(block: int) -> None:
    """A back-end registers MISSING what the supervisor has registered MISSING|MINOR through a duplicate."""
    with Client(block, PAGES, mode=RegisterMode.MISSING | RegisterMode.MINOR) as client:
        client.ufd.register(client.page(0), PAGES * PAGE, RegisterMode.MISSING)
        os.pwrite(block, bytes(PAGE), 0)
        client.begin("read", 0)
        assert next_fault(client.ufd).flags == FaultFlag.MINOR
        client.ufd.continue_(client.page(0), PAGE)
        assert client.answer() == bytes(4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_process_that_locks_its_memory_populates_what_it_maps_with_access(block: int, shared: bool) -> None:
    """But not what it maps without; and giving access to registered memory waits for nothing."""

    def locks(_: object) -> None:
        assert ctypes.CDLL(None).mlockall(3) == 0
        mapping = Mapping.of(block, PAGES * PAGE, shared=shared, inaccessible=True)
        with open_userfaultfd() as ufd:
            ufd.handshake()
            ufd.register(mapping.address, mapping.length)
            mapping.allow()
            assert not list(memory.data_runs(block, 0, PAGES * PAGE)) and ufd.read() == []
            Mapping.of(block, PAGES * PAGE, shared=shared)
            assert list(memory.data_runs(block, 0, PAGES * PAGE)) == [(0, PAGES * PAGE)]

    with Child(locks) as child:
        assert child.exit_code() == 0


def test_a_placing_mapping_can_be_dropped_and_the_data_stays(block: int, page: Page) -> None:
    with Arena() as arena:
        arena.ufd.copy(arena.page(0), page.address, PAGE)
        arena.mapping.advise(memory.DONTNEED)
        assert memory.is_present(arena.fd, 0)
        assert Toucher(arena.page(0)).result() == 0
        assert fetch(arena.page(0), 4) == b"data"


def test_a_forked_child_of_a_client_cannot_touch_what_was_kept_from_it(page: Page) -> None:
    with Arena() as arena:
        arena.ufd.copy(arena.page(0), page.address, PAGE)
        with Child(lambda _: fetch(arena.page(0))) as inherits:
            assert inherits.exit_code() == 0
        arena.mapping.advise(memory.DONTFORK)
        with Child(lambda _: fetch(arena.page(0))) as child:
            assert child.exit_code() == -signal.SIGSEGV


def test_populating_a_poisoned_page_is_an_error_and_reading_it_a_signal() -> None:
    def body(sock: socket.socket) -> None:
        with Arena() as arena:
            arena.ufd.poison(arena.page(0), PAGE)
            assert Toucher(arena.page(0)).result() == EHWPOISON
            sock.send(b"populated")
            fetch(arena.page(0))

    with Child(body) as child:
        assert child.socket.recv(100) == b"populated"
        assert child.exit_code() == -signal.SIGBUS


def test_signals_duplicate_messages() -> None:
    """Each signal handled during the wait ends it, and the fault is taken anew: dedupe by page."""

    def body(sock: socket.socket) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        page = Page(b"data")
        with Arena() as arena:
            reader = Reader(arena.page(0))
            for _ in range(5):
                assert next_fault(arena.ufd).address == arena.page(0)
                signal.pthread_kill(reader.ident, signal.SIGUSR1)
            assert next_fault(arena.ufd).address == arena.page(0)
            assert stuck_faults(arena.ufd.fd) == (0, 1)  # it waits once, all the same
            arena.ufd.copy(arena.page(0), page.address, PAGE)
            assert reader.result() == b"d"

    with Child(body) as child:
        assert child.exit_code() == 0
