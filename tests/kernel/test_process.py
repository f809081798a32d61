"""Names, rights given up, parents, pidfds. Whatever changes a process is done to a child."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy_kernel import process
from postcopy_kernel.memory import DONTNEED, Mapping, create_memfd
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.process import (
    PageTables,
    die_with_parent,
    drop_privileges,
    is_same_process,
    lock_holder,
    memory_figures,
    name_process,
    pidfd_exited,
    pidfd_open,
    pidfd_signal,
    privileges,
    unmapped_ids,
)
from postcopy_kernel.userfaultfd import Status, open_userfaultfd
from tests.kernel.touching import Child, Page, readable, store

NOTHING = {"inheritable": 0, "permitted": 0, "effective": 0, "bounding": 0, "ambient": 0, "no_new_privs": 1}
NOBODY = 65534


@pytest.mark.parametrize("own_inodes", [True, False], ids=["pidfs", "before Linux 6.9"])
def test_two_pidfds_of_one_process(own_inodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own_inodes:
        one_inode = Path("/dev/null").stat()
        monkeypatch.setattr("postcopy_kernel.process.os.fstat", lambda _: one_inode)
    with Child(lambda sock: sock.recv(1)) as child:
        pidfds = [os.pidfd_open(pid) for pid in (child.pid, child.pid, os.getpid())]
        one, again, other = pidfds
        assert is_same_process(one, again)
        assert not is_same_process(one, other)
        child.kill()
        assert pidfd_exited(one, 5.0)
        assert not is_same_process(one, again), "its pid may be another's by now"
        for pidfd in pidfds:
            os.close(pidfd)


def test_who_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert lock_holder(str(path)) == 0 == lock_holder(str(tmp_path / "none"))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(str(path)) == os.getpid()
    assert lock_holder(str(path)) == 0


def test_every_id_has_a_number_on_the_host() -> None:
    assert unmapped_ids() == (-1, -1)


def test_a_name_is_cut_at_fifteen() -> None:
    def body(_: socket.socket) -> None:
        for name, kept in (("pc-worker/7", "pc-worker/7"), ("0123456789abcdefgh", "0123456789abcde")):
            name_process(name)
            assert Path("/proc/self/comm").read_bytes().strip() == kept.encode()

    with Child(body) as child:
        assert child.exit_code() == 0


def test_every_capability_goes_and_the_way_back_too() -> None:
    def body(_: socket.socket) -> None:
        assert privileges()["effective"], "not root: this test proves nothing"
        drop_privileges()
        assert privileges() == NOTHING
        drop_privileges()  # again is fine
        assert privileges() == NOTHING
        # An exec by uid 0 would bring them back from the bounding set.
        script = "from postcopy_kernel.process import privileges; print(privileges())"
        told = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, check=True)
        assert told.stdout.decode().strip() == str(NOTHING)

    with Child(body) as child:
        assert child.exit_code() == 0


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_process_without_rights_gives_up_what_it_can() -> None:
    def body(_: socket.socket) -> None:
        import prctl  # noqa: F401 - not every uid can read where it is installed

        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        drop_privileges()
        left = privileges()
        assert left.pop("bounding")  # not ours to empty, and of no use to anybody with no_new_privs
        assert left == {name: value for name, value in NOTHING.items() if name != "bounding"}

    with Child(body) as child:
        assert child.exit_code() == 0


@pytest.mark.usefixtures("require_userfaultfd")
def test_pages_are_placed_without_any_right() -> None:
    page = Page()

    def body(_: socket.socket) -> None:
        with Mapping.anonymous(PAGE) as mapping, open_userfaultfd() as ufd:
            ufd.handshake()
            ufd.register(mapping.address, PAGE)
            drop_privileges()
            assert ufd.copy(mapping.address, page.address, PAGE).status is Status.DONE

    with Child(body) as child:
        assert child.exit_code() == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent(number: int) -> None:
    reader, writer = os.pipe()

    def parent(sock: socket.socket) -> None:
        mine = os.getpid()
        if os.fork() == 0:
            die_with_parent(mine, number)
            os.write(writer, b"%d" % os.getpid())
            signal.pause()
        sock.recv(100)

    with Child(parent) as child:
        try:
            assert readable(reader)
            pidfd = pidfd_open(int(os.read(reader, 100)))
        finally:
            os.close(reader)
            os.close(writer)
        assert not pidfd_exited(pidfd)
        child.kill()
        assert readable(pidfd)
        assert pidfd_exited(pidfd)
        os.close(pidfd)


def test_a_parent_that_is_dead_already_is_noticed() -> None:
    with Child(lambda _: die_with_parent(2**22)) as child:
        assert child.exit_code() == -signal.SIGKILL
    with Child(lambda _: die_with_parent(os.getppid())) as child:
        assert child.exit_code() == 0


def test_a_signal_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OSError) as caught:
        die_with_parent(os.getppid(), 9999)
    assert caught.value.errno == errno.EINVAL


def test_a_pidfd_is_readable_from_the_death_on() -> None:
    with Child(lambda sock: sock.recv(100)) as child:
        pidfd = pidfd_open(child.pid)
        try:
            assert not os.get_inheritable(pidfd)
            assert not pidfd_exited(pidfd)
            pidfd_signal(pidfd, signal.SIGTERM)
            assert readable(pidfd)  # a zombie still
            assert pidfd_exited(pidfd)
            assert child.exit_code() == -signal.SIGTERM
            assert pidfd_exited(pidfd)
            with pytest.raises(ProcessLookupError):
                pidfd_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)


def test_a_pid_of_nobody_cannot_be_opened() -> None:
    with pytest.raises(OSError) as caught:
        pidfd_open(2**22)
    assert caught.value.errno in (errno.ESRCH, errno.EINVAL)


def test_what_a_process_weighs() -> None:
    size = 8 << 20
    with Mapping.anonymous(size) as mapping:
        before = memory_figures(os.getpid())
        store(mapping.address, b"x" * size)
        after = memory_figures(os.getpid())
    assert size <= after["private"] - before["private"] < 3 * size
    assert after["rss"] - before["rss"] < 3 * size


def test_pages_of_a_mapped_file_are_the_page_caches_memory(tmp_path: Path) -> None:
    size = 64 << 20
    with (tmp_path / "file").open("wb") as written:
        written.write(b"x" * size)
        written.flush()
        os.fsync(written.fileno())  # what is not written back counts as dirty
    with (tmp_path / "file").open() as file, Mapping.of(file.fileno(), size, writable=False) as mapping:
        before = memory_figures(os.getpid())
        assert all(mapping.view(size)[at] for at in range(0, size, PAGE))
        after = memory_figures(os.getpid())
    assert after["rss"] - before["rss"] >= size // 2
    assert after["private"] - before["private"] < size // 8


def test_page_tables_count_as_private_memory_and_are_freed_when_empty() -> None:
    size = 64 << 20
    fd = create_memfd("block", size)
    tables = PageTables()
    with Mapping.of(fd, size) as mapping:
        before = tables.size()
        for at in range(0, size, PAGE):
            store(mapping.address + at, b"x")
        assert size // PAGE * 8 <= tables.size() - before <= 1 << 20, "8 bytes for each page of 4 KiB"
        mapping.advise(DONTNEED)
        left = tables.size() - before
    tables.close()
    os.close(fd)
    assert left < 64 << 10 or os.uname().release < "6.14"


def test_the_memory_of_nobody_cannot_be_read() -> None:
    with pytest.raises(OSError):
        memory_figures(2**22)


@pytest.mark.parametrize("installed", [True, False])
def test_the_same_with_and_without_python_prctl(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a compiler to install; without it the daemon does the same by ctypes."""
    if not installed:
        monkeypatch.setitem(sys.modules, "prctl", None)
    process._python_prctl.cache_clear()

    def body(_: socket.socket) -> None:
        assert (process._python_prctl() is not None) == installed
        die_with_parent(os.getppid())
        name_process("a-name-that-is-too-long")
        assert Path("/proc/self/comm").read_text() == "a-name-that-is-\n"
        drop_privileges()
        assert privileges() == NOTHING

    with Child(body) as child:
        assert child.exit_code() == 0
    process._python_prctl.cache_clear()


def test_the_title_of_a_process() -> None:
    """The whole command line, cut where there is no room, and nothing behind it."""

    def body(_: socket.socket) -> None:
        before, environ = Path("/proc/self/cmdline").read_bytes(), Path("/proc/self/environ").read_bytes()
        for title in ("postcopy_workers: client 7 (pid 9, a name)", "short", "x" * 100_000, "\N{SNOWMAN}" * 9999, ""):
            process.title_process(title)
            shown = Path("/proc/self/cmdline").read_bytes()
            assert len(shown) == len(before)
            assert title.startswith(shown.rstrip(b"\0").decode())
            assert len(shown.rstrip(b"\0")) >= min(len(title.encode()), len(before) - 4)
        assert Path("/proc/self/environ").read_bytes() == environ

    with Child(body) as child:
        assert child.exit_code() == 0
