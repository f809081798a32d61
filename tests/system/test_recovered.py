"""Life after a take-over: everything that a first supervisor can do, its successor can do with what it inherited."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy_protocol.messages import ExportProgress
from tests.conftest import SourceFile
from tests.kernel.huge_pool import reserved
from tests.system.remote import Source
from tests.system.service import PAGE, PuppetError, Service, alive, descriptors, end_by_pidfd, until, word

PAGES = 512
SIZE = PAGES * PAGE
HUGE = 2 << 20
RESUME = """
from postcopy.attach_socket import AttachConnection
from postcopy.deadline import Deadline
def resume(number):
    door = AttachConnection(directory, Deadline(20.0))
    door.greet("again", "native", Deadline(20.0))
    return door, door._ask(door._conversation.resume(number), Deadline(20.0))[0]
"""


@pytest.mark.parametrize("own", [True, False], ids=["our user", "another user"])
def test_clients_that_are_announced(runtime_dir: Path, source_file: SourceFile, own: bool) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K", allow_uid=[65534]) as service:
        client = service.client(None)
        if not own:
            client.do("become(65534)")
        client.attach()
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.kill()
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        service.recover()
        service.kill_worker(client)
        assert client.do(f"words(b, {list(range(PAGES))})") == [word(page * PAGE) for page in range(PAGES)]


def test_a_fork_of_an_adopted_client(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client = service.client()
        client.do(f"write(b, {3 * PAGE}, '0100000000000000')")
        service.kill()
        service.recover()
        assert client.do("child('words(b, [3, 4, 5])')") == [1, word(4 * PAGE), word(5 * PAGE)]
        until(lambda: len(service.status()["clients"]) == 1, "the child is forgotten")
        assert client.do("words(b, [5, 6])") == [word(5 * PAGE), word(6 * PAGE)]


def test_resuming(runtime_dir: Path, source_file: SourceFile) -> None:
    """The same process gets a door again, and may unmap what it had before; nobody else may."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client, thief = service.client(), service.client(None)
        where = client.do("address(b)")
        worker = service.worker(client)
        service.kill()
        service.recover()
        for puppet in (client, thief):
            puppet.do(RESUME)
        with pytest.raises(PuppetError):
            thief.do("resume(1)")
        assert client.do("list(resume(1)[1].released)") == []
        client.do("door, _ = resume(1)")  # again: the old connection goes
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert service.worker(client) == worker and len(service.status()["clients"]) == 1
        client.do("opened = door.open('ram0', 'private', Deadline(20.0))")
        client.do(f"door.unmap(1, {where}, Deadline(20.0))")
        until(lambda: not alive(worker), "no region, no worker")


def test_a_lease_that_was_inherited(runtime_dir: Path, source_file: SourceFile) -> None:
    """Whoever wants to write to the file does not wait for a supervisor that is dead; no worker is there to help."""
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        service.kill()
        service.recover()
        begun = time.monotonic()
        os.close(os.open(path, os.O_WRONLY))
        assert time.monotonic() - begun < 10
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]


def test_a_lease_that_was_wanted_meanwhile(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        service.kill()
        pid = os.fork()
        if pid == 0:
            os.close(os.open(path, os.O_WRONLY))
            os._exit(0)
        service.recover()
        until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "it may write", 10)


def test_an_export_that_died(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, target = source_file(SIZE), tmp_path / "export"
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        service.export(target)
        service.kill()
        service.recover()
        begun = service.export(target)
        assert isinstance(begun, ExportProgress)
        until(lambda: service.progress(begun.job).state == "done", "it is exported")
        assert target.read_bytes() == path.read_bytes()


def test_killed_at_its_end(runtime_dir: Path, source_file: SourceFile) -> None:
    """While it waits for a worker that does not leave: what it had begun to end begins again."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        worker = service.worker(clients[0])
        end_by_pidfd(worker, signal.SIGSTOP, "postcopy-w")
        service.process.send_signal(signal.SIGTERM)
        until(lambda: "ending" in service.last_log(), "it ends")
        service.kill()
        with contextlib.suppress(ProcessLookupError):  # on a busy machine the end has insisted already
            end_by_pidfd(worker, signal.SIGCONT, "postcopy-w")
        service.recover()
        for client in clients:
            assert client.do("words(b, [7])") == [word(7 * PAGE)]


def test_nothing_leaks(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        keeper = service.client()
        counts = []
        for _ in range(3):
            gone = service.client()
            service.kill()
            gone.kill()
            gone.status()
            service.recover()
            until(lambda: len(service.status()["clients"]) == 1, "it is forgotten")
            assert keeper.do("words(b, [1])") == [word(PAGE)]
            until(lambda: service.record(keeper)["state"] == "running", "its worker is connected again")
            counts.append(len(descriptors(service.pid)))
        # A worker that is just coming back has one descriptor more for a moment.
        until(lambda: len(descriptors(service.pid)) <= counts[0], f"more and more descriptors: {counts}")


def test_restarts_are_counted_anew_and_go_on(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client = service.client()
        for number in range(2):
            service.kill_worker(client)
            assert client.do(f"words(b, [{number}])") == [word(number * PAGE)]
        service.kill()
        service.recover()
        assert service.status()["totals"]["restarts"] == 0
        service.kill_worker(client)
        assert client.do("words(b, [9])") == [word(9 * PAGE)]
        assert service.status()["totals"]["restarts"] == 1


@pytest.fixture
def pool() -> Iterator[None]:
    with reserved(6):
        yield


@pytest.mark.hugetlb
@pytest.mark.usefixtures("pool")
def test_huge_pages(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(2 * HUGE + 4099)
    options: dict[str, Any] = {"page_size": "2M", "background_rate": "0"}
    source = Source(f"far={source_file(2 * HUGE, 0, 'far')}")
    with source, Service(runtime_dir, f"near={path}", source.block("far"), **options) as service:
        near, far = service.client("near"), service.client("far", "shared")
        assert near.do("words(b, [1])") == far.do("words(b, [1])") == [word(PAGE)]
        service.kill()
        far.begin("words(b, [600])")
        assert near.do("words(b, [600])") == [word(600 * PAGE)]
        service.recover()
        assert far.answer() == [word(600 * PAGE)]
        assert near.do(f"check(b, {str(path)!r})") == -1
