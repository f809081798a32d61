"""Memfds, mappings, advice and presence."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postcopy_kernel import memory
from postcopy_kernel.memory import PAGE_2M, Mapping, advise, create_memfd, data_runs, hole_runs, is_present
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.process import memory_figures
from postcopy_kernel.userfaultfd import open_userfaultfd
from tests.kernel.touching import Arena, Child, Page, Toucher, fetch, next_fault, store

NOBODY = 65534
GIB = 1 << 30


@pytest.fixture
def fd() -> Iterator[int]:
    made = create_memfd("block", 8 * PAGE)
    yield made
    os.close(made)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def test_a_memfd_cannot_change_its_size_and_can_be_written_and_mapped(fd: int) -> None:
    assert os.fstat(fd).st_size == 8 * PAGE
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    assert refused(lambda: os.ftruncate(fd, PAGE)) == errno.EPERM
    assert refused(lambda: os.ftruncate(fd, 16 * PAGE)) == errno.EPERM
    assert refused(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)) == errno.EPERM
    assert os.pwrite(fd, b"data", 0) == 4
    assert not os.get_inheritable(fd)


@pytest.mark.usefixtures("require_userfaultfd")
def test_the_seals_do_not_disturb_placing() -> None:
    page = Page()
    with Arena() as arena:
        assert arena.ufd.copy(arena.start, page.address, PAGE).done == PAGE


@pytest.mark.parametrize(("size", "page_size"), [(0, PAGE), (-PAGE, PAGE), (PAGE + 1, PAGE), (PAGE, PAGE_2M), (8, 8)])
def test_sizes_that_are_no_pages_are_refused(size: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        create_memfd("wrong", size, page_size)


def test_a_read_only_descriptor_stays_read_only_for_everybody_else(fd: int) -> None:
    read_only = memory.reopen(fd, writable=False)
    try:
        assert refused(lambda: os.pwrite(read_only, b"x", 0)) == errno.EBADF
        assert refused(lambda: Mapping.of(read_only, PAGE)) == errno.EACCES
        assert fcntl.fcntl(read_only, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        again = memory.reopen(read_only, writable=True)  # we may: it is our file
        assert os.pwrite(again, b"x", 0) == 1
        os.close(again)

        def body(_: socket.socket) -> None:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            assert refused(lambda: memory.reopen(read_only, writable=True)) == errno.EACCES
            assert os.pread(read_only, 1, 0) == b"x"

        with Child(body) as child:
            assert child.exit_code() == 0
    finally:
        os.close(read_only)


@pytest.mark.parametrize("shared", [True, False])
def test_a_huge_mapping_takes_no_promise_of_memory(shared: bool) -> None:
    fd = create_memfd("huge", 100 * GIB)
    try:
        with Mapping.of(fd, 100 * GIB, shared=shared) as mapping:
            assert mapping.length == 100 * GIB
        if not shared:  # this is what NORESERVE is for, under the usual overcommit
            assert refused(lambda: Mapping.of(fd, 100 * GIB, shared=False, reserve=True)) == errno.ENOMEM
    finally:
        os.close(fd)


def test_anonymous_memory_takes_no_promise_either() -> None:
    with Mapping.anonymous(100 * GIB) as mapping:
        store(mapping.address + 50 * GIB, b"data")
        assert fetch(mapping.address + 50 * GIB, 4) == b"data"


def test_a_mapping_begins_at_its_offset(fd: int) -> None:
    os.pwrite(fd, b"third", 2 * PAGE)
    with Mapping.of(fd, PAGE, offset=2 * PAGE, writable=False) as mapping:
        assert fetch(mapping.address, 5) == b"third"
    assert refused(lambda: Mapping.of(fd, PAGE, offset=1)) == errno.EINVAL


def test_a_private_mapping_keeps_its_writes(fd: int) -> None:
    with Mapping.of(fd, PAGE, shared=False) as mapping:
        store(mapping.address, b"mine")
        assert os.pread(fd, 4, 0) == bytes(4)


def test_a_fixed_address_must_be_free(fd: int) -> None:
    with Mapping.of(fd, PAGE) as first:
        address = first.address
        assert refused(lambda: Mapping.of(fd, PAGE, fixed_address=address)) == errno.EEXIST
    with Mapping.of(fd, PAGE, fixed_address=address) as second:
        assert second.address == address


def test_a_view_is_flat_bytes_and_touches_nothing(fd: int) -> None:
    with Mapping.of(fd, 8 * PAGE) as mapping:
        view = mapping.view()
        assert (view.format, view.itemsize, len(view), view.readonly) == ("B", 1, 8 * PAGE, False)
        assert len(mapping.view(100)) == 100
        assert mapping.view(writable=False).readonly
        assert list(data_runs(fd, 0, 8 * PAGE)) == []
        view[PAGE] = 7
        assert os.pread(fd, 1, PAGE) == b"\7"
        with pytest.raises(ValueError, match="no 32769 bytes"):
            mapping.view(8 * PAGE + 1)
    with Mapping.of(fd, PAGE, writable=False) as mapping:
        assert mapping.view().readonly


def test_a_mapping_knows_whether_anything_of_it_is_alive(fd: int) -> None:
    mapping = Mapping.of(fd, PAGE)
    seen = [mapping.exported]
    view = mapping.view()
    piece = view[3:5]
    del view
    seen.append(mapping.exported)
    del piece
    seen.append(mapping.exported)
    assert seen == [False, True, False]
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="in a mapping of 0"):
        mapping.view()


def test_closing_under_a_view_forbids_and_never_gives_the_addresses_away(fd: int) -> None:
    def body(sock: socket.socket) -> None:
        mapping = Mapping.of(fd, PAGE)
        address, view = mapping.address, mapping.view()
        mapping.close()
        assert refused(lambda: Mapping.of(fd, PAGE, fixed_address=address)) == errno.EEXIST
        sock.send(b"closed")
        view[0]

    with Child(body) as child:
        assert child.socket.recv(100) == b"closed"
        assert child.exit_code() == -signal.SIGSEGV


@pytest.mark.usefixtures("require_userfaultfd")
def test_a_forbidden_range_is_a_signal_and_no_fault_message() -> None:
    def body(sock: socket.socket) -> None:
        with Arena() as arena:
            arena.mapping.forbid()
            assert Toucher(arena.start).result() == errno.EINVAL
            assert arena.ufd.read() == []
            sock.send(b"forbidden")
            fetch(arena.start)

    with Child(body) as child:
        assert child.socket.recv(100) == b"forbidden"
        assert child.exit_code() == -signal.SIGSEGV


def test_runs_of_data_and_holes_are_exact(fd: int) -> None:
    for number in (1, 2, 5):
        os.pwrite(fd, b"x", number * PAGE + 9)

    def pages(runs: Iterator[tuple[int, int]]) -> list[tuple[float, float]]:
        return [(start / PAGE, end / PAGE) for start, end in runs]

    assert pages(data_runs(fd, 0, 8 * PAGE)) == [(1, 3), (5, 6)]
    assert pages(hole_runs(fd, 0, 8 * PAGE)) == [(0, 1), (3, 5), (6, 8)]
    assert pages(data_runs(fd, 2 * PAGE, 5 * PAGE)) == [(2, 3)]
    assert pages(hole_runs(fd, 2 * PAGE, 5 * PAGE)) == [(3, 5)]
    assert pages(data_runs(fd, 0, 2 * PAGE)) == [(1, 2)]
    assert pages(data_runs(fd, 6 * PAGE, 8 * PAGE)) == []
    assert pages(hole_runs(fd, PAGE, 3 * PAGE)) == []
    assert pages(hole_runs(fd, 4 * PAGE, 4 * PAGE)) == []
    assert [is_present(fd, number * PAGE) for number in range(8)] == [
        False,
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]


def test_presence_of_a_bad_descriptor_raises() -> None:
    reader, writer = os.pipe()
    try:
        assert refused(lambda: is_present(reader, 0)) == errno.ESPIPE
        assert refused(lambda: list(data_runs(reader, 0, PAGE))) == errno.ESPIPE
    finally:
        os.close(reader)
        os.close(writer)


def test_remove_really_loses_data_and_dontneed_does_not(fd: int) -> None:
    with Mapping.of(fd, 8 * PAGE) as mapping:
        os.pwrite(fd, b"x" * 2 * PAGE, 0)
        mapping.advise(memory.DONTNEED)
        assert list(data_runs(fd, 0, 8 * PAGE)) == [(0, 2 * PAGE)]
        mapping.advise(memory.REMOVE, PAGE, PAGE)
        assert list(data_runs(fd, 0, 8 * PAGE)) == [(0, PAGE)]


def test_bad_advice_is_an_errno_or_raises() -> None:
    with Mapping.anonymous(PAGE) as mapping:
        assert advise(mapping.address, PAGE, memory.DONTNEED) == 0
        assert advise(mapping.address + 1, PAGE, memory.DONTNEED) == errno.EINVAL
        assert refused(lambda: mapping.advise(12345)) == errno.EINVAL
        for advice in (memory.DONTFORK, memory.DOFORK, memory.DONTDUMP, memory.POPULATE_WRITE):
            mapping.advise(advice)


@pytest.mark.usefixtures("require_userfaultfd")
def test_advise_lets_the_gil_go() -> None:
    """In a child: where it did not, this process would hang with its GIL for good."""

    def body(_: socket.socket) -> None:
        page = Page()
        with Arena() as arena:

            def handle() -> None:
                arena.ufd.copy(next_fault(arena.ufd).address, page.address, PAGE)

            handler = threading.Thread(target=handle)
            handler.start()
            arena.mapping.advise(memory.POPULATE_READ, PAGE, PAGE)
            handler.join()

    with Child(body) as child:
        assert child.exit_code() == 0


@pytest.mark.usefixtures("require_userfaultfd")
def test_dropping_the_page_tables_makes_the_placer_light_again() -> None:
    size = 16 << 20
    source = Page(pages=size // PAGE)

    def body(_: socket.socket) -> None:
        fd = create_memfd("block", size)
        with Mapping.of(fd, size) as mapping, open_userfaultfd() as ufd:
            ufd.handshake()
            ufd.register(mapping.address, size)
            before = memory_figures(os.getpid())["private"]
            assert ufd.copy(mapping.address, source.address, size).done == size
            assert memory_figures(os.getpid())["private"] > before + size // 2
            mapping.advise(memory.DONTNEED)
            assert memory_figures(os.getpid())["private"] < before + size // 8
            assert list(data_runs(fd, 0, size)) == [(0, size)]

    with Child(body) as child:
        assert child.exit_code() == 0


def test_a_pool_of_a_size_that_does_not_exist_is_empty() -> None:
    assert memory.huge_pages(12345 << 10) == memory.HugePages(0, 0, 0)


# --- a memfd of another process ---------------------------------------------------------------------------------------


def open_own(descriptor: int, size: int = 8 * PAGE, name: str = "block", pid: int = 0) -> int:
    return memory.open_memfd_of(pid or os.getpid(), descriptor, name, size)


def test_a_memfd_of_another_process_is_opened_for_writing(fd: int) -> None:
    with Child(lambda theirs: theirs.recv(1)) as child:
        opened = open_own(fd, pid=child.pid)
    os.pwrite(opened, b"both see it", PAGE)
    assert os.pread(fd, 11, PAGE) == b"both see it" and not os.get_inheritable(opened)
    os.close(opened)


def strange_descriptors(directory: Path) -> dict[str, int]:
    """What is no sealed memfd of 8 pages and the name "block", whatever it is called."""
    file = directory / "memfd:block (deleted)"
    file.write_bytes(bytes(8 * PAGE))
    os.mkfifo(directory / "fifo")
    ours, theirs = socket.socketpair()
    theirs.close()
    unsealed = os.memfd_create("block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8 * PAGE)
    return {
        "a file": os.open(file, os.O_RDWR),
        "a fifo": os.open(directory / "fifo", os.O_RDWR | os.O_NONBLOCK),
        "a socket": ours.detach(),
        "a device": os.open("/dev/null", os.O_RDWR),
        "a directory": os.open(directory, os.O_RDONLY),
        "not sealed": unsealed,
        "another name": create_memfd("block2", 8 * PAGE),
        "another size": create_memfd("block", 9 * PAGE),
        "closed": 100_000,
    }


def test_what_is_no_such_memfd_is_refused_and_not_opened(tmp_path: Path) -> None:
    strange = strange_descriptors(tmp_path)
    before = set(Path("/proc/self/fd").iterdir())
    for name, descriptor in strange.items():
        with pytest.raises((OSError, ValueError)):
            open_own(descriptor)
            pytest.fail(f"{name} was opened")
    with pytest.raises(OSError):
        open_own(strange["a file"], pid=1 << 40)
    assert set(Path("/proc/self/fd").iterdir()) == before
    for name, descriptor in strange.items():
        if name != "closed":
            os.close(descriptor)


def test_a_memfd_of_another_user_is_for_root_only(fd: int) -> None:
    os.fchown(fd, NOBODY, NOBODY)
    os.close(open_own(fd))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: NOBODY - 1)
        with pytest.raises(ValueError, match="belongs to user"):
            open_own(fd)
