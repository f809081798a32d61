"""The end phase: a block whose pages have all come needs no workers any more, nor has it faults."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, PuppetError, Service, alive, until, word

SIZE = 512 * PAGE + 5


def released(service: Service, client: Puppet) -> bool:
    record = service.record(client)
    return record["worker_pid"] is None and record["released"] == ["ram0"]


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_clients_run_on_without_workers(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}") as service:
        clients = [service.client("ram0", mode) for _ in range(2)]
        workers = [service.worker(client) for client in clients]
        assert clients[0].do(f"check(b, {str(path)!r})") == -1
        for client in clients:
            until(partial(released, service, client), "the client is released")
        until(lambda: not any(alive(pid) for pid in workers), "the workers are gone")
        assert service.block()["complete"] is True
        faults = service.status()["totals"]["faults"]
        assert clients[1].do(f"check(b, {str(path)!r}, 'random')") == -1
        assert clients[1].do("open('/proc/self/smaps').read().count(' um ')") == 0, "nothing is registered any more"
        assert clients[0].do("b.resident()") == 1.0
        assert service.status()["totals"]["faults"] == faults
        if mode == "private":
            clients[0].do(f"write(b, {9 * PAGE}, 'abcd')")
            assert clients[1].do("words(b, [9])") == [word(9 * PAGE)]
        clients[0].do("b.close()")


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_later_attachers_and_forks_need_none(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client("ram0", mode)
        client.do("b.ensure()")
        until(partial(released, service, client), "the client is released")
        late = service.client("ram0", mode)
        assert late.do(f"check(b, {str(path)!r})") == -1
        assert service.record(late)["worker_pid"] is None
        assert len(service.people()) <= 2, "the custodian, and worker zero at most"
        client.do(f"write(b, {3 * PAGE}, 'abcd')")
        wanted = word(3 * PAGE + 8)
        assert client.do(f"child('[read(b, {3 * PAGE}, 2), words(b, [5, 511])]')") == [
            "abcd",
            [word(5 * PAGE), word(511 * PAGE)],
        ]
        assert late.do(f"int.from_bytes(b.buf[{3 * PAGE + 8}:{3 * PAGE + 16}], 'little')") == wanted
        assert service.status()["totals"]["faults"] > 0


def test_a_released_client_outlives_the_house(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        client.do("b.ensure()")
        until(partial(released, service, client), "the client is released")
        service.audit()
        service.end()
        assert client.do(f"check(b, {str(path)!r})") == -1
        client.do(f"path = {str(path)!r}")
        assert client.do("child('check(b, path)')") == -1
        client.do("b.ensure()")


def test_one_block_released_while_another_is_not(runtime_dir: Path, source_file: SourceFile) -> None:
    path, other = source_file(SIZE), source_file(SIZE, 3, "other.bin")
    with Service(runtime_dir, f"ram0={path}", f"ram1={other}", fault_around="4K") as service:
        client = service.client()
        client.attach("ram1", "shared", "c")
        client.do("b.ensure()")
        until(lambda: service.record(client)["released"] == ["ram0"], "ram0 is released")
        assert client.do("words(c, [5])") == [word(5 * PAGE, 3)]
        assert service.worker(client)
        assert client.do(f"check(b, {str(path)!r})") == -1
        assert client.do(f"check(c, {str(other)!r}, 'random')") == -1
        until(lambda: service.record(client)["released"] == ["ram0", "ram1"], "both are released")


def test_a_lost_page_prevents_the_release(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client()
        client.do(f"b.ensure({PAGE})")
        with path.open("r+b") as file:
            file.truncate(SIZE - 1)

        with pytest.raises(PuppetError) as told:
            until(lambda: client.do("b.ensure(0, 1, 10)"), "the first page is lost", 5)
        assert told.value.kind == "PageLost"
        client.begin("words(b, [0])")
        assert client.status() == -signal.SIGBUS
        assert service.block()["complete"] is False


def test_release_while_clients_fault_and_come_and_go(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(8 << 20)
    with Service(runtime_dir, f"ram0={path}") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            client.begin(f"[check(b, {str(path)!r}, 'random', 4096, {seed} + n) for n in range(30)]")
        for seed in range(4):
            late = service.client("ram0", ("private", "shared")[seed % 2])
            assert late.do(f"check(b, {str(path)!r})") == -1
            late.kill()
        assert [client.answer() for client in clients] == [[-1] * 30] * 4
