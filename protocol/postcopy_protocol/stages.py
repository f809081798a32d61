"""Stages of a fault, as histograms by client and block: where did the time go?

    asked     from reading the fault's message to the request for its page having been sent (remote blocks)
    arrived   from the request to the source to the page's having come (remote blocks)
    placed    from reading the message (local blocks), or the page's arrival (remote ones), to its being in the block
    woken     from reading the message to the word that lets the client run on: all of it

*Read* is where they begin: the kernel does not say when the client came to stand there. ``asked``, ``placed`` of local
blocks and ``woken`` are written by the client's worker, into its figures behind the statistics page: two pages of u64
words for each block. ``arrived``, and ``placed`` of remote blocks, are the supervisor's and known by block only,
because a page comes once whoever waits for it. Buckets are those of ``statistics``. Of a client's common local faults
the first is timed, then one in seventeen, which counts for seventeen; of what is done with one remote page at a time,
one in four, which counts for four.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import counters
from .counters import BUCKETS, HISTOGRAM, PAGE_BYTES

NAMES = ("asked", "arrived", "placed", "woken")
STARTS = [stage * BUCKETS for stage in range(len(NAMES))]
ASKED, ARRIVED, PLACED, WOKEN = (start - HISTOGRAM for start in STARTS)
"""What to add to ``bucket(ns)`` for the word that counts it."""

BYTES = 2 * PAGE_BYTES
WORDS = BYTES // 8
assert len(NAMES) * BUCKETS <= WORDS
MOST_BLOCKS = 64
"""Blocks with a number from 1 to it have room; the stages of others are not kept. Room that is not used is a hole."""
END = PAGE_BYTES + MOST_BLOCKS * BYTES
"""Size of a client's figures: the statistics page, then the stages."""


def position(block: int) -> int | None:
    """Where in a client's figures those of a block begin; None: there is no room for it."""
    return PAGE_BYTES + (block - 1) * BYTES if 1 <= block <= MOST_BLOCKS else None


def scratch() -> memoryview:
    """Fresh words: for a block without room, which nobody reads, or for whoever has no client's figures to write to."""
    return memoryview(bytearray(BYTES)).cast("Q")


def merged(stages: Iterable[memoryview]) -> memoryview:
    """Those of many clients as one."""
    # Words as digits of one great number: a status adds hundreds of them, and no count comes near to a carry.
    total = sum(int.from_bytes(words, "little") for words in stages)
    return memoryview(total.to_bytes(BYTES + 8, "little")[:BYTES]).cast("Q")


def snapshot(stages: Sequence[int] | None) -> list[counters.BucketRun]:
    """What is in use of each stage now; []: they are not kept."""
    return [] if stages is None else [counters.in_use(stages[at : at + BUCKETS]) for at in STARTS]


def join(total: list[int], found: Sequence[counters.BucketRun]) -> None:
    """Add what was ``taken`` to ``total``, WORDS zeros at first. What is spoilt makes large numbers there."""
    for at, stretch in zip(STARTS, found, strict=False):
        counters.add_up(total, at, stretch)


def histogram(stages: memoryview, name: str) -> list[int]:
    """One stage, as words that ``statistics`` understands."""
    first = NAMES.index(name) * BUCKETS
    return [0] * HISTOGRAM + stages[first : first + BUCKETS].tolist()


def summaries(found: Sequence[counters.BucketRun]) -> dict[str, dict[str, float]]:
    """For the status, of what was ``taken``: ``p50``, ``p99``, ``max`` in microseconds and ``count`` of each stage that
    has any."""
    found_of = zip(NAMES, map(counters.summary_of, found), strict=False)
    return {name: summary for name, summary in found_of if summary}
