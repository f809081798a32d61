"""``bulk``: how fast is memory filled when no client waits, against memcpy?

*memcpy* copies the warm, mapped file into fresh anonymous memory: the bandwidth of the machine for that work, page
faults of the fresh memory included. *COPY alone* is one UFFDIO_COPY after another from a mapping of the file
(copying.py). *Background* is ours from end to end: a local block that the supervisor fills in the background.
"""

from __future__ import annotations

import os
import time

from postcopy.queries import Control

from .bench import Bench, BenchmarkFailed
from .figures import Pair, Row, ratio_row
from .stream import copy_alone

FILLED_WITHIN = 60.0
PIECES = (64 << 10, 256 << 10, 2 << 20)


def run(bench: Bench) -> list[Row]:
    """COPY in several pieces, and the background of a local block, all against memcpy in the same round."""
    length = bench.length_for(0.5, _memcpy_rate(bench), bench.scale.of(512 << 20, 16 << 20))
    file = bench.warm_file("bulk", length)
    copied: dict[int, list[Pair]] = {piece: [] for piece in PIECES}
    filled: list[Pair] = []
    try:
        with bench.client(file=file, length=length) as client:
            for number in range(bench.scale.pairs):
                bench.say(f"bulk: round {number + 1} of {bench.scale.pairs}")
                for piece in PIECES:
                    alone = copy_alone(file, length, piece)
                    copied[piece].append((alone, length / client.ask(do="memcpy")["took"] * 1e3))
                ours = _background(bench, file, length)
                filled.append((ours, length / client.ask(do="memcpy")["took"] * 1e3))
    finally:
        os.unlink(file)
    labels = ("COPY", "memcpy")
    rows = [
        ratio_row(f"COPY alone in pieces of {piece >> 10} KiB, against memcpy", pairs, unit="MB/s", labels=labels)
        for piece, pairs in copied.items()
    ]
    name = f"background of a local block of {length >> 20} MiB, against memcpy"
    return [*rows, ratio_row(name, filled, unit="MB/s", labels=("background", "memcpy"))]


def _memcpy_rate(bench: Bench) -> float:
    """Bytes a second."""
    with bench.client() as client:
        return bench.length / float(client.ask(do="memcpy")["took"]) * 1e9


def _background(bench: Bench, file: str, length: int) -> float:
    """MB a second, from the first look at which something had come to the one at which all had."""
    with (
        bench.supervisor({"ram": file}, background_rate="64G") as supervisor,
        Control(supervisor.runtime_dir) as control,
    ):
        begun, had = time.monotonic(), 0
        limit = begun + FILLED_WITHIN
        while time.monotonic() < limit:
            block = control.status()["blocks"][0]
            now, have = time.monotonic(), block["received"] * block["page_size"]
            if have >= length:
                return (length - had) / max(now - begun, 1e-6) / 1e6
            if not had:
                begun, had = now, have
            time.sleep(0.01)
    raise BenchmarkFailed(f"the block was not filled within {FILLED_WITHIN:.0f} s")
