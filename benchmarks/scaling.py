"""``scaling``: from one client to 256, on one block, against as many C handlers in the same run.

Each client touches its own share of the block, in random order: every touch is a fault, every fault a COPY, and the
work is the same however many share it. Wall time, unpinned, from the first touch of all to the last. More clients than
CPUs can only stand in each other's way; the question is whether ours do so more than handlers in C.
"""

from __future__ import annotations

from .bench import Bench
from .clients8 import ours, theirs
from .figures import Pair, Row, ratio_row

CLIENTS = (1, 4, 16, 64, 256)
FEW_PAIRS = 3
"""Of 64 clients and more: starting so many processes takes far longer than what is measured."""


def run(bench: Bench) -> list[Row]:
    """One row for each number of clients."""
    rows = []
    for clients in CLIENTS if not bench.scale.quick else (1, 3):
        count = bench.scale.pairs if clients < 64 else min(FEW_PAIRS, bench.scale.pairs)
        pairs: list[Pair] = []
        for number in range(count):
            bench.say(f"scaling, {clients} clients: pair {number + 1} of {count}")
            sides = {}
            for side in (ours, theirs) if number % 2 else (theirs, ours):
                sides[side] = side(bench, clients, "disjoint", False)
            pairs.append((sides[ours], sides[theirs]))
        rows.append(_row(bench, clients, pairs))
    return rows


def _row(bench: Bench, clients: int, pairs: list[Pair]) -> Row:
    touches = bench.pages // clients * clients
    row = ratio_row(f"{clients} client{'s' * (clients > 1)}, wall time", pairs, unit="ms")
    fastest = touches / (min(wall for wall, _ in pairs) / 1000)
    told = f"{row.detail}; {touches} faults, at best {fastest:,.0f} a second"
    return Row(row.name, row.value, row.low, row.high, row.unit, detail=told, samples=row.samples)
