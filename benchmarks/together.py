"""``together``: clients that read one block in order from its first page, all at once, as the ranks of one model do.

Beside it the same clients, each from a start of its own, so far apart that each brings its share of the pages. Both in
turns; the ratios are the time until the last client is done, and the faults of all of them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from postcopy.queries import Control

from .bench import PAGE, Bench
from .figures import Pair, Row, ratio_row

KINDS = ("local", "remote")
MODES = ("private", "shared")
LENGTH = 256 << 20
CLIENTS = 8
TIME_GOAL, FAULTS_GOAL = 1.5, 4.0


def run(bench: Bench) -> list[Row]:
    """Time and faults for local and remote blocks, private and shared clients."""
    length, clients = bench.scale.of(LENGTH, 16 << 20), bench.scale.of(CLIENTS, 2)
    file = bench.warm_file("together", length)
    cases = [(kind, mode) for kind in KINDS for mode in MODES]
    took: dict[tuple[str, str], list[Pair]] = {case: [] for case in cases}
    faults: dict[tuple[str, str], list[Pair]] = {case: [] for case in cases}
    for number in range(bench.scale.pairs):
        bench.say(f"together: pair {number + 1} of {bench.scale.pairs}")
        for case in cases:
            sides = {
                apart: _read(bench, file, length, clients, *case, apart) for apart in (bool(number % 2), not number % 2)
            }
            took[case].append((sides[False][0], sides[True][0]))
            faults[case].append((sides[False][1], sides[True][1]))
    os.unlink(file)
    labels, rows = ("together", "apart"), []
    for kind, mode in cases:
        name, case = f"{clients} clients, {length >> 20} MiB {kind}, {mode}", (kind, mode)
        rows.append(ratio_row(f"{name}, time", took[case], TIME_GOAL, unit="ms", labels=labels))
        rows.append(ratio_row(f"{name}, faults", faults[case], FAULTS_GOAL, unit="faults", labels=labels))
    return rows


def _read(bench: Bench, file: str, length: int, clients: int, kind: str, mode: str, apart: bool) -> tuple[float, float]:
    """Milliseconds from the first access of the first client to the last of the last one, and the faults of all."""
    with ExitStack() as stack:
        source = stack.enter_context(bench.source(["ram"], file=file))["ram"] if kind == "remote" else file
        supervisor = stack.enter_context(bench.supervisor({"ram": source}, background_rate=0))
        runtime_dir = supervisor.runtime_dir
        crowd = [
            stack.enter_context(bench.client(runtime_dir=runtime_dir, block="ram", mode=mode, file=file, length=length))
            for _ in range(clients)
        ]
        for client in crowd:
            client.ask(do="sum_up")
        begin = bench.start_time()
        for index, client in enumerate(crowd):
            client.tell(do="read", start=begin, first=length // PAGE * index // clients if apart else 0)
        spans: list[list[int]] = [client.hear()["span"] for client in crowd]
        with Control(runtime_dir) as control:
            faults = float(control.status()["totals"]["faults"])
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6, faults
