"""``cpu``: processor time of each process for one fault, at 1, 8, 64 and 256 clients, local and remote.

Each client touches its own share of one block in random order, so every touch is a fault. Latency hides work: a worker
that is done sooner may still have kept a processor busy. Against C: a handler for each client, or for remote pages a
chain of three processes for each. All threads of a process count, and what the kernel does for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from postcopy.queries import Control

from .bench import Bench, BenchmarkFailed, ClientProcess
from .clients8 import share
from .figures import Pair, Row, ratio_row

CLIENTS = (1, 8, 64, 256)
PAIRS, FEW_PAIRS = 3, 1
"""At most, of fewer than 64 clients and of more: to start processes takes far longer than what is measured."""
MODE = "private"
KINDS = ("local", "remote")
CPUCLOCK_SCHED = 2
"""Of a kernel clock id: the scheduler's time of a whole process (linux/posix-timers.h)."""

Spent = dict[str, float]
"""Microseconds of processor time for one fault, by what runs."""
Processes = Mapping[str, Iterable[int]]
"""The pids of everything that takes part, by what it is."""


def run(bench: Bench) -> list[Row]:
    """A row for each kind of block and each number of clients."""
    rows = []
    for kind in KINDS:
        for clients in CLIENTS if not bench.scale.quick else (1, 3):
            count = min(PAIRS if clients < 64 else FEW_PAIRS, bench.scale.pairs)
            found: dict[str, list[Spent]] = {"ours": [], "C": []}
            for number in range(count):
                bench.say(f"cpu, {kind}, {clients} clients: pair {number + 1} of {count}")
                for side in ("ours", "C") if number % 2 else ("C", "ours"):
                    found[side].append(_spent(bench, kind, side, clients))
            rows.append(_row(kind, clients, found))
    return rows


def _row(kind: str, clients: int, found: Mapping[str, list[Spent]]) -> Row:
    pairs: list[Pair] = [
        (sum(ours.values()), sum(theirs.values())) for ours, theirs in zip(found["ours"], found["C"], strict=True)
    ]
    parts = [f"{name} {sorted(one[name] for one in found['ours'])[len(pairs) // 2]:.1f}" for name in found["ours"][0]]
    name = f"processor time of a {kind} fault, {clients} client{'s' * (clients > 1)}"
    row = ratio_row(name, pairs)
    detail = f"{row.detail}; {', '.join(parts)} us"
    return Row(row.name, row.value, row.low, row.high, row.unit, detail=detail, samples=row.samples)


def _spent(bench: Bench, kind: str, side: str, clients: int) -> Spent:
    with (_ours if side == "ours" else _theirs)(bench, kind, clients) as (crowd, processes):
        names = {name: list(pids) for name, pids in processes.items()}
        before = {name: sum(map(_ran, pids)) for name, pids in names.items()}
        begin = bench.start_time()
        pages = bench.pages - clients  # some stay missing: of a block that is complete the workers end
        for index, client in enumerate(crowd):
            client.tell(do="touch", seed=index, start=begin, **share(pages, clients, index, "disjoint"))
        for client in crowd:
            client.hear()
        faults = pages // clients * clients
        return {name: (sum(map(_ran, pids)) - before[name]) / faults / 1000 for name, pids in names.items()}


Crowd = tuple[list[ClientProcess], Processes]


@contextmanager
def _ours(bench: Bench, kind: str, clients: int) -> Iterator[Crowd]:
    with ExitStack() as stack:
        processes: dict[str, Iterable[int]] = {}
        options: dict[str, Any] = {}
        blocks: Mapping[str, str] | list[str] = ["ram"]
        if kind == "remote":
            blocks = served = stack.enter_context(bench.source(["ram"]))
            processes["source"] = [served.pid]
            options["background_rate"] = 0
        supervisor = stack.enter_context(bench.supervisor(blocks, fault_around="4K", **options))
        crowd = bench.crowd(stack, clients, runtime_dir=supervisor.runtime_dir, block="ram", mode=MODE)
        with Control(supervisor.runtime_dir) as control:
            status = control.status()
        processes["client"] = [client.pid for client in crowd]
        processes["worker"] = [client["worker_pid"] for client in status["clients"]]
        processes["supervisor"] = [status["pid"]]
        yield crowd, processes


@contextmanager
def _theirs(bench: Bench, kind: str, clients: int) -> Iterator[Crowd]:
    command = bench.chain if kind == "remote" else [*bench.floor, "two-calls"]
    with ExitStack() as stack:
        crowd = bench.crowd(stack, clients, handler=command, mode=MODE)
        pids = [client.pid for client in crowd]
        yield crowd, {"client": pids, "handler": [child for pid in pids for child in _descendants(pid)]}


def _descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for threads in Path(f"/proc/{pid}/task").iterdir()
        for child in (threads / "children").read_text().split()
    ]
    return children + [one for child in children for one in _descendants(child)]


def _ran(pid: int) -> int:
    """Nanoseconds that a process has run, with threads that have ended: what clock_getcpuclockid(3) gives."""
    try:
        return time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED)
    except OSError as error:
        raise BenchmarkFailed(f"process {pid} has ended while it was measured") from error
