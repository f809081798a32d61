"""The main job: 64 parallel clients in both modes on a file of several hundred MB, a client and workers killed."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.house.house import PAGE, House, Puppet, alive, end_by_pidfd, until

CLIENTS = 64
SIZE = 300 * (1 << 20) + 4099
VICTIMS = 8


def started(house: House) -> list[Puppet]:
    """All clients at once, attached; every second one shared."""
    clients = [house.client(None) for _ in range(CLIENTS)]
    for number, client in enumerate(clients):
        client.begin(f"b = attach(mode={('private', 'shared')[number % 2]!r})")
    for client in clients:
        client.answer(60)
    return clients


def faults(house: House, clients: list[Puppet]) -> dict[int, int]:
    wanted = {client.pid for client in clients}
    return {record["pid"]: record["faults"] for record in house.status()["clients"] if record["pid"] in wanted}


@pytest.mark.slow
def test_64_clients_read_every_byte_while_some_of_the_house_dies(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    pages = -(-SIZE // PAGE)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        clients = started(house)
        doomed, *rest = clients
        victims = rest[:VICTIMS]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 65536, {seed})")
        until(lambda: min(faults(house, [doomed, *victims]).values()) > 5, "all of them fault", 30)
        workers = {record["pid"]: record["worker_pid"] for record in house.status()["clients"]}
        before = faults(house, victims)
        killed = [workers[client.pid] for client in victims]
        for pid in killed:
            end_by_pidfd(pid, signal.SIGKILL, "postcopy-w")
        doomed.kill()
        assert house.block()["received"] < pages, "the kills came in the middle"
        until(lambda: not any(alive(pid) for pid in killed), "the workers are dead")
        after = until(lambda: moved(house, victims, before), "their successors answer faults", 30)
        assert set(after) == {client.pid for client in victims}
        assert doomed.status() == -signal.SIGKILL
        answers = [client.answer(100) for client in rest]
        assert answers == [-1] * (CLIENTS - 1)
        document = house.status()
        assert document["totals"]["restarts"] == VICTIMS
        assert {record["pid"] for record in document["clients"]} == {client.pid for client in rest}
        house.await_received(pages)


def moved(house: House, victims: list[Puppet], before: dict[int, int]) -> dict[int, int]:
    """The victims' faults, when each has more of them than before, or everything has come meanwhile."""
    now = faults(house, victims)
    done = house.block()["complete"]
    return now if done or all(now[pid] > count for pid, count in before.items()) else {}


def test_many_threads_of_one_client(runtime_dir: Path, source_file: SourceFile) -> None:
    """Several threads on one page are several messages; each must run on."""
    path = source_file(2 << 20)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        client = house.client()
        client.do(
            "def populate(): [b.ensure(at, 16384) for at in range(0, b.size, 16384)]\n"
            "threads = [threading.Thread(target=populate) for _ in range(8)]\n"
            "[t.start() for t in threads]; [t.join() for t in threads]",
            60,
        )
        assert client.do(f"check(b, {str(path)!r})") == -1
        house.await_received((2 << 20) // PAGE)


def test_questions_while_all_this_goes_on(runtime_dir: Path, source_file: SourceFile) -> None:
    """Status, with audit, asked by several at once, is answered, and holds nobody up."""
    path = source_file(32 << 20)
    with House(runtime_dir, f"ram0={path}", fault_around="4K") as house:
        clients = [house.client("ram0", mode) for mode in ("private", "shared") * 2]
        for seed, client in enumerate(clients):
            client.begin(f"check(b, {str(path)!r}, 'random', 4096, {seed})")
        answers: list[int] = []
        askers = [
            threading.Thread(target=lambda: answers.append(len([house.status(audit=True) for _ in range(10)])))
            for _ in range(3)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        assert answers == [10, 10, 10]
        assert [client.answer() for client in clients] == [-1] * 4
