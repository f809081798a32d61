"""The main job: 64 parallel clients in both modes on a file of more than a hundred MB, a client and workers killed."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, alive, end_by_pidfd, until

CLIENTS = 64
SIZE = 128 * (1 << 20) + 4099
COMMON = 64 << 20
"""Bytes at the beginning that all read while the service is hit: the block cannot be whole before they read the
rest."""
OWN = 1 << 20
"""Bytes behind them that one client alone reads at first: its faults are not taken from it by faster ones."""
VICTIMS = 8


def started(service: Service) -> list[Puppet]:
    """All clients at once, attached; every second one shared."""
    clients = [service.client(None) for _ in range(CLIENTS)]
    for number, client in enumerate(clients):
        client.begin(f"b = attach(mode={('private', 'shared')[number % 2]!r})")
    for client in clients:
        client.answer(60)
    return clients


def faults(service: Service, clients: list[Puppet]) -> dict[int, int]:
    wanted = {client.pid for client in clients}
    return {record["pid"]: record["faults"] for record in service.status()["clients"] if record["pid"] in wanted}


@pytest.mark.slow
def test_64_clients_read_every_byte_while_some_of_the_house_dies(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    pages = -(-SIZE // PAGE)

    def reading(seed: int, begin: int, end: int) -> str:
        return f"check(b, {str(path)!r}, 'random', 65536, {seed}, {begin}, {end})"

    def own(seed: int, turn: int) -> str:
        begin = COMMON + (2 * seed + turn) * OWN
        return reading(seed, begin, begin + OWN)

    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = started(service)
        doomed, *rest = clients
        victims = rest[:VICTIMS]
        for seed, client in enumerate(clients):
            first = [own(seed, 0)] if client in (doomed, *victims) else []
            client.begin(f"[{', '.join([*first, reading(seed, 0, COMMON)])}]")
        until(lambda: min(faults(service, [doomed, *victims]).values()) > 5, "all of them fault", 60)
        workers = {record["pid"]: record["worker_pid"] for record in service.status()["clients"]}
        killed = [workers[client.pid] for client in victims]
        for pid in killed:
            end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
        doomed.kill()
        assert service.block()["received"] < pages, "the kills came in the middle"
        until(lambda: not any(alive(pid) for pid in killed), "the workers are dead")
        before = faults(service, victims)
        for seed, client in enumerate(victims, 1):
            client.begin(own(seed, 1))
        assert [client.answer(100) for client in victims] == [[-1, -1]] * VICTIMS
        assert [client.answer(100) for client in victims] == [-1] * VICTIMS
        until(lambda: moved(service, victims, before), "their successors answer faults", 30)
        assert doomed.status() == -signal.SIGKILL
        others = rest[VICTIMS:]
        assert [client.answer(100) for client in others] == [[-1]] * len(others)
        for seed, client in enumerate(rest, 1):
            client.begin(reading(seed, 0, SIZE))
        assert [client.answer(100) for client in rest] == [-1] * (CLIENTS - 1)
        document = service.status()
        assert document["totals"]["restarts"] == VICTIMS
        assert {record["pid"] for record in document["clients"]} == {client.pid for client in rest}
        service.await_received(pages)


def moved(service: Service, victims: list[Puppet], before: dict[int, int]) -> bool:
    """Has each victim had more faults than before? What it has read alone cannot have come by anybody else's."""
    now = faults(service, victims)
    return now.keys() == before.keys() and all(now[pid] > count for pid, count in before.items())


def test_many_threads_of_one_client(runtime_dir: Path, source_file: SourceFile) -> None:
    """Several threads on one page are several messages; each must run on."""
    path = source_file(2 << 20)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        client = service.client()
        client.do(
            "def populate(): [b.ensure(at, 16384) for at in range(0, b.size, 16384)]\n"
            "threads = [threading.Thread(target=populate) for _ in range(8)]\n"
            "[t.start() for t in threads]; [t.join() for t in threads]",
            60,
        )
        assert client.do(f"check(b, {str(path)!r})") == -1
        service.await_received((2 << 20) // PAGE)


def test_questions_while_all_this_goes_on(runtime_dir: Path, source_file: SourceFile) -> None:
    """Status, with audit, asked by several at once, is answered, and holds nobody up."""
    path = source_file(32 << 20)
    with Service(runtime_dir, f"ram0={path}", fault_around="4K") as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        answers: list[int] = []
        askers = [
            threading.Thread(target=lambda: answers.append(len([service.status(audit=True) for _ in range(10)])))
            for _ in range(3)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        assert answers == [10, 10, 10]
        assert [client.answer() for client in clients] == [-1] * 4
