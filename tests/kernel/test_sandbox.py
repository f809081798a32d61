"""What Landlock and the seccomp filter take from a process: each attack is tried behind each wall, and behind none."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import mmap
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel import landlock, seccomp

LIBC = ctypes.CDLL(None, use_errno=True)
HERE = seccomp.architecture()
ELSEWHERE = "127.0.0.1"


def call(number: int, *arguments: int) -> None:
    LIBC.syscall.restype = ctypes.c_long
    if LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "call")


def denied(name: str) -> int:
    assert HERE is not None
    number = seccomp.DENIED[name][HERE.column]
    assert number is not None
    return number


def in_child(act: Callable[[], Any], *walls: Callable[[], object]) -> Any:
    """What ``act`` gives, or the name of the errno that it met, in a process behind these walls; ``signal N`` if that
    ended it."""
    hear, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for wall in walls:
                assert wall()
            try:
                found = act()
            except OSError as error:
                found = errno.errorcode[error.errno or 0]
            os.write(tell, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(tell)
    answer = os.read(hear, 1 << 16)
    os.close(hear)
    _, status = os.waitpid(pid, 0)
    return json.loads(answer) if answer else f"signal {os.WTERMSIG(status)}"


def seccomp_filter() -> bool:
    prepared = seccomp.prepare()
    return prepared is not None and prepared.restrict()


def connect(address: tuple[str, int]) -> None:
    with socket.socket() as caller:
        caller.connect(address)


def a_thread() -> str:
    said: list[str] = []
    thread = threading.Thread(target=said.append, args=("thread",))
    thread.start()
    thread.join(10)
    return said[0]


# --- the two walls by themselves --------------------------------------------------------------------------------------


def test_this_machine_has_both() -> None:
    """The proof of everything below: it must not pass because there is no wall."""
    assert landlock.abi() >= 1
    assert seccomp.available()


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (1, (0x1FFF,)),
        (2, (0x3FFF,)),
        (3, (0x7FFF,)),
        (4, (0x7FFF, 3)),
        (5, (0xFFFF, 3)),
        (6, (0xFFFF, 3, 3)),
        (7, (0xFFFF, 3, 3)),
        (99, (0xFFFF, 3, 3)),
    ],
)
def test_what_each_version_is_asked(version: int, fields: tuple[int, ...]) -> None:
    assert landlock.attributes(version) == fields


def test_landlock_closes_every_path_and_keeps_what_is_open(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("open before")
    opened = os.open(file, os.O_RDWR)

    def attacks() -> dict[str, str]:
        tried = {
            "read": lambda: os.open(file, os.O_RDONLY),
            "list": lambda: list(tmp_path.iterdir()),
            "make": lambda: os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT),
            "mkdir": lambda: (tmp_path / "directory").mkdir(),
            "unlink": lambda: file.unlink(),
            "rename": lambda: file.rename(tmp_path / "other"),
            "memory of others": lambda: os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR),
            "device": lambda: os.open("/dev/null", os.O_RDWR),
        }
        return {name: attempt(act) for name, act in tried.items()}

    found = in_child(attacks, landlock.restrict)
    assert set(found.values()) <= {"EACCES"}, found
    assert in_child(lambda: os.pread(opened, 99, 0).decode(), landlock.restrict) == "open before"
    assert file.exists() and list(tmp_path.iterdir()) == [file]
    os.close(opened)


def attempt(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "allowed"


@pytest.mark.skipif(landlock.abi() < 4, reason="TCP came with ABI 4")
def test_landlock_closes_tcp() -> None:
    with socket.create_server((ELSEWHERE, 0)) as server:
        address = server.getsockname()
        assert in_child(lambda: attempt(lambda: connect(address))) == "allowed"
        assert in_child(lambda: attempt(lambda: connect(address)), landlock.restrict) == "EACCES"
        assert in_child(lambda: attempt(lambda: socket.socket().bind((ELSEWHERE, 0))), landlock.restrict) == "EACCES"


@pytest.mark.skipif(landlock.abi() < 6, reason="scopes came with ABI 6")
def test_landlock_closes_signals_and_abstract_sockets() -> None:
    name = f"\0postcopy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()

        def reach() -> list[str]:
            with socket.socket(socket.AF_UNIX) as caller:
                spoken = attempt(lambda: caller.connect(name))
            return [spoken, attempt(lambda: os.kill(os.getppid(), 0)), attempt(lambda: os.kill(os.getpid(), 0))]

        assert in_child(reach) == ["allowed"] * 3
        assert in_child(reach, landlock.restrict) == ["EPERM", "EPERM", "allowed"]


# --- the filter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name, numbers in seccomp.DENIED.items() if numbers[HERE.column if HERE else 0]]
)
def test_every_call_of_the_list_is_refused(name: str) -> None:
    # With arguments that could do no harm were it allowed: -1 is no descriptor, no pid, no address.
    assert in_child(lambda: attempt(lambda: call(denied(name), -1, -1, -1, -1, -1, -1)), seccomp_filter) == "EPERM"


def test_sockets_but_unix_ones() -> None:
    def sockets() -> list[str]:
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET)
        return [attempt(partial(socket.socket, family, socket.SOCK_DGRAM)) for family in families]

    assert in_child(sockets, seccomp_filter) == ["allowed", *["EPERM"] * 4]
    assert in_child(lambda: attempt(lambda: socket.socketpair(socket.AF_UNIX)), seccomp_filter) == "allowed"


def test_no_process_but_threads() -> None:
    assert in_child(lambda: attempt(lambda: os._exit(0) if os.fork() == 0 else None), seccomp_filter) == "EPERM"
    assert in_child(a_thread, seccomp_filter) == "thread"


def test_it_may_end_itself_by_a_signal_and_nobody_else() -> None:
    assert HERE is not None
    kill, tgkill = HERE.kill, HERE.tgkill
    parent = os.getpid()
    assert in_child(lambda: attempt(lambda: call(tgkill, parent, parent, 0)), seccomp_filter) == "EPERM"
    assert in_child(lambda: attempt(lambda: call(kill, parent, 0)), seccomp_filter) == "EPERM"
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL), seccomp_filter) == "signal 9"

    def abort() -> None:
        faulthandler.disable()
        os.abort()

    assert in_child(abort, seccomp_filter) == f"signal {int(signal.SIGABRT)}"


def test_no_executable_memory() -> None:
    read_write, execute = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC

    def memory() -> list[str]:
        return [attempt(partial(mmap.mmap, -1, 4096, prot=how)) for how in (read_write, execute)]

    assert in_child(memory) == ["allowed", "allowed"]
    assert in_child(memory, seccomp_filter) == ["allowed", "EPERM"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86 has three ways into the kernel")
def test_another_architecture_ends_the_process() -> None:
    assert in_child(lambda: call(0x40000000 | 39), seccomp_filter) == f"signal {int(signal.SIGSYS)}"


def test_both_together_and_again() -> None:
    """A worker of a custodian that stands behind walls itself has two layers."""
    found = in_child(a_thread, landlock.restrict, seccomp_filter, landlock.restrict, seccomp_filter)
    assert found == "thread"


def test_the_numbers_are_those_of_the_headers() -> None:
    """The table against the kernel's headers, where they are installed, and for both architectures."""
    headers = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    for column, header in enumerate(headers):
        if not Path(header).exists():
            continue
        numbers = dict(re.findall(r"define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
        for name, pair in seccomp.DENIED.items():
            if name in numbers:
                assert pair[column] == int(numbers[name]), name
        of = list(seccomp.ARCHITECTURES.values())[column]
        for name in ("seccomp", "socket", "socketpair", "clone", "kill", "tgkill", "mmap", "mprotect", "pkey_mprotect"):
            assert getattr(of, name) == int(numbers[name]), name
