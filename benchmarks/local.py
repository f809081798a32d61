"""``local``: how long does a client wait for a page that lies in a file, against the least that C needs for it?

p50 of touch to resume, one client, random missing pages. Both sides are touched by the same C code in the same kind of
process; each run has a fresh block, a fresh client and a fresh handler; floor and service alternate.
"""

from __future__ import annotations

from .bench import Bench, ClientProcess
from .figures import Pair, Row, percentile, ratio_row

GOALS = {"shared": (1.25, 1.15), "private": (1.6, 1.35)}


def run(bench: Bench) -> list[Row]:
    """Shared and private clients, pinned and not. Only the pinned figures have goals."""
    rows = []
    for pinned in (True, False):
        medians, tails = _pairs(bench, pinned)
        for mode, (goal, stretch) in GOALS.items():
            name = f"local fault p50, {mode}, {'pinned' if pinned else 'unpinned'}"
            asked = (goal, stretch) if pinned else (None, None)
            rows.append(ratio_row(name, medians[mode], *asked))
            rows.append(ratio_row(name.replace("p50", "p99"), tails[mode]))
    return rows


def _pairs(bench: Bench, pinned: bool) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    medians: dict[str, list[Pair]] = {mode: [] for mode in GOALS}
    tails: dict[str, list[Pair]] = {mode: [] for mode in GOALS}
    for number in range(bench.scale.pairs):
        bench.say(f"local, {'pinned' if pinned else 'unpinned'}: pair {number + 1} of {bench.scale.pairs}")
        with bench.supervisor(list(GOALS), pinned=pinned) as supervisor:
            for mode in GOALS:
                # The second may find the machine in another state than the first did: take turns.
                sides = {}
                for side in ("ours", "floor") if number % 2 else ("floor", "ours"):
                    if side == "ours":
                        client = bench.product_client(supervisor, mode, mode, pinned=pinned)
                    else:
                        client = bench.floor_client(pinned=pinned)
                    sides[side] = _touches(bench, client, number)
                for kept, percent in ((medians, 50), (tails, 99)):
                    kept[mode].append((percentile(sides["ours"], percent), percentile(sides["floor"], percent)))
    return medians, tails


def _touches(bench: Bench, client: ClientProcess, seed: int) -> list[float]:
    """Microseconds of each touch."""
    with client:
        answer = client.ask(do="touch", seed=seed, count=bench.touches)
    return [nanoseconds / 1000 for nanoseconds in answer["ns"]]
