"""``--on-orphan`` when every process of the service is killed and none comes back: the client's watcher applies it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, PuppetError, Service, alive, stands, until, word
from tests.system.test_rescue import begin, ends, kill_all

PAGES = 64
STRANGER = 65534
PLAIN: dict[str, Any] = {"fault_around": "4K", "background_rate": "0", "on_orphan": "poison", "orphan_timeout": 1}


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(PAGES * PAGE)


def watchers(client: Puppet) -> list[int]:
    children = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"orphan_watcher.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def python_of_all() -> str:
    """A Python that other users may run too: the test's own may be below /root."""
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(PermissionError):
            command = [python, "-I", "-S", "-c", ""]
            if subprocess.run(command, user=STRANGER, group=STRANGER, extra_groups=[], check=False).returncode == 0:
                return python
    raise AssertionError("no Python that user 65534 may run")


def first(page: int) -> str:
    return word(page * PAGE).to_bytes(8, "little").hex()


def read(client: Puppet, page: int) -> str | None:
    """The first word of a page, by a system call; None: it is poisoned."""
    try:
        answer = client.do(f"syscall_read(b, {page * PAGE})", 30)
        assert isinstance(answer, str)
        return answer
    except PuppetError as error:
        assert "Bad address" in error.text, error
        return None


@pytest.mark.parametrize("uid", [0, STRANGER])
def test_poison_and_a_rescue_that_comes_later(runtime_dir: Path, path: Path, uid: int) -> None:
    rights: dict[str, Any] = {"shared_uid": [uid]} if uid else {}
    with (
        Source(f"ram1={path}") as source,
        Service(runtime_dir, f"ram0={path}", source.block("ram1"), **PLAIN, **rights) as service,
    ):
        clients = []
        for name, mode in (("ram0", "private"), ("ram1", "shared")):
            client = service.client(None)
            if uid:
                client.do(f"become({uid})")
                client.do(f"sys.executable = {python_of_all()!r}")
            client.attach(name, mode)
            clients.append(client)
        pids = [watchers(client) for client in clients]
        for round_ in (0, 1):
            at = 10 * round_
            for client in clients:
                assert read(client, at + 1) == first(at + 1)
            kill_all(service)
            for client in clients:
                client.begin(f"syscall_read(b, {(at + 2) * PAGE})")
            for client in clients:
                with pytest.raises(PuppetError, match="Bad address"):
                    client.answer(30)
                assert [read(client, page) for page in (at + 1, at + 3)] == [first(at + 1), None]
            service.recover()
            for client in clients:
                for page in (at + 2, at + 3, at + 4):
                    until(lambda client=client, page=page: read(client, page) == first(page), "healed")  # type: ignore[misc]
        assert [watchers(client) for client in clients] == pids, "the same watchers served both times"
        assert "SIGBUS from now on" in clients[0].errors()


def test_a_thread_that_holds_the_gil(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        (pid,) = watchers(client)
        kill_all(service)
        client.begin(f"bytes(b.buf[{5 * PAGE}:{5 * PAGE + 8}])")
        assert client.status(30) == -signal.SIGBUS
        until(lambda: not alive(pid), "its watcher has ended")
        service.recover()


def test_wait_is_a_choice_that_costs_nothing(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **{**PLAIN, "on_orphan": "wait", "orphan_timeout": 0.2}) as service:
        client = service.client()
        assert watchers(client) == []
        kill_all(service)
        begin(client, 5)
        assert not client.answered(1.5)
        service.recover()
        ends(client, 5)


def test_what_dies_alone_is_no_matter_for_the_watcher(runtime_dir: Path, path: Path) -> None:
    """Custodian and workers hold the lifeline, so local pages come as long as one of them can bring them."""
    with Service(runtime_dir, f"ram0={path}", **{**PLAIN, "orphan_timeout": 0.2}) as service:
        client = service.client()
        service.kill()
        time.sleep(0.6)
        begin(client, 5)
        ends(client, 5)
        service.recover()
        begin(client, 6)
        ends(client, 6)


def test_a_watcher_for_each_process_and_for_each_only_as_long_as_it_is_needed(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        (pid,) = watchers(client)
        client.do("c = attach('ram0', 'shared')")
        assert watchers(client) == [pid]
        client.do("pid = os.fork()\nif pid == 0:\n time.sleep(30)\n os._exit(0)")
        child = client.do("pid")
        until(lambda: Path(f"/proc/{child}/task/{child}/children").read_text(), "the child has one of its own")
        (own,) = map(int, Path(f"/proc/{child}/task/{child}/children").read_text().split())
        assert alive(pid) and own != pid
        client.do("os.kill(pid, 9)\nos.waitpid(pid, 0)")
        until(lambda: not alive(own), "it ends with the child")
        client.do("b.close()")
        assert alive(pid)
        client.do("c.close()")
        assert watchers(client) == [] and not alive(pid)


def test_a_watcher_that_does_not_answer_is_killed(runtime_dir: Path, path: Path) -> None:
    with Service(runtime_dir, f"ram0={path}", **PLAIN) as service:
        client = service.client()
        (pid,) = watchers(client)
        kill_all(service)
        assert read(client, 5) is None
        os.kill(pid, signal.SIGSTOP)
        until(lambda: stands(pid), "it stands still")
        service.recover()
        assert "does not answer" in service.last_log() and not alive(pid)
        assert read(client, 6) == first(6)
