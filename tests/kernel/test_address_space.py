"""Another process's address space as /proc tells it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from postcopy_kernel import address_space, memory
from postcopy_kernel.userfaultfd import open_userfaultfd

PAGE = 4096


def test_a_mapping_is_found_by_its_file() -> None:
    fd = memory.create_memfd("found", 4 * PAGE)
    mapping = memory.Mapping.of(fd, 2 * PAGE, offset=PAGE)
    facts = os.fstat(fd)
    try:
        mine = [at for at in address_space.mapped_ranges(os.getpid()) if at.file == (facts.st_dev, facts.st_ino)]
        assert [(at.start, at.end, at.offset, at.permissions) for at in mine] == [
            (mapping.address, mapping.address + 2 * PAGE, PAGE, "rw-s")
        ]
        assert mine[0].name.startswith("/memfd:found") and mine[0].accessible
    finally:
        mapping.close()
        os.close(fd)


def test_what_is_registered(require_userfaultfd: None) -> None:
    mapping = memory.Mapping.anonymous(4 * PAGE)
    me, start = os.getpid(), mapping.address
    with open_userfaultfd() as userfaultfd:
        userfaultfd.handshake()
        assert not address_space.any_registered(me, [(start, 4 * PAGE)])
        userfaultfd.register(start + PAGE, 2 * PAGE)
        assert address_space.any_registered(me, [(start + PAGE, 2 * PAGE)])
        assert address_space.any_registered(me, [(start, PAGE), (start + 2 * PAGE, 2 * PAGE)])
        assert not address_space.any_registered(me, [(start, PAGE), (start + 3 * PAGE, PAGE)])
    mapping.close()


@pytest.mark.parametrize(
    ("runs", "whole"),
    [
        ([(0, 4)], True),
        ([(0, 2), (2, 4)], True),
        ([(0, 1), (2, 4)], False),
        ([(1, 4)], False),
        ([(0, 3)], False),
        ([], False),
        ([(0, 1), (1, 9), (9, 10)], True),
    ],
)
def test_covered(runs: list[tuple[int, int]], whole: bool) -> None:
    assert address_space.covered(runs, 0, 4) is whole


def test_who_locks_all_its_memory() -> None:
    assert not address_space.locks_its_memory(os.getpid())
    words = "import ctypes, sys; print(ctypes.CDLL(None).mlockall(3), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"0\n"
        assert address_space.locks_its_memory(child.pid)
        child.stdin.close()


def test_pidfds() -> None:
    pidfd = os.pidfd_open(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        dead = os.pidfd_open(child.pid)
        child.wait()
    other = os.eventfd(0)
    try:
        assert address_space.pid_of(pidfd) == os.getpid()
        assert address_space.owner_of(os.getpid()) == os.geteuid()
        for wrong in (dead, other):
            with pytest.raises(ValueError, match=r"process|pidfd"):
                address_space.pid_of(wrong)
    finally:
        for fd in (pidfd, dead, other):
            os.close(fd)


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        pid = child.pid
    with pytest.raises(OSError):
        address_space.mapped_ranges(pid)
    assert mmap.PAGESIZE == PAGE
