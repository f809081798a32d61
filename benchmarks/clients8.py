"""``clients8``: 8 clients at once on one block, wall time of them all against 8 C handlers, one for each client.

*Disjoint*: each client touches an eighth of the block, in random order: every touch is a fault and every fault a COPY.
*Random*: each touches pages of the whole block; some have been placed by another's worker in the meantime.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from .bench import Bench, ClientProcess
from .figures import Pair, Row, ratio_row

GOAL = 1.3
PATTERNS = ("disjoint", "random")


def run(bench: Bench) -> list[Row]:
    """Both patterns, shared clients; the goal is for what a user sees, unpinned; pinned shows the work itself."""
    rows = []
    clients = bench.scale.of(8, 2)
    for pinned in (False, True):
        pairs = _pairs(bench, clients, pinned)
        for pattern in PATTERNS:
            name = f"{clients} clients, {pattern}, wall time, {'pinned' if pinned else 'unpinned'}"
            rows.append(ratio_row(name, pairs[pattern], None if pinned else GOAL, unit="ms"))
    return rows


def _pairs(bench: Bench, clients: int, pinned: bool) -> dict[str, list[Pair]]:
    pairs: dict[str, list[Pair]] = {pattern: [] for pattern in PATTERNS}
    for number in range(bench.scale.pairs):
        bench.say(f"clients8, {'pinned' if pinned else 'unpinned'}: pair {number + 1} of {bench.scale.pairs}")
        for pattern in PATTERNS:
            sides = {}
            for side in (ours, theirs) if number % 2 else (theirs, ours):
                sides[side] = side(bench, clients, pattern, pinned)
            pairs[pattern].append((sides[ours], sides[theirs]))
    return pairs


def ours(bench: Bench, clients: int, pattern: str, pinned: bool) -> float:
    with bench.supervisor(["ram"], pinned=pinned) as supervisor:
        return _wall(bench, clients, pattern, lambda: bench.product_client(supervisor, "ram", "shared", pinned=pinned))


def theirs(bench: Bench, clients: int, pattern: str, pinned: bool) -> float:
    memory = os.memfd_create("floor")
    try:
        os.truncate(memory, bench.length)
        return _wall(bench, clients, pattern, lambda: bench.floor_client(pinned=pinned, memory=memory))
    finally:
        os.close(memory)


def _wall(bench: Bench, clients: int, pattern: str, start: Callable[[], ClientProcess]) -> float:
    """Milliseconds from the first touch of the first to the last touch of the last."""
    with ExitStack() as stack:
        crowd = [stack.enter_context(start()) for _ in range(clients)]
        begin = bench.start_time()
        for index, client in enumerate(crowd):
            client.tell(do="touch", seed=index, start=begin, **share(bench.pages, clients, index, pattern))
        spans: list[list[int]] = [client.hear()["span"] for client in crowd]
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6


def share(pages: int, clients: int, index: int, pattern: str) -> dict[str, Any]:
    each = pages // clients
    if pattern == "disjoint":
        return {"pages": [index * each, (index + 1) * each], "count": each}
    return {"pages": [0, pages], "count": each * 2}
