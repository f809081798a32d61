"""``limits``: the two honest alternatives. Plain mmap of the file, which is the physical limit of what a touch can
cost, and an eager copy, which is what people do today: read everything first, then begin.

*Plain mmap*: the warm file mapped by the client itself; a touch is a minor fault; no process is asked, no byte copied.
It cannot be beaten where it can be used: one machine, a file, no writes that others must not see. *Eager copy*: from
nothing to a number of random pages read, the copy of the whole file included; ours from nothing too, attaching
included. The fewer of its pages a program needs, and the larger the file, the less an eager copy pays.
"""

from __future__ import annotations

import os

from .bench import PAGE, Bench
from .figures import Pair, Row, percentile, ratio_row

SHARES = (0.01, 0.1, 1.0)


def run(bench: Bench) -> list[Row]:
    """Touches against plain mmap, then beginnings against the eager copy."""
    rows = [_touches(bench, pinned) for pinned in (True, False)]
    length = bench.scale.of(256 << 20, 8 << 20)
    file = bench.warm_file("eager", length)
    try:
        return [*rows, *(_beginning(bench, file, length, share) for share in SHARES)]
    finally:
        os.unlink(file)


def _touches(bench: Bench, pinned: bool) -> Row:
    where = "pinned" if pinned else "unpinned"
    count = bench.scale.of(4000, 200)
    pairs: list[Pair] = []
    for number in range(bench.scale.pairs):
        bench.say(f"limits, {where}: pair {number + 1} of {bench.scale.pairs}")
        with (
            bench.supervisor(["ram"], pinned=pinned) as supervisor,
            bench.product_client(supervisor, "ram", "private", pinned=pinned) as client,
        ):
            orders = {"ours": "touch", "mmap": "touch_file"}
            sides = list(orders)[:: -1 if number % 2 else 1]
            took = {side: client.ask(do=orders[side], seed=number, count=count)["ns"] for side in sides}
        ours, theirs = (percentile(took[side], 50) / 1000 for side in orders)
        pairs.append((ours, theirs))
    name = f"missing page p50, private, against plain mmap of the warm file, {where}"
    return ratio_row(name, pairs, labels=("ours", "mmap"))


def _beginning(bench: Bench, file: str, length: int, share: float) -> Row:
    count = max(1, int(length // PAGE * share))
    pairs: list[Pair] = []
    for number in range(bench.scale.pairs):
        bench.say(f"limits, {share:.0%} of the pages: pair {number + 1} of {bench.scale.pairs}")
        with (
            bench.supervisor({"ram": file}) as supervisor,
            bench.client(runtime_dir=supervisor.runtime_dir, file=file, length=length) as client,
        ):
            orders = {"ours": "begin", "eager": "begin_eagerly"}
            sides = list(orders)[:: -1 if number % 2 else 1]
            took = {side: client.ask(do=orders[side], block="ram", seed=number, count=count)["took"] for side in sides}
        pairs.append((took["ours"] / 1e6, took["eager"] / 1e6))
    name = f"from nothing to {share:.0%} of {length >> 20} MiB read at random, against an eager copy"
    return ratio_row(name, pairs, unit="ms", labels=("ours", "eager"))
