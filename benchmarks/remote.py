"""``remote``: pages that come over a return path, from a page source program at the other end of an ipc socket.

One fault is compared with a C chain of the same four processes on raw sockets (chain.c): client, worker, supervisor,
source, and with QEMU's own post-copy (qemu.py). The stream of a whole block, and urgent faults while it streams, are in
stream.py; then many clients at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from postcopy.queries import Control

from . import qemu, stream
from .bench import Bench, BenchmarkFailed, ClientProcess, Measure
from .clients8 import theirs
from .figures import Pair, Row, percentile, ratio_row, value_row
from .machine import ROOT

MODES = ("shared", "private")
GOAL, STRETCH = 5.0, 4.0
LOAD_WITHIN = 120.0


def run(bench: Bench) -> list[Row]:
    """One fault, the stream, many clients."""
    parts: dict[str, Measure] = {
        "remote fault, pinned": lambda bench: _faults(bench, True),
        "remote fault, unpinned": lambda bench: _faults(bench, False),
        "QEMU's own post-copy": lambda bench: qemu.compare(bench, lambda number: _ours(bench, "shared", False, number)),
        "stream": stream.run,
        "clients in lockstep": lambda bench: [_lockstep(bench)],
        "clients at random": lambda bench: [_random(bench)],
        "clients of C handlers": lambda bench: [_random_in_c(bench)],
    }
    return [row for name, measure in parts.items() for row in bench.part(f"remote: {name}", measure)]


# --- one fault --------------------------------------------------------------------------------------------------------


def _faults(bench: Bench, pinned: bool) -> list[Row]:
    medians: dict[str, list[Pair]] = {mode: [] for mode in MODES}
    tails: dict[str, list[Pair]] = {mode: [] for mode in MODES}
    where = "pinned" if pinned else "unpinned"
    for number in range(bench.scale.pairs):
        bench.say(f"remote, {where}: pair {number + 1} of {bench.scale.pairs}")
        for mode in MODES:
            sides: dict[str, list[float]] = {}
            for side in ("ours", "chain") if number % 2 else ("chain", "ours"):
                sides[side] = (_ours if side == "ours" else _chain)(bench, mode, pinned, number)
            for kept, percent in ((medians, 50), (tails, 99)):
                kept[mode].append((percentile(sides["ours"], percent), percentile(sides["chain"], percent)))
    rows = []
    for mode in MODES:
        goals = (GOAL, STRETCH) if pinned else (None, None)
        rows.append(ratio_row(f"remote fault p50, {mode}, {where}", medians[mode], *goals))
        rows.append(ratio_row(f"remote fault p99, {mode}, {where}", tails[mode]))
    return rows


def _ours(bench: Bench, mode: str, pinned: bool, seed: int) -> list[float]:
    with (
        bench.source(["ram"], pinned=pinned) as blocks,
        bench.supervisor(blocks, pinned=pinned, background_rate=0) as supervisor,
        bench.product_client(supervisor, "ram", mode, pinned=pinned) as client,
    ):
        return _touches(bench, client, seed)


def _chain(bench: Bench, mode: str, pinned: bool, seed: int) -> list[float]:
    with bench.chain_client(mode, pinned=pinned) as client:
        return _touches(bench, client, seed)


def _touches(bench: Bench, client: ClientProcess, seed: int) -> list[float]:
    """Microseconds of each touch, at random, of missing pages."""
    answer = client.ask(do="touch", seed=seed, count=bench.touches)
    return [nanoseconds / 1000 for nanoseconds in answer["ns"]]


# --- many clients -----------------------------------------------------------------------------------------------------


def _lockstep(bench: Bench) -> Row:
    """All clients touch the same page at the same time, page after page."""
    clients, touches = bench.scale.of(64, 4), bench.scale.of(400, 50)
    bench.say(f"remote: {clients} clients in lockstep")
    status = _load(bench, clients, touches, "lockstep")[1]
    requests, received = status["sources"][0]["requests"], status["blocks"][0]["received"]
    told = (
        f"{received} pages, {requests} requests, deduplicated {status['totals']['deduplicated']}, "
        f"faults {status['totals']['faults']}, {clients} clients"
    )
    return value_row(
        f"source requests a page, {clients} clients in lockstep", [requests / received], "", 1, detail=told
    )


def _random(bench: Bench) -> Row:
    """Pages a second that clients touch for the first time, against the best of fewer clients, in turns."""

    def touched(clients: int) -> float:
        report, _ = _load(bench, clients, bench.pages // clients, "random")
        return float(report["first_touches"] / report["seconds"])

    return _many(bench, "at random", touched, 0.9)


def _random_in_c(bench: Bench) -> Row:
    """The same of C handlers, one a client, which have their pages in a file of this machine: what so many processes on
    these processors cost any service."""
    return _many(
        bench,
        "of C handlers, local",
        lambda clients: bench.pages // clients * clients / theirs(bench, clients, "disjoint", False) * 1000,
    )


def _many(bench: Bench, what: str, touched: Callable[[int], float], goal: float | None = None) -> Row:
    crowds = bench.scale.of(64, 4), bench.scale.of(16, 2), bench.scale.of(4, 1), 1
    found: dict[int, list[float]] = {clients: [] for clients in crowds}
    for number in range(bench.scale.of(3, 1)):
        for clients in found if number % 2 else reversed(found):
            bench.say(f"remote: {clients} clients {what}, round {number + 1}")
            found[clients].append(touched(clients))
    many, *fewer = found
    pairs = [(found[many][at], max(found[clients][at] for clients in fewer)) for at in range(len(found[many]))]
    labels = (f"{many} clients", "best of " + ", ".join(map(str, fewer)))
    name = f"first touches a second, {many} clients {what}"
    return ratio_row(name, pairs, goal, unit="/s", labels=labels, least=True)


def _load(bench: Bench, clients: int, touches: int, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reports of ``postcopy load`` (which compares every page with the file) and of the supervisor, page by page."""
    with (
        bench.source(["ram"]) as blocks,
        bench.supervisor(blocks, fault_around="4K", background_rate=0) as supervisor,
    ):
        command = [sys.executable, "-m", "postcopy", "load", "--runtime-dir", supervisor.runtime_dir, "--json"]
        command += ["--clients", str(clients), "--touches", str(touches), "--pattern", pattern, "--mode", "mixed"]
        command += ["--verify", bench.file]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LOAD_WITHIN)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkFailed(f"{clients} clients were not done within {LOAD_WITHIN:.0f} s") from error
        if done.returncode:
            raise BenchmarkFailed(f"postcopy load ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
        report: dict[str, Any] = json.loads(done.stdout)
        with Control(supervisor.runtime_dir) as control:
            return report, control.status()
