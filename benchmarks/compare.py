"""``compare DIRECTORY``: one fault of this checkout against one of another checkout, in turns.

Two supervisors run at the same time, one of each checkout, with one client process each. The clients touch slices of
their blocks in turns, so both see the same machine; everything is pinned to one CPU. Client and toucher are the code of
this checkout, on the interpreter (``.venv``) and so with the packages of the other. Each pair has fresh processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .bench import Bench, BenchmarkFailed, ClientProcess
from .figures import Pair, Row, percentile, ratio_row

KINDS = ("local", "remote")
MODES = ("shared", "private")
SLICES = 16
LABELS = ("this", "other")


def python_of(directory: str) -> str:
    """The interpreter of a checkout. Raises BenchmarkFailed when there is none."""
    python = os.path.join(os.path.abspath(directory), ".venv", "bin", "python")
    if not os.access(python, os.X_OK):
        raise BenchmarkFailed(f"{directory} is no installed checkout: {python} is missing (run scripts/install there)")
    return python


def run(bench: Bench, other: str) -> list[Row]:
    """p50 of local and remote faults, shared and private, as a ratio of this checkout to ``other``."""
    pythons = (sys.executable, python_of(other))
    pairs: dict[tuple[str, str], list[Pair]] = {(kind, mode): [] for kind in KINDS for mode in MODES}
    for number in range(bench.scale.pairs):
        for kind, mode in pairs:
            bench.say(f"compare, {kind}, {mode}: pair {number + 1} of {bench.scale.pairs}")
            pairs[kind, mode].append(_pair(bench, pythons, kind, mode, turned=bool(number % 2)))
    return [
        ratio_row(f"{kind} fault p50, {mode}, pinned, against {other}", found, labels=LABELS)
        for (kind, mode), found in pairs.items()
    ]


def _pair(bench: Bench, pythons: tuple[str, str], kind: str, mode: str, *, turned: bool) -> Pair:
    with ExitStack() as stack:
        order = (1, 0) if turned else (0, 1)
        clients = {side: stack.enter_context(_client(bench, pythons[side], LABELS[side], kind, mode)) for side in order}
        took: dict[int, list[float]] = {0: [], 1: []}
        step = bench.pages // SLICES
        for number in range(SLICES):
            for side in order:
                pages = [number * step, (number + 1) * step]
                answer = clients[side].ask(do="touch", seed=number, count=step, pages=pages)
                took[side] += [nanoseconds / 1000 for nanoseconds in answer["ns"]]
    return percentile(took[0], 50), percentile(took[1], 50)


@contextmanager
def _client(bench: Bench, python: str, name: str, kind: str, mode: str) -> Iterator[ClientProcess]:
    """A client process that has started its own supervisor (and attached to it) with the packages of ``python``."""
    with ExitStack() as stack:
        source, options = bench.file, {}
        if kind == "remote":
            served = bench.source(["ram"], pinned=True, python=python, name=name)
            source, options = stack.enter_context(served)["ram"], {"background_rate": 0}
        client = stack.enter_context(bench.client(pinned=True, python=python))
        client.ask(do="serve", source=source, options=options, mode=mode)
        yield client
