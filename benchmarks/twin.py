"""``twin``: one local fault answered by the Python source, by its compiled twin, and by C, in turns.

All three serve at the same time, each its own client, pinned to one CPU. The clients touch slices of their blocks in
turns, so all see the same machine. Beside the latency stands the processor time of the handler for each fault (of a
worker: its main thread): on a busy machine it says more.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from postcopy.queries import Control

from .bench import Bench, BenchmarkFailed, ClientProcess, worker_of
from .compare import environment
from .figures import Pair, Row, percentile, ratio_row
from .growth import MODES

SLICES = 16
SIDES = {"compiled": {"POSTCOPY_PURE": "0"}, "Python": {"POSTCOPY_PURE": "1"}}
"""Each of our sides, and what chooses it."""
GOALS = {
    "compiled": {"shared": (1.05, 1.02), "private": (1.05, 1.02)},
    "Python": {"shared": (1.12, 1.10), "private": (1.15, 1.10)},
}


@dataclass
class Runner:
    """A client and its handler, and what both took."""

    client: ClientProcess
    handler: int
    took: list[float] = field(default_factory=list)
    spent: int = 0


def run(bench: Bench) -> list[Row]:
    """p50 and processor time of a fault, of each side against C."""
    times: dict[tuple[str, str], list[Pair]] = {}
    spent: dict[tuple[str, str], list[Pair]] = {}
    for number in range(bench.scale.pairs):
        for mode in MODES:
            bench.say(f"twin, {mode}: pair {number + 1} of {bench.scale.pairs}")
            found = _in_turns(bench, mode, number)
            floor = found.pop("C")
            for side, (p50, cpu) in found.items():
                times.setdefault((side, mode), []).append((p50, floor[0]))
                spent.setdefault((side, mode), []).append((cpu, floor[1]))
    rows = [
        ratio_row(f"local fault p50, {mode}, {side}", pairs, *GOALS[side][mode])
        for (side, mode), pairs in times.items()
    ]
    return rows + [
        ratio_row(f"handler's processor time for a fault, {mode}, {side}", pairs)
        for (side, mode), pairs in spent.items()
    ]


def _in_turns(bench: Bench, mode: str, number: int) -> dict[str, Pair]:
    """For each side the p50 of its touches and the processor time of its handler for each of them, in us."""
    with ExitStack() as stack:
        runners = {}
        for side in SIDES:
            with environment(SIDES[side]):
                supervisor = stack.enter_context(bench.supervisor(["ram"], pinned=True))
            client = stack.enter_context(bench.product_client(supervisor, "ram", mode, pinned=True))
            runners[side] = Runner(client, worker_of(supervisor, client.pid))
            with Control(supervisor.runtime_dir) as control:
                loop = control.status()["clients"][0]["fault_loop"]
            if loop != side.lower():
                raise BenchmarkFailed(f"the worker runs the fault loop {loop!r}, not {side!r}: run scripts/install")
        client = stack.enter_context(bench.client(pinned=True, handler=[*bench.floor, *MODES[mode]], mode=mode))
        runners["C"] = Runner(client, _child_of(client.pid))
        step = bench.pages // SLICES
        order = list(runners.values())
        for at in range(SLICES):
            for runner in order[number % 3 :] + order[: number % 3]:
                before = _spent(runner.handler)
                answer = runner.client.ask(do="touch", seed=at, count=step, pages=[at * step, (at + 1) * step])
                runner.spent += _spent(runner.handler) - before
                runner.took += [nanoseconds / 1000 for nanoseconds in answer["ns"]]
        return {
            side: (percentile(runner.took, 50), runner.spent / len(runner.took) / 1000)
            for side, runner in runners.items()
        }


def _child_of(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
        return int(children.read().split()[0])


def _spent(pid: int) -> int:
    """Nanoseconds that the main thread of a process has run."""
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as figures:
        return int(figures.read().split()[0])
