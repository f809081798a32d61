"""OfferBackEnd brings a pidfd and a userfaultfd that a client has chosen: what it names, who may name it, and what can
be learned or hurt by it."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel import address_space
from postcopy_kernel.userfaultfd import RegisterMode, open_userfaultfd
from postcopy_protocol.messages import Attached, Hello, Mapped, OfferBackEnd, Resume, UserfaultfdAccepted, Welcome
from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, until
from tests.wire.caller import Caller
from tests.wire.test_hostile_door import PAGES, Watched

NOBODY, OTHER = 65534, 65533


@pytest.fixture
def watched(runtime_dir: Path, source_file: SourceFile) -> Iterator[Watched]:
    path = source_file(PAGES * PAGE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", allow_uid=[NOBODY, OTHER]) as service:
        yield Watched(service, path)
        assert service.client("ram0", "private").do(f"check(b, {str(path)!r})") == -1


@contextmanager
def sleeper(user: int, *, program: bool = True) -> Iterator[tuple[int, int]]:
    """A process of another user, and its pidfd. Not a ``program`` of its own: one that has only changed its user, whom
    the kernel protects from that user."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if program:
            os.dup2(told, 1)
            os.execv("/bin/sh", ["sh", "-c", "echo; exec sleep 600"])
        os.write(told, b"!")
        signal.pause()
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    try:
        assert os.read(ready, 1)
        yield pid, pidfd
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it is unharmed"
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ready, told, pidfd):
            os.close(fd)


def as_user(user: int, body: Callable[[], object]) -> Any:
    """Run ``body`` in a process of this user; what it returns must have a repr that is its own value."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os.write(writing, repr(body()).encode())
        except BaseException as error:
            os.write(writing, repr(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return ast.literal_eval(said)


def offered(service: Service, userfaultfd: int, pidfd: int) -> tuple[str, str]:
    """Code and reason of the refusal of such a back-end; empty when it is accepted."""
    with Caller(service.directory) as caller:
        caller.say(Hello("front", "vhost-user"))
        caller.get(Welcome)
        caller.say(OfferBackEnd(), [userfaultfd, pidfd])
        answer = caller.hear()
        return (getattr(answer, "code", ""), getattr(answer, "reason", ""))


def test_the_owner_of_the_process(watched: Watched) -> None:
    """For a front-end that is not root: its own user's processes, but none that the kernel protects from that user."""
    supervisor = os.pidfd_open(watched.service.pid)
    with (
        open_userfaultfd() as ufd,
        sleeper(NOBODY) as (_, own),
        sleeper(OTHER) as (_, strange),
        sleeper(NOBODY, program=False) as (_, protected),
        sleeper(0) as (_, roots),
    ):
        ufd.handshake()
        for pidfd in (strange, protected, roots, supervisor):
            code, reason = as_user(NOBODY, partial(offered, watched.service, ufd.fd, pidfd))
            assert code == "denied", reason
        assert as_user(NOBODY, lambda: offered(watched.service, ufd.fd, own)) == ("", "")
        code, reason = offered(watched.service, ufd.fd, supervisor)
        assert code == "bad-descriptor" and "names the supervisor" in reason, "not even for root"
    os.close(supervisor)
    watched.alone()


def test_descriptors_that_look_like_a_pidfd(watched: Watched, tmp_path: Path) -> None:
    """A zombie, a directory of /proc, a file whose text looks right, a descriptor of ours that has been closed."""
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    pidfd = os.pidfd_open(zombie)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    (tmp_path / "file").write_text(f"Pid:\t{os.getpid()}\n")
    with ExitStack() as stack, open_userfaultfd() as ufd:
        ufd.handshake()
        directory = os.open("/proc/self", os.O_RDONLY)
        file = os.open(tmp_path / "file", os.O_RDONLY)
        for fd in (pidfd, directory, file):
            stack.callback(os.close, fd)
        for fd in (pidfd, directory, file, ufd.fd):
            code, reason = offered(watched.service, ufd.fd, fd)
            assert code == "bad-descriptor" and "names no process" in reason
    os.waitpid(zombie, 0)
    watched.alone()


def test_a_userfaultfd_of_another_process_than_the_pidfds(watched: Watched) -> None:
    """It is served as long as that process lives or the front-end speaks; when the front-end is gone, the process is
    found not to have such memory, and all is forgotten. The process itself never notices."""
    with open_userfaultfd() as ufd, sleeper(NOBODY) as (_, pidfd), Caller(watched.service.directory) as caller:
        ufd.handshake()
        caller.say(Hello("front", "vhost-user"))
        caller.get(Welcome)
        caller.say(OfferBackEnd(), [ufd.fd, pidfd])
        caller.get(UserfaultfdAccepted)
        opened, memory = caller.open()
        with caller.map(opened, memory) as mapping:
            ufd.register(mapping.address, mapping.length, RegisterMode.MISSING)
            caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
            caller.get(Attached)
            assert mapping.view(8)[0] == 0, "served: the memory is the userfaultfd's"
            assert len(watched.service.status()["clients"]) == 2
            caller.socket.close()
            watched.alone()
            ufd.unregister(mapping.address, mapping.length)


def test_the_process_ends_and_so_does_all_of_it(watched: Watched) -> None:
    with open_userfaultfd() as ufd, Caller(watched.service.directory) as caller:
        ufd.handshake()
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pidfd = os.pidfd_open(process.pid)
        caller.say(Hello("front", "vhost-user"))
        caller.get(Welcome)
        caller.say(OfferBackEnd(), [ufd.fd, pidfd])
        caller.get(UserfaultfdAccepted)
        os.close(pidfd)
        process.communicate(b"\n")
        assert caller.ended()
    watched.alone()


def test_another_users_front_end_cannot_take_it_over(watched: Watched) -> None:
    """Resume of another user's back-end that has no front-end just now."""
    with open_userfaultfd() as ufd, Caller(watched.service.directory) as caller:
        ufd.handshake()
        mine = os.pidfd_open(os.getpid())
        caller.say(Hello("front", "vhost-user"))
        number = caller.get(Welcome).client
        caller.say(OfferBackEnd(), [ufd.fd, mine])
        caller.get(UserfaultfdAccepted)
        opened, memory = caller.open()
        with caller.map(opened, memory) as mapping:
            ufd.register(mapping.address, mapping.length, RegisterMode.MISSING)
            caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
            caller.get(Attached)
            caller.socket.close()
            assert as_user(NOBODY, lambda: resumed(watched.service, number)) == "denied"
            until(lambda: len(watched.service.status()["clients"]) == 2, "it is still served")
            ufd.unregister(mapping.address, mapping.length)
        os.close(mine)
    watched.alone()


def resumed(service: Service, number: int) -> str:
    with Caller(service.directory) as caller:
        caller.say(Hello("front", "vhost-user"))
        caller.get(Welcome)
        caller.say(Resume(number))
        return caller.refusal()


def test_which_user_may_look_into_a_process() -> None:
    with sleeper(NOBODY) as (own, _), sleeper(NOBODY, program=False) as (protected, _), sleeper(0) as (roots, _):
        assert [address_space.owner_of(pid) for pid in (own, protected, roots)] == [NOBODY, 0, 0]
