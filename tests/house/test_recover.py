"""A supervisor is killed or steps aside, and the next one takes everything over: clients notice latency only.

Local blocks go on without any supervisor; what only a supervisor can bring waits until there is one again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel.crashpoints import VARIABLE
from tests.conftest import SourceFile
from tests.house.house import PAGE, House, Puppet, alive, end_by_pidfd, until, word
from tests.house.remote import Source, await_state
from tests.house.test_custodian import custodian, kill_custodian

PAGES = 1024
SIZE = PAGES * PAGE
SLOW: dict[str, Any] = {"fault_around": "4K", "background_rate": "0"}


@pytest.fixture
def source(source_file: SourceFile) -> Iterator[Source]:
    with Source(f"ram0={source_file(SIZE)}") as source:
        yield source


def path_of(source: Source) -> Path:
    return Path(source._blocks[0].partition("=")[2])


def reads(client: Puppet, *pages: int) -> None:
    """The client reads the right bytes in these pages."""
    assert client.do(f"words(b, {list(pages)})") == [word(page * PAGE) for page in pages]


def begin(client: Puppet, *pages: int) -> None:
    client.begin(f"words(b, {list(pages)})")


def ends(client: Puppet, *pages: int, within: float = 20.0) -> None:
    """What was begun ends with the right bytes."""
    assert client.answer(within) == [word(page * PAGE) for page in pages]


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_local_clients_read_on(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        client = house.client("ram0", mode)
        worker = house.worker(client)
        reads(client, 1)
        house.kill()
        reads(client, 2, 1000)
        house.recover()
        reads(client, 3, 1001)
        record = house.record(client)
        assert (record["worker_pid"], record["state"], record["restarts"]) == (worker, "running", 0)
        assert house.status()["recovered"] == 1
        (told,) = house.events("recover")
        assert told.startswith("1 clients, 1 workers and 1 blocks")
        late = house.client("ram0", mode)
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1


def test_twice_with_writes_of_a_private_client(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared")]
        clients[0].do(f"write(b, {5 * PAGE}, 'ff' * 8)")
        for page in (10, 20):
            house.kill()
            house.recover()
            for client in clients:
                reads(client, page)
        assert clients[0].do("words(b, [5])") == [2**64 - 1]
        reads(clients[1], 5)
        assert house.status()["recovered"] == 2
        assert {record["id"] for record in house.status()["clients"]} == {1, 2}


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_that_died_meanwhile(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        client = house.client("ram0", mode)
        worker = house.worker(client)
        house.kill()
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        reads(client, 7)
        house.recover()
        assert house.worker(client) != worker
        reads(client, 8)
        house.kill_worker(client)
        reads(client, 9)


def test_a_worker_killed_together_with_the_supervisor(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared")]
        workers = [house.worker(client) for client in clients]
        for pid in workers:
            end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
        house.kill()
        house.recover()
        for client in clients:
            reads(client, 7)


def test_clients_that_ended_meanwhile(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        gone, stays, last = (house.client() for _ in range(3))
        workers = {client: house.worker(client) for client in (gone, stays, last)}
        house.kill()
        gone.kill()
        until(lambda: not alive(workers[gone]), "its worker ends")
        house.recover()
        until(lambda: len(house.status()["clients"]) == 2, "it is forgotten")
        last.kill()
        until(lambda: len(house.status()["clients"]) == 1, "the one that ends later is forgotten too")
        until(lambda: not alive(workers[last]), "and its worker ends")
        reads(stays, 9)


def test_nothing_is_there(runtime_dir: Path, source_file: SourceFile) -> None:
    """A service always says --recover: the first start and one after an orderly end find nothing."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", recover=True) as house:
        assert "nothing to recover" in house.last_log()
        reads(house.client(), 7)
        assert house.status()["recovered"] == 0


def test_nobody_is_left(runtime_dir: Path, source_file: SourceFile) -> None:
    """Without --recover too; what was received is kept only with it."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        reads(house.client(), 7)
        house.await_received(1)
        house.kill()
        house.recover()
        assert house.block()["received"] == 1
        for puppet in house._puppets:
            puppet.close()
        house.kill()
        house.start()
        house.await_ready()
        assert house.block()["received"] == 0
        until(lambda: len(house.people()) == 1, "the old custodian has ended")
        reads(house.client(), 7)


def test_a_complete_block(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with House(runtime_dir, f"ram0={path}") as house:
        client = house.client()
        assert client.do(f"check(b, {str(path)!r})") == -1
        until(lambda: house.record(client)["released"], "it is released")
        house.kill()
        house.recover()
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1
        assert house.record(client)["state"] == "running"
        late = house.client()
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert house.record(late)["worker_pid"] is None


def test_the_custodian_first_and_then_the_supervisor(runtime_dir: Path, source_file: SourceFile) -> None:
    """Workers that a dead custodian forked are known to the next one, and through it to the next supervisor."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared")]
        workers = [house.worker(client) for client in clients]
        kill_custodian(house)
        custodian(house)
        reads(house.client(), 1)  # the new one is there
        house.kill()
        end_by_pidfd(workers[0], signal.SIGKILL, "postcopy-w")
        for client in clients:
            reads(client, 7)
        house.recover()
        assert house.worker(clients[0]) != workers[0]
        assert house.worker(clients[1]) == workers[1]
        kill_custodian(house)
        for client in clients:
            house.kill_worker(client)
            reads(client, 8)


