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
from tests.house.house import PAGE, House, PuppetError, alive, descriptors, end_by_pidfd, until, word
from tests.house.remote import Source
from tests.kernel.huge_pool import reserved

PAGES = 512
SIZE = PAGES * PAGE
HUGE = 2 << 20
RESUME = """
from postcopy.door import Door
from postcopy.deadline import Deadline
from postcopy_protocol.messages import *
def resume(number):
    door = Door(directory, Deadline(20.0))
    door.ask(Hello("again", "native"), Welcome, Deadline(20.0))
    return door, door.ask(Resume(number), Resumed, Deadline(20.0))[0]
"""


@pytest.mark.parametrize("own", [True, False], ids=["our user", "another user"])
def test_clients_that_are_announced(runtime_dir: Path, source_file: SourceFile, own: bool) -> None:
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K", allow_uid=[65534]) as house:
        client = house.client(None)
        if not own:
            client.do("become(65534)")
        client.attach()
        assert client.do("words(b, [1])") == [word(PAGE)]
        house.kill()
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        house.recover()
        house.kill_worker(client)
        assert client.do(f"words(b, {list(range(PAGES))})") == [word(page * PAGE) for page in range(PAGES)]


def test_a_fork_of_an_adopted_client(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        client = house.client()
        client.do(f"write(b, {3 * PAGE}, '0100000000000000')")
        house.kill()
        house.recover()
        assert client.do("child('words(b, [3, 4, 5])')") == [1, word(4 * PAGE), word(5 * PAGE)]
        until(lambda: len(house.status()["clients"]) == 1, "the child is forgotten")
        assert client.do("words(b, [5, 6])") == [word(5 * PAGE), word(6 * PAGE)]


def test_resuming(runtime_dir: Path, source_file: SourceFile) -> None:
    """The same process gets a door again, and may unmap what it had before; nobody else may."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        client, thief = house.client(), house.client(None)
        where = client.do("address(b)")
        worker = house.worker(client)
        house.kill()
        house.recover()
        for puppet in (client, thief):
            puppet.do(RESUME)
        with pytest.raises(PuppetError):
            thief.do("resume(1)")
        assert client.do("list(resume(1)[1].released)") == []
        client.do("door, _ = resume(1)")  # again: the old connection goes
        assert client.do("words(b, [1])") == [word(PAGE)]
        assert house.worker(client) == worker and len(house.status()["clients"]) == 1
        client.do("opened = door.ask(OpenBlock('ram0', 'private'), BlockOpened, Deadline(20.0))")
        client.do(f"door.ask(Unmap(1, {where}), Unmapped, Deadline(20.0)) and None")
        until(lambda: not alive(worker), "no region, no worker")


def test_a_lease_that_was_inherited(runtime_dir: Path, source_file: SourceFile) -> None:
    """Whoever wants to write to the file does not wait for a supervisor that is dead; no worker is there to help."""
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        house.kill()
        house.recover()
        begun = time.monotonic()
        os.close(os.open(path, os.O_WRONLY))
        assert time.monotonic() - begun < 10
        client = house.client()
        assert client.do("words(b, [1])") == [word(PAGE)]


def test_a_lease_that_was_wanted_meanwhile(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        house.kill()
        pid = os.fork()
        if pid == 0:
            os.close(os.open(path, os.O_WRONLY))
            os._exit(0)
        house.recover()
        until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "it may write", 10)


def test_an_export_that_died(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path, target = source_file(SIZE), tmp_path / "export"
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        house.export(target)
        house.kill()
        house.recover()
        begun = house.export(target)
        assert isinstance(begun, ExportProgress)
        until(lambda: house.progress(begun.job).state == "done", "it is exported")
        assert target.read_bytes() == path.read_bytes()


def test_killed_at_its_end(runtime_dir: Path, source_file: SourceFile) -> None:
    """While it waits for a worker that does not leave: what it had begun to end begins again."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared")]
        worker = house.worker(clients[0])
        end_by_pidfd(worker, signal.SIGSTOP, "postcopy-w")
        house.process.send_signal(signal.SIGTERM)
        until(lambda: "ending" in house.last_log(), "it ends")
        house.kill()
        with contextlib.suppress(ProcessLookupError):  # on a busy machine the end has insisted already
            end_by_pidfd(worker, signal.SIGCONT, "postcopy-w")
        house.recover()
        for client in clients:
            assert client.do("words(b, [7])") == [word(7 * PAGE)]


def test_nothing_leaks(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        keeper = house.client()
        counts = []
        for _ in range(3):
            gone = house.client()
            house.kill()
            gone.kill()
            gone.status()
            house.recover()
            until(lambda: len(house.status()["clients"]) == 1, "it is forgotten")
            counts.append(len(descriptors(house.pid)))
            assert keeper.do("words(b, [1])") == [word(PAGE)]
        # A worker that is just coming back has one descriptor more for a moment.
        until(lambda: len(descriptors(house.pid)) <= counts[0], f"more and more descriptors: {counts}")


def test_restarts_are_counted_anew_and_go_on(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        client = house.client()
        for number in range(2):
            house.kill_worker(client)
            assert client.do(f"words(b, [{number}])") == [word(number * PAGE)]
        house.kill()
        house.recover()
        assert house.status()["totals"]["restarts"] == 0
        house.kill_worker(client)
        assert client.do("words(b, [9])") == [word(9 * PAGE)]
        assert house.status()["totals"]["restarts"] == 1


@pytest.fixture
def pool() -> Iterator[None]:
    with reserved(6):
        yield


@pytest.mark.hugetlb
@pytest.mark.xdist_group("hugetlb")
@pytest.mark.usefixtures("pool")
def test_huge_pages(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(2 * HUGE + 4099)
    options: dict[str, Any] = {"page_size": "2M", "background_rate": "0"}
    source = Source(f"far={source_file(2 * HUGE, 0, 'far')}")
    with source, House(runtime_dir, f"near={path}", source.block("far"), **options) as house:
        near, far = house.client("near"), house.client("far", "shared")
        assert near.do("words(b, [1])") == far.do("words(b, [1])") == [word(PAGE)]
        house.kill()
        far.begin("words(b, [600])")
        assert near.do("words(b, [600])") == [word(600 * PAGE)]
        house.recover()
        assert far.answer() == [word(600 * PAGE)]
        assert near.do(f"check(b, {str(path)!r})") == -1
