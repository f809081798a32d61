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
from tests.system.remote import Source, await_state
from tests.system.service import PAGE, Puppet, Service, alive, end_by_pidfd, until, word
from tests.system.test_custodian import custodian, kill_custodian

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
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        worker = service.worker(client)
        reads(client, 1)
        service.kill()
        reads(client, 2, 1000)
        service.recover()
        reads(client, 3, 1001)
        record = service.record(client)
        assert (record["worker_pid"], record["state"], record["restarts"]) == (worker, "running", 0)
        assert service.status()["recovered"] == 1
        (told,) = service.events("recover")
        assert told.startswith("1 clients, 1 workers and 1 blocks")
        late = service.client("ram0", mode)
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1


def test_twice_with_writes_of_a_private_client(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        clients[0].do(f"write(b, {5 * PAGE}, 'ff' * 8)")
        for page in (10, 20):
            service.kill()
            service.recover()
            for client in clients:
                reads(client, page)
        assert clients[0].do("words(b, [5])") == [2**64 - 1]
        reads(clients[1], 5)
        assert service.status()["recovered"] == 2
        assert {record["id"] for record in service.status()["clients"]} == {1, 2}


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_that_died_meanwhile(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client = service.client("ram0", mode)
        worker = service.worker(client)
        service.kill()
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        reads(client, 7)
        service.recover()
        assert service.worker(client) != worker
        reads(client, 8)
        service.kill_worker(client)
        reads(client, 9)


def test_a_worker_killed_together_with_the_supervisor(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        workers = [service.worker(client) for client in clients]
        for pid in workers:
            end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
        service.kill()
        service.recover()
        for client in clients:
            reads(client, 7)


def test_clients_that_ended_meanwhile(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        gone, stays, last = (service.client() for _ in range(3))
        workers = {client: service.worker(client) for client in (gone, stays, last)}
        service.kill()
        gone.kill()
        until(lambda: not alive(workers[gone]), "its worker ends")
        service.recover()
        until(lambda: len(service.status()["clients"]) == 2, "it is forgotten")
        last.kill()
        until(lambda: len(service.status()["clients"]) == 1, "the one that ends later is forgotten too")
        until(lambda: not alive(workers[last]), "and its worker ends")
        reads(stays, 9)


def test_nothing_is_there(runtime_dir: Path, source_file: SourceFile) -> None:
    """A service always says --recover: the first start and one after an orderly end find nothing."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", recover=True) as service:
        assert "nothing to recover" in service.last_log()
        reads(service.client(), 7)
        assert service.status()["recovered"] == 0


def test_nobody_is_left(runtime_dir: Path, source_file: SourceFile) -> None:
    """Without --recover too; what was received is kept only with it."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        reads(service.client(), 7)
        service.await_received(1)
        service.kill()
        service.recover()
        assert service.block()["received"] == 1
        for puppet in service._puppets:
            puppet.close()
        service.kill()
        service.start()
        service.await_ready()
        assert service.block()["received"] == 0
        until(lambda: len(service.people()) == 1, "the old custodian has ended")
        reads(service.client(), 7)


def test_a_complete_block(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        assert client.do(f"check(b, {str(path)!r})") == -1
        until(lambda: service.record(client)["released"], "it is released")
        service.kill()
        service.recover()
        assert client.do(f"check(b, {str(path)!r}, 'random')") == -1
        assert service.record(client)["state"] == "running"
        late = service.client()
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert service.record(late)["worker_pid"] is None


def test_the_custodian_first_and_then_the_supervisor(runtime_dir: Path, source_file: SourceFile) -> None:
    """Workers that a dead custodian forked are known to the next one, and through it to the next supervisor."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        workers = [service.worker(client) for client in clients]
        kill_custodian(service)
        custodian(service)
        reads(service.client(), 1)  # the new one is there
        service.kill()
        end_by_pidfd(workers[0], signal.SIGKILL, "postcopy-w")
        for client in clients:
            reads(client, 7)
        service.recover()
        assert service.worker(clients[0]) != workers[0]
        assert service.worker(clients[1]) == workers[1]
        kill_custodian(service)
        for client in clients:
            service.kill_worker(client)
            reads(client, 8)


def test_stepping_aside(runtime_dir: Path, source_file: SourceFile) -> None:
    """``stop --keep-workers`` ends only the supervisor; a newer one takes over."""
    with Service(runtime_dir, f"ram0={source_file(SIZE)}", fault_around="4K") as service:
        client = service.client()
        worker = service.worker(client)
        reads(client, 1)
        service.stop(keep_workers=True)
        assert service.wait() == 0
        reads(client, 2)
        service.recover()
        assert service.worker(client) == worker
        reads(client, 3)
        service.check_log()


@pytest.mark.parametrize("up", [True, False], ids=["source up", "source down"])
def test_remote_clients_that_wait(runtime_dir: Path, source: Source, up: bool) -> None:
    with Service(runtime_dir, source.block(), **SLOW) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        for client in clients:
            reads(client, 1)
        workers = [service.worker(client) for client in clients]
        source.tell(signal.SIGSTOP)
        for client in clients:
            begin(client, 2, 3)
        service.kill()
        if up:
            source.tell(signal.SIGCONT)
        else:
            source.end()
        late = service.client(None)
        assert not any(client.answered(0.2) for client in clients)
        service.recover()
        if not up:
            assert not any(client.answered(0.5) for client in clients)
            source.start()
        for client in clients:
            ends(client, 2, 3)
            reads(client, 1, 4)
        assert [service.worker(client) for client in clients] == workers
        await_state(service, "up")
        late.attach()
        reads(late, 5)


def test_a_remote_block_arrives_whole(runtime_dir: Path, source: Source) -> None:
    """With the background stream; what was being placed at the kill is not left out."""
    path = path_of(source)
    with Service(runtime_dir, source.block(), background_rate="4M") as service:
        client = service.client()
        begin(client, 7)
        ends(client, 7)
        for _ in range(2):
            service.kill()
            service.recover()
        until(lambda: service.block()["complete"], "it is complete")
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_remote_worker_killed_without_a_supervisor(runtime_dir: Path, source: Source) -> None:
    with Service(runtime_dir, source.block(), **SLOW) as service:
        client = service.client()
        reads(client, 1)
        worker = service.worker(client)
        service.kill()
        begin(client, 2)
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        assert not client.answered(0.2)
        service.recover()
        ends(client, 2)
        assert service.worker(client) != worker


def test_another_source_content(runtime_dir: Path, source: Source, source_file: SourceFile) -> None:
    """Judged when the source speaks: not used, and clients wait until the right one is there."""
    right = source._blocks
    with Service(runtime_dir, source.block(), **SLOW) as service:
        client = service.client()
        reads(client, 1)
        service.kill()
        source.end()
        source.start(f"ram0={source_file(SIZE, 3, 'other')}")
        service.recover()
        begin(client, 2)
        until(lambda: service.events("source-refused"), "it is refused")
        assert not client.answered(0.2)
        source.end()
        source.start(*right)
        ends(client, 2)


def test_poison_when_the_source_is_gone_too(runtime_dir: Path, source: Source) -> None:
    """``--on-source-loss poison`` holds for a source that the next supervisor has never met."""
    with Service(runtime_dir, source.block(), on_source_loss="poison", source_timeout="1", **SLOW) as service:
        client = service.client()
        reads(client, 1)
        service.kill()
        source.end()
        begin(client, 2)
        service.recover()
        assert client.status(20) == -signal.SIGBUS
        assert service.events("pause")


def test_what_was_being_placed_comes_all_the_same(
    runtime_dir: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked by the dead supervisor and not placed: no reader asks for it, and the background must."""
    with Service(runtime_dir, source.block(), **SLOW) as service:
        service.kill()
        monkeypatch.setenv(VARIABLE, "page.arrived:3")
        service.start(recover=True, background_rate="16M")
        assert service.wait() == -signal.SIGKILL
        monkeypatch.delenv(VARIABLE)
        service.recover(background_rate="16M")
        until(lambda: service.block()["complete"], "it is complete")
        assert service.client().do(f"check(b, {str(path_of(source))!r})") == -1


def test_nobody_comes_back_in_time(runtime_dir: Path, source: Source) -> None:
    """``--on-orphan poison``: who waits gets SIGBUS, never zeros; who did not touch reads on with a late one."""
    with Service(runtime_dir, source.block(), orphan_timeout="0.5", on_orphan="poison", **SLOW) as service:
        waits, stays = service.client(), service.client("ram0", "shared")
        for client in (waits, stays):
            reads(client, 1)
        service.kill()
        begin(waits, 2)
        assert waits.status(20) == -signal.SIGBUS
        reads(stays, 1)
        service.recover()
        reads(stays, 2, 3)