def test_stepping_aside(runtime_dir: Path, source_file: SourceFile) -> None:
    """``stop --keep-workers`` ends only the supervisor; a newer one takes over."""
    with House(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as house:
        client = house.client()
        worker = house.worker(client)
        reads(client, 1)
        house.stop(keep_workers=True)
        assert house.wait() == 0
        reads(client, 2)
        house.recover()
        assert house.worker(client) == worker
        reads(client, 3)
        house.check_log()


@pytest.mark.parametrize("up", [True, False], ids=["source up", "source down"])
def test_remote_clients_that_wait(runtime_dir: Path, source: Source, up: bool) -> None:
    with House(runtime_dir, source.block(), **SLOW) as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared")]
        for client in clients:
            reads(client, 1)
        workers = [house.worker(client) for client in clients]
        source.tell(signal.SIGSTOP)
        for client in clients:
            begin(client, 2, 3)
        house.kill()
        if up:
            source.tell(signal.SIGCONT)
        else:
            source.end()
        late = house.client(None)
        assert not any(client.answered(0.2) for client in clients)
        house.recover()
        if not up:
            assert not any(client.answered(0.5) for client in clients)
            source.start()
        for client in clients:
            ends(client, 2, 3)
            reads(client, 1, 4)
        assert [house.worker(client) for client in clients] == workers
        await_state(house, "up")
        late.attach()
        reads(late, 5)


def test_a_remote_block_arrives_whole(runtime_dir: Path, source: Source) -> None:
    """With the background stream; what was being placed at the kill is not left out."""
    path = path_of(source)
    with House(runtime_dir, source.block(), background_rate="4M") as house:
        client = house.client()
        begin(client, 7)
        ends(client, 7)
        for _ in range(2):
            house.kill()
            house.recover()
        until(lambda: house.block()["complete"], "it is complete")
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_remote_worker_killed_without_a_supervisor(runtime_dir: Path, source: Source) -> None:
    with House(runtime_dir, source.block(), **SLOW) as house:
        client = house.client()
        reads(client, 1)
        worker = house.worker(client)
        house.kill()
        begin(client, 2)
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        assert not client.answered(0.2)
        house.recover()
        ends(client, 2)
        assert house.worker(client) != worker


def test_another_source_content(runtime_dir: Path, source: Source, source_file: SourceFile) -> None:
    """Judged when the source speaks: not used, and clients wait until the right one is there."""
    right = source._blocks
    with House(runtime_dir, source.block(), **SLOW) as house:
        client = house.client()
        reads(client, 1)
        house.kill()
        source.end()
        source.start(f"ram0={source_file(SIZE, 3, 'other')}")
        house.recover()
        begin(client, 2)
        until(lambda: house.events("source-refused"), "it is refused")
        assert not client.answered(0.2)
        source.end()
        source.start(*right)
        ends(client, 2)


def test_poison_when_the_source_is_gone_too(runtime_dir: Path, source: Source) -> None:
    """``--on-source-loss poison`` holds for a source that the next supervisor has never met."""
    with House(runtime_dir, source.block(), on_source_loss="poison", source_timeout="1", **SLOW) as house:
        client = house.client()
        reads(client, 1)
        house.kill()
        source.end()
        begin(client, 2)
        house.recover()
        assert client.status(20) == -signal.SIGBUS
        assert house.events("pause")


def test_what_was_being_placed_comes_all_the_same(
    runtime_dir: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked by the dead supervisor and not placed: no reader asks for it, and the background must."""
    with House(runtime_dir, source.block(), **SLOW) as house:
        house.kill()
        monkeypatch.setenv(VARIABLE, "page.arrived:3")
        house.start(recover=True, background_rate="16M")
        assert house.wait() == -signal.SIGKILL
        monkeypatch.delenv(VARIABLE)
        house.recover(background_rate="16M")
        until(lambda: house.block()["complete"], "it is complete")
        assert house.client().do(f"check(b, {str(path_of(source))!r})") == -1


def test_nobody_comes_back_in_time(runtime_dir: Path, source: Source) -> None:
    """``--on-orphan poison``: who waits gets SIGBUS, never zeros; who did not touch reads on with a late one."""
    with House(runtime_dir, source.block(), orphan_timeout="0.5", on_orphan="poison", **SLOW) as house:
        waits, stays = house.client(), house.client("ram0", "shared")
        for client in (waits, stays):
            reads(client, 1)
        house.kill()
        begin(waits, 2)
        assert waits.status(20) == -signal.SIGBUS
        reads(stays, 1)
        house.recover()
        reads(stays, 2, 3)
