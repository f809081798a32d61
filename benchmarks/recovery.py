"""``recovery``: a worker is killed with SIGKILL and its client touches a missing page at once. How long does it wait?

Every sample of a client alone is a client of its own, because the second crash of one worker is answered later, on
purpose. With a crowd attached, each client's worker is killed once alone, then once more all together.

Then the supervisor is killed, and started again at once with ``--recover``, as a service manager would; every client
touches a missing page of a remote block, which only a supervisor can bring.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import postcopy
from postcopy.queries import Control

from .bench import WORKER_WITHIN, Bench, BenchmarkFailed, ClientProcess, worker_of
from .figures import Row, percentile, value_row

GOAL = 20.0
SUPERVISOR_GOAL = 600.0
BEFORE = 0.002
"""Seconds between the supervisor's end and the touches: no client is answered before it."""


def run(bench: Bench) -> list[Row]:
    """Milliseconds from the signal to the byte."""
    return [*_alone(bench), *_crowd(bench), *_supervisor(bench, 1), *_supervisor(bench, bench.scale.of(64, 2))]


def _alone(bench: Bench) -> list[Row]:
    samples = []
    count = bench.scale.of(100, 3)
    with bench.supervisor(["ram"]) as supervisor, bench.product_client(supervisor, "ram", "shared") as client:
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
            clients.append(stack.enter_context(bench.product_client(supervisor, "ram", mode)))
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


def _supervisor(bench: Bench, count: int) -> list[Row]:
    kills = bench.scale.of(20 if count == 1 else 5, 1)
    options: dict[str, Any] = {"background_rate": 0, "fault_around": "4K"}
    samples: list[float] = []
    with (
        bench.source(["ram"]) as blocks,
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="pcb-", dir="/tmp") as directory,
        ExitStack() as clients_end,
    ):
        current = stack.enter_context(postcopy.Supervisor(blocks, directory, **options))
        modes = [("shared", "private")[number % 2] for number in range(count)]
        clients = [clients_end.enter_context(bench.product_client(current, "ram", mode)) for mode in modes]
        for kill in range(kills):
            bench.say(f"recovery: supervisor {kill + 1} of {kills}, {count} clients")
            start = bench.start_time()
            for number, client in enumerate(clients):
                page = kill * count + number
                client.tell(do="touch", seed=0, count=1, pages=[page, page + 1], start=start)
            time.sleep(max(0.0, start / 1e9 - time.monotonic() - BEFORE))
            os.kill(current.pid, signal.SIGKILL)
            current.close()
            current = stack.enter_context(postcopy.Supervisor(blocks, directory, recover=True, **options))
            samples += [client.hear()["ns"][0] / 1e6 for client in clients]
    many = f"{count} clients" if count > 1 else "one client"
    detail = f"{kills} kills, started again at once; from the touch, {BEFORE * 1000:g} ms after the signal"
    return _rows(f"supervisor killed to next remote fault resolved, {many}", samples, detail, SUPERVISOR_GOAL)
