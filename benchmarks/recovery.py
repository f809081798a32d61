"""``recovery``: a worker is killed with SIGKILL and its client touches a missing page at once. How long does it wait?

Every sample of a client alone is a client of its own, because the second crash of one worker is answered later, on
purpose. With a crowd attached, each client's worker is killed once alone, then once more all together.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from postcopy.control import Control

from .bench import WORKER_WITHIN, Bench, BenchmarkFailed, ClientProcess, worker_of
from .figures import Row, percentile, value_row

GOAL = 20.0


def run(bench: Bench) -> list[Row]:
    """Milliseconds from the signal to the byte."""
    return [*_alone(bench), *_crowd(bench)]


def _alone(bench: Bench) -> list[Row]:
    samples = []
    count = bench.scale.of(100, 3)
    with bench.supervisor(["ram"]) as supervisor, bench.house_client(supervisor, "ram", "shared") as client:
        for number in range(count):
            if number % 25 == 0:
                bench.say(f"recovery: kill {number + 1} of {count}")
            # Pages from the end: the ones before must have been resolved by the worker that is to be killed.
            client.ask(do="touch", seed=number, count=1, pages=[number, number + 1])
            answer = client.ask(do="kill", pid=worker_of(supervisor, client.pid), page=bench.pages - 1 - number)
            samples.append(answer["ns"] / 1e6)
            client.ask(do="rejoin")
    return _rows("worker killed to next fault resolved", samples, f"{count} kills", GOAL)


def _crowd(bench: Bench) -> list[Row]:
    count = bench.scale.of(64, 3)
    with bench.supervisor(["ram"]) as supervisor, ExitStack() as stack:
        clients = []
        for number in range(count):
            if number % 16 == 0:
                bench.say(f"recovery: client {number + 1} of {count}")
            mode = ("shared", "private")[number % 2]
            clients.append(stack.enter_context(bench.house_client(supervisor, "ram", mode)))
        one_by_one = []
        for number, client in enumerate(clients):
            worker = worker_of(supervisor, client.pid)
            one_by_one.append(client.ask(do="kill", pid=worker, page=bench.pages - 1 - number)["ns"] / 1e6)
        together = _together(bench, clients, _workers(supervisor.runtime_dir, clients))
    return [
        *_rows(f"one of {count} workers killed", one_by_one, f"{count} kills, one client after the other", GOAL),
        *_rows(f"{count} workers killed at once", together, f"each of {count} clients waits for a page of its own"),
    ]


def _together(bench: Bench, clients: list[ClientProcess], workers: dict[int, int]) -> list[float]:
    for number, client in enumerate(clients):
        client.tell(do="kill", pid=workers[client.pid], page=number)
    return [client.hear()["ns"] / 1e6 for client in clients]


def _workers(directory: str, clients: list[ClientProcess]) -> dict[int, int]:
    """The pid of each client's worker, by that of the client. Raises BenchmarkFailed when one does not run."""
    deadline = time.monotonic() + WORKER_WITHIN
    with Control(directory) as control:
        while time.monotonic() < deadline:
            records = [client for client in control.status()["clients"] if client["state"] == "running"]
            found = {client["pid"]: client["worker_pid"] for client in records}
            if all(found.get(client.pid) for client in clients):
                return found
            time.sleep(0.01)
    raise BenchmarkFailed("not every client has a running worker")


def _rows(name: str, samples: list[float], detail: str, goal: float | None = None) -> list[Row]:
    return [
        value_row(f"{name}, p50", samples, "ms", goal, detail=detail),
        value_row(f"{name}, p99", samples, "ms", value=percentile(samples, 99)),
    ]
