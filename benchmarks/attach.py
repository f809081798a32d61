"""``attach``: how soon is memory usable, what does a client cost, and how many can there be?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import postcopy
from postcopy_kernel.process import memory_figures

from .bench import Bench, BenchmarkFailed, Measure, worker_of
from .figures import Row, percentile, value_row
from .machine import ROOT

MODES = ("private", "shared")
SPARSE_BYTES = 100 << 30
CROWD_WITHIN = 120.0


def run(bench: Bench) -> list[Row]:
    """Attach to first byte, weight of a worker, a crowd of clients, and a block that is far greater than memory."""
    parts: dict[str, Measure] = {
        "first byte": _first_byte,
        "worker's memory": _memory,
        "many clients": _crowds,
        "sparse file": lambda bench: [_sparse(bench)],
    }
    return [row for name, measure in parts.items() for row in bench.part(f"attach: {name}", measure)]


def _first_byte(bench: Bench) -> list[Row]:
    """In a client that has imported what it needs, at a warm supervisor: the block is usable, its first byte read."""
    count = bench.scale.of(20, 3)
    rows = []
    with bench.supervisor(MODES) as supervisor, bench.client(runtime_dir=supervisor.runtime_dir) as client:
        for mode in MODES:
            bench.say(f"attach, {mode}: {count} times")
            # The first pays for imports and is none of the samples.
            answers = [client.ask(do="attach", block=mode, mode=mode, page=page) for page in range(count + 1)][1:]
            samples = [answer["first_byte"] / 1e6 for answer in answers]
            told = f"p99 {percentile(samples, 99):.1f} ms, {count} attaches"
            rows.append(value_row(f"attach to first byte, {mode}, warm", samples, "ms", 20, detail=told))
    return rows


def _memory(bench: Bench) -> list[Row]:
    """Memory that a worker has for itself (anonymous, shmem, page tables), before and after it has served its block."""
    rows = []
    with bench.supervisor(MODES) as supervisor:
        for mode in MODES:
            with bench.product_client(supervisor, mode, mode) as client:
                client.ask(do="touch", seed=0, count=1)
                worker = worker_of(supervisor, client.pid)
                fresh = memory_figures(worker)["private"] / 1e6
                # Not all pages: of a block that is complete the worker ends.
                client.ask(do="touch", seed=1, count=bench.pages * 7 // 8)
                served = memory_figures(worker)["private"] / 1e6
            megabytes = bench.length * 7 / 8 / 1e6
            rows.append(value_row(f"worker's private memory, {mode}, fresh", [fresh], "MB", 3.5))
            told = f"after {megabytes:.0f} MB of random faults"
            rows.append(value_row(f"worker's private memory, {mode}, worked", [served], "MB", 3.5, detail=told))
    return rows


def _crowds(bench: Bench) -> list[Row]:
    sizes = {bench.scale.of(256, 4): 5.0}
    if bench.scale.stretch:
        sizes[bench.scale.of(1000, 8)] = 20.0
    return [_crowd(bench, clients, goal) for clients, goal in sizes.items()]


def _crowd(bench: Bench, clients: int, goal: float) -> Row:
    """Processes that exist already attach all at once: the first begins, the last is attached and reads its bytes."""
    samples, slowest = [], []
    for _ in range(bench.scale.of(3, 1)):
        bench.say(f"attach: {clients} clients")
        with bench.supervisor(["ram"]) as supervisor:
            spec = {
                "parent": os.getpid(),
                "runtime_dir": supervisor.runtime_dir,
                "block": "ram",
                "clients": clients,
                "file": bench.file,
            }
            answer = _crowd_process(spec)
        if answer["failed"] or answer["wrong"]:
            raise BenchmarkFailed(f"{clients} clients: {answer['failed']} failed, {answer['wrong']} read wrong bytes")
        samples.append(answer["seconds"])
        slowest.append(answer["slowest"])
    told = f"slowest single attach {max(slowest):.2f} s; half private, half shared"
    return value_row(f"{clients} clients attached", samples, "s", goal, detail=told)


def _crowd_process(spec: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.crowd", json.dumps(spec)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CROWD_WITHIN)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkFailed(f"{spec['clients']} clients were not attached within {CROWD_WITHIN:.0f} s") from error
    if done.returncode:
        raise BenchmarkFailed(f"the crowd ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def _sparse(bench: Bench) -> Row:
    """From starting the program to READY=1, for a file of 100 GiB of which nothing is stored."""
    path = os.path.join(bench.directory, "sparse")
    with open(path, "wb") as file:
        file.truncate(SPARSE_BYTES)
    samples = []
    for _ in range(bench.scale.of(5, 1)):
        bench.say("attach: serve 100 GiB")
        begun = time.perf_counter()
        with postcopy.Supervisor({"ram": path}):
            samples.append(time.perf_counter() - begun)
    return value_row("serve a sparse file of 100 GiB, to ready", samples, "s", 1.0)
