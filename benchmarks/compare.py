"""``compare DIRECTORY``: one fault of this checkout against one of another checkout, in turns.

Two supervisors run at the same time, one of each checkout, with one client process each. The clients touch slices of
their blocks in turns, so both see the same machine; everything is pinned to one CPU. Client and toucher are the code of
this checkout, on the interpreter (``.venv``) and so with the packages of the other. Each pair has fresh processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from .bench import Bench, BenchmarkFailed, ClientProcess
from .figures import Pair, Row, percentile, ratio_row

KINDS = ("local", "remote")
MODES = ("shared", "private")
SLICES = 16


def python_of(directory: str) -> str:
    """The interpreter of a checkout. Raises BenchmarkFailed when there is none."""
    python = os.path.join(os.path.abspath(directory), ".venv", "bin", "python")
    if not os.access(python, os.X_OK):
        raise BenchmarkFailed(f"{directory} is no installed checkout: {python} is missing (run scripts/install there)")
    return python


@dataclass(frozen=True, slots=True)
class Side:
    """One of two that are compared: the interpreter, with its packages, and settings in the environment."""

    name: str
    python: str
    environment: Mapping[str, str] = field(default_factory=dict)


def run(bench: Bench, other: str) -> list[Row]:
    """p50 of local and remote faults, shared and private, as a ratio of this checkout to ``other``."""
    sides = Side("this", sys.executable), Side("other", python_of(other))
    pairs: dict[tuple[str, str], list[Pair]] = {(kind, mode): [] for kind in KINDS for mode in MODES}
    for number in range(bench.scale.pairs):
        for kind, mode in pairs:
            bench.say(f"compare, {kind}, {mode}: pair {number + 1} of {bench.scale.pairs}")
            pairs[kind, mode].append(in_turns(bench, sides, kind, mode, turned=bool(number % 2)))
    return [
        ratio_row(f"{kind} fault p50, {mode}, pinned, against {other}", found, labels=("this", "other"))
        for (kind, mode), found in pairs.items()
    ]


def in_turns(bench: Bench, sides: tuple[Side, Side], kind: str, mode: str, *, turned: bool) -> Pair:
    """p50 of the touches of both sides in us; ``turned``: the second side begins."""
    with ExitStack() as stack:
        order = sides[::-1] if turned else sides
        clients = {side.name: stack.enter_context(_client(bench, side, kind, mode)) for side in order}
        took: dict[str, list[float]] = {side.name: [] for side in sides}
        step = bench.pages // SLICES
        for number in range(SLICES):
            for name, client in clients.items():
                answer = client.ask(do="touch", seed=number, count=step, pages=[number * step, (number + 1) * step])
                took[name] += [nanoseconds / 1000 for nanoseconds in answer["ns"]]
    return percentile(took[sides[0].name], 50), percentile(took[sides[1].name], 50)


@contextmanager
def _client(bench: Bench, side: Side, kind: str, mode: str) -> Iterator[ClientProcess]:
    """A client process that has started its own supervisor, and attached to it, on one side."""
    with ExitStack() as stack:
        with environment(side.environment):
            source, options = bench.file, {}
            if kind == "remote":
                served = bench.source(["ram"], pinned=True, python=side.python, name=side.name)
                source, options = stack.enter_context(served)["ram"], {"background_rate": 0}
            client = stack.enter_context(bench.client(pinned=True, python=side.python))
        client.ask(do="serve", source=source, options=options, mode=mode)
        yield client


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Programs that are started inside find these variables in their environment."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
