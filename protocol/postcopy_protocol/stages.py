"""Stages of a fault, as histograms by client and block: where the time went.

    asked     from reading the fault to having sent the request for its page (remote blocks)
    arrived   from the request to the source to the arrival of the page (remote blocks)
    placed    from reading the fault (local blocks), or the arrival (remote blocks), to the page's being in the block
    woken     from reading the fault to the wake of the client: all of it

They begin when the fault is *read*: the kernel does not tell when the client stopped. The client's worker writes
``asked``, ``placed`` of local blocks and ``woken`` into its file, behind the statistics page: two pages of u64 for each
block. The supervisor writes ``arrived``, and ``placed`` of remote blocks, by block only, because a page arrives once
for all its waiters. Buckets are those of ``counters``.

Not every fault is timed. Of a client's common local faults the first is, then one in seventeen, which counts for
seventeen. Of remote pages that are handled one at a time, one in four is timed and counts for four.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import counters
from .counters import BUCKETS, HISTOGRAM, PAGE_BYTES

NAMES = ("asked", "arrived", "placed", "woken")
STARTS = [stage * BUCKETS for stage in range(len(NAMES))]
ASKED, ARRIVED, PLACED, WOKEN = (start - HISTOGRAM for start in STARTS)
"""Add it to ``bucket(ns)`` for the index of the counter."""

BYTES = 2 * PAGE_BYTES
WORDS = BYTES // 8
assert len(NAMES) * BUCKETS <= WORDS
MOST_BLOCKS = 64
"""Stages are kept for blocks with numbers from 1 to this one. Space that is not used is a hole in the file."""
END = PAGE_BYTES + MOST_BLOCKS * BYTES
"""Size of a client's file: the statistics page, then the stages."""


def position(block: int) -> int | None:
    """Where the stages of a block begin in a client's file; None: they are not kept."""
    return PAGE_BYTES + (block - 1) * BYTES if 1 <= block <= MOST_BLOCKS else None


def scratch() -> memoryview:
    """New counters in memory, for a block whose stages are not kept or for a program without a client's file."""
    return memoryview(bytearray(BYTES)).cast("Q")


def merged(stages: Iterable[memoryview]) -> memoryview:
    """The sum of the stages of many clients."""
    # Added as the digits of one large number: a status adds hundreds, and no counter comes near to a carry.
    total = sum(int.from_bytes(values, "little") for values in stages)
    return memoryview(total.to_bytes(BYTES + 8, "little")[:BYTES]).cast("Q")


def snapshot(stages: Sequence[int] | None) -> list[counters.BucketRun]:
    """The buckets in use of each stage now; []: they are not kept."""
    return [] if stages is None else [counters.in_use(stages[at : at + BUCKETS]) for at in STARTS]


def join(total: list[int], found: Sequence[counters.BucketRun]) -> None:
    """Add a ``snapshot`` to ``total``, which begins as WORDS zeros."""
    for at, stretch in zip(STARTS, found, strict=False):
        counters.add_up(total, at, stretch)


def histogram(stages: memoryview, name: str) -> list[int]:
    """One stage, as a page that the functions of ``counters`` accept."""
    first = NAMES.index(name) * BUCKETS
    return [0] * HISTOGRAM + stages[first : first + BUCKETS].tolist()


def summaries(found: Sequence[counters.BucketRun]) -> dict[str, dict[str, float]]:
    """``p50``, ``p99``, ``max`` in microseconds and ``count`` of each stage in a ``snapshot`` that has any (for the
    status)."""
    found_of = zip(NAMES, map(counters.summary_of, found), strict=False)
    return {name: summary for name, summary in found_of if summary}
