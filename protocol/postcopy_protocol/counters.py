"""The statistics page of a worker and the control page of the supervisor: 512 little-endian u64 counters each.

**Statistics page**, one for each client. Only its worker writes it, and passes it on to its successor, so counters
survive a restart. The supervisor reads it at any time: an aligned u64 does not tear, and counters read one after
another may differ by one fault, which does no harm. The counters from 64 on are a log-linear histogram of latencies:
eight buckets for every power of two from 256 ns to 2**38 ns (4.6 minutes), so the width of a bucket is at most an
eighth of its value. ``bucket`` is on the fault path; the functions after it are for readers.

**Control page**, one for all workers. Only the supervisor writes it; every worker reads it at its next fault.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, compress
from operator import add, mul

PAGE_BYTES = 4096
WORDS = PAGE_BYTES // 8

FAULTS = 0  # page-fault messages answered, without PLAIN
PLACED = 1  # pages placed, fault-around included, without PLAIN
WAKES = 2  # wake or continue calls
REQUESTS = 3  # pages requested from the supervisor
DEDUPLICATED = 4  # messages for a page that was already requested or present
AROUND = 5  # pages placed by fault-around, beyond the faulting one
LOST = 6  # faults at pages that their source could not supply
FAILURES = 7  # calls that failed and were reported
# 8 is free: it was used by older workers.
PLAIN = 9  # faults answered by placing one page: counts as fault and as page, with one store
AROUND_USED = 10  # of those placed by fault-around: in windows that a stream of faults read to the end
LAST_COUNTER = AROUND_USED

LONGEST_NS = 16  # longest latency seen (0: the histogram's last bucket stands for it)
BUSY_SINCE_NS = 17  # CLOCK_MONOTONIC of the current fault; 0: idle
WORKER_PID = 18
INCARNATION = 19
OUTSIDE = 20  # faults outside all regions, left waiting on purpose
SANDBOX = 21  # rights that the worker has given up, as bits (see sandbox_names)
POISONED = 22  # the page that this client got SIGBUS for last (see ``place_of``); 0: none
EXPLAINED = 23  # the page that REASON is about
BUSY_BLOCK = 24  # number of the block of BUSY_SINCE_NS, where it is no common fault of a file
FAULT_LOOP = 31  # which of FAULT_LOOPS answers; 0: a worker that has none, or is of an older version

REASON = 32
"""Bytes of the text that follows: why the last page could not be supplied. A report may be lost with its worker."""
MOST_REASON = (64 - REASON - 1) * 8

HISTOGRAM = 64
"""Index of the first bucket."""
_LOW_BITS = 8  # 2**8 ns: shorter latencies are in the first bucket
_HIGH_BITS = 38  # 2**38 ns: latencies from here on are in the last bucket
BUCKETS = (_HIGH_BITS - _LOW_BITS) * 8
LAST_BUCKET = HISTOGRAM + BUCKETS - 1

LOWEST = 1 << _LOW_BITS
BEYOND = 1 << _HIGH_BITS
# A value of b bits has its upper four in 8..15: index = HISTOGRAM + (b - 1 - _LOW_BITS) * 8 + (upper four - 8).
BIAS = HISTOGRAM - (1 + _LOW_BITS) * 8 - 8

DENIED = LAST_BUCKET + 1  # number of the pages listed behind it, see ``deny``
UNNOTED = DENIED + 1  # pages that did not fit into the list
DENIED_AT = UNNOTED + 1
MOST_DENIED = WORDS - DENIED_AT
_PAGE_BITS = 40

WINDOW_LIMIT = 0  # bytes: the largest fault-around window that memory pressure allows now
ENDING = 1  # not 0: the supervisor ends, place nothing more
RECOVERED = 2  # number of take-overs from a dead supervisor
HELD_UNTIL_NS = 4
"""CLOCK_MONOTONIC until which workers place no page through their own mapping, which would be charged to a cgroup that
has no memory left. The supervisor renews it, so that pages come when it has died. 0: they are placed."""
ORPHAN_MS = 3  # time without supervisor and custodian until workers poison missing remote pages; 0: they wait

NO_CAPABILITIES, NO_NEW_PRIVILEGES, LANDLOCK, SECCOMP, CGROUP = 1, 2, 4, 8, 16
_SANDBOX = {
    NO_CAPABILITIES: "no-capabilities",
    NO_NEW_PRIVILEGES: "no-new-privileges",
    LANDLOCK: "landlock",
    SECCOMP: "seccomp",
    CGROUP: "cgroup",
}


FAULT_LOOPS = ("", "python", "compiled")


def fault_loop_name(value: int) -> str:
    """The name of what a worker has noted as FAULT_LOOP."""
    return FAULT_LOOPS[value] if value < len(FAULT_LOOPS) else ""


def sandbox_names(bits: int) -> list[str]:
    """Names of the restrictions in ``bits``."""
    return [name for bit, name in _SANDBOX.items() if bits & bit]


def bucket(ns: int) -> int:
    """Index of the bucket for a latency of ``ns`` nanoseconds."""
    if ns < LOWEST:
        return HISTOGRAM
    bits = ns.bit_length()
    return (bits << 3) + (ns >> (bits - 4)) + BIAS if ns < BEYOND else LAST_BUCKET


def bounds(index: int) -> tuple[int, int]:
    """Half-open range of nanoseconds of a bucket (the first also counts shorter ones, the last longer ones)."""
    power, eighth = divmod(index - HISTOGRAM, 8)
    width = 1 << (power + _LOW_BITS - 3)
    low = (8 + eighth) * width
    return low, low + width


def faults(values: Sequence[int]) -> int:
    """Page-fault messages answered."""
    return values[FAULTS] + values[PLAIN]


def placed(values: Sequence[int]) -> int:
    """Pages placed, fault-around included."""
    return values[PLACED] + values[PLAIN]


def count(values: Sequence[int]) -> int:
    """Latencies in the histogram."""
    return sum(values[HISTOGRAM : LAST_BUCKET + 1])


def percentile(values: Sequence[int], percent: float) -> float:
    """Percentile of the latencies in microseconds (middle of its bucket: within 1/16); 0.0 if there are none."""
    return _percentile(*_sums(values), percent, values[LONGEST_NS])


def longest(values: Sequence[int]) -> float:
    """Longest latency in microseconds: exact if the worker recorded it, else the end of the last bucket in use."""
    return _longest(*_sums(values), values[LONGEST_NS])


BucketRun = tuple[int, Sequence[int]]
"""Index of the first bucket in use, and the buckets from it to the last in use: a few of hundreds."""


def in_use(buckets: Sequence[int]) -> BucketRun:
    """The buckets in use. A status does this for hundreds of clients, so the loops here and below run in C."""
    if isinstance(buckets, memoryview):
        buckets = buckets.tolist()  # once: a worker writes concurrently
    first = next(compress(_PLACES, buckets), None)
    if first is None:
        return 0, ()
    return first, buckets[first : len(buckets) - next(compress(_PLACES, reversed(buckets)))]


_PLACES = range(WORDS)


def _sums(values: Sequence[int]) -> tuple[int, list[int]]:
    """Index of the first bucket in use, and from there on the cumulative counts."""
    first, buckets = in_use(values[HISTOGRAM : LAST_BUCKET + 1])
    return first, list(accumulate(buckets))


def _percentile(first: int, sums: list[int], percent: float, longest_ns: int) -> float:
    if not sums:
        return 0.0
    low, high = bounds(HISTOGRAM + first + bisect_left(sums, max(1, -int(-sums[-1] * percent // 100))))
    return min((low + high) / 2, longest_ns or high) / 1000


def _longest(first: int, sums: list[int], longest_ns: int) -> float:
    if longest_ns or not sums:
        return longest_ns / 1000
    return bounds(HISTOGRAM + first + bisect_left(sums, sums[-1]))[1] / 1000


def sum_ns(values: Sequence[int]) -> int:
    """Sum of all latencies in nanoseconds, each as the middle of its bucket (within 1/16): how long a client's threads
    waited for missing pages. It costs the fault path nothing."""
    first, buckets = in_use(values[HISTOGRAM : LAST_BUCKET + 1])
    return sum(map(mul, buckets, _MIDDLES[first:]))


_MIDDLES = [sum(bounds(index)) // 2 for index in range(HISTOGRAM, LAST_BUCKET + 1)]


def cumulative(values: Sequence[int]) -> list[tuple[int, int]]:
    """(upper bound in ns, latencies up to it) for every power of two; the last counts them all."""
    found, total = [], 0
    for index in range(HISTOGRAM, LAST_BUCKET + 1, 8):
        total += sum(values[index : index + 8])
        found.append((bounds(index + 7)[1], total))
    return found


def summary(values: Sequence[int]) -> dict[str, float]:
    """``p50``, ``p99`` and ``max`` in microseconds, to a tenth."""
    return _summary(*_sums(values), values[LONGEST_NS])


def summary_of(stretch: BucketRun) -> dict[str, float]:
    """The same for a histogram alone, with the ``count``; {} if there are none."""
    first, buckets = stretch
    if not buckets:
        return {}
    sums = list(accumulate(buckets))
    return {**_summary(first, sums, 0), "count": sums[-1]}


def _summary(first: int, sums: list[int], longest_ns: int) -> dict[str, float]:
    return {
        "p50": round(_percentile(first, sums, 50, longest_ns), 1),
        "p99": round(_percentile(first, sums, 99, longest_ns), 1),
        "max": round(_longest(first, sums, longest_ns), 1),
    }


def merge(pages: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """One page for many: counters and histograms added, the longest latency kept, all that is about one worker 0."""
    total = [0] * WORDS
    for values in pages:
        join(total, values)
    return tuple(total)


def join(total: list[int], values: Sequence[int]) -> None:
    """Merge one more page into ``total``, which begins as zeros."""
    add_up(total, 0, (0, values[: LAST_COUNTER + 1]))
    add_up(total, HISTOGRAM, in_use(values[HISTOGRAM : LAST_BUCKET + 1]))
    total[LONGEST_NS] = max(total[LONGEST_NS], values[LONGEST_NS])


def subtract(total: list[int], values: Sequence[int]) -> None:
    """Take one page's counters and histogram out of ``total`` again."""
    for at in (*range(LAST_COUNTER + 1), *range(HISTOGRAM, LAST_BUCKET + 1)):
        total[at] -= values[at]


def add_up(total: list[int], at: int, stretch: BucketRun) -> None:
    """Add a histogram to that in ``total`` from index ``at`` on."""
    begin, values = at + stretch[0], stretch[1]
    end = begin + len(values)
    total[begin:end] = map(add, total[begin:end], values)


def entry(block: int, page: int) -> int:
    """A page of a block as one number. Blocks are numbered from 1, so it is never 0."""
    return block << _PAGE_BITS | page


def place_of(number: int) -> tuple[int, int]:
    """Block and page of an ``entry``."""
    return number >> _PAGE_BITS, number & (1 << _PAGE_BITS) - 1


def note_reason(values: memoryview, text: str, block: int, page: int) -> None:
    """Keep why a page cannot be supplied, as far as there is room."""
    data = text.encode("utf-8", "replace")[:MOST_REASON]
    values[EXPLAINED] = entry(block, page)
    values[REASON] = len(data)
    start = (REASON + 1) * 8
    values.cast("B")[start : start + len(data)] = data


def reason(values: memoryview) -> str:
    """The text that ``note_reason`` has kept last."""
    start = (REASON + 1) * 8
    data = bytes(values.cast("B")[start : start + min(values[REASON], MOST_REASON)])
    return data.decode("utf-8", "replace")


def deny(values: memoryview, block: int, page: int) -> None:
    """List a page for which this client got SIGBUS although others may have it: its worker had no source, or its
    handler failed. It is unpoisoned when there is a source, or when the block is complete.

    If the worker is killed between the stores, a page may be listed twice, which does no harm."""
    number, count = entry(block, page), values[DENIED]
    if number in values[DENIED_AT : DENIED_AT + count].tolist():
        return
    if count >= MOST_DENIED:
        values[UNNOTED] += 1
        return
    values[DENIED_AT + count] = number
    values[DENIED] = count + 1


def allow(values: memoryview, block: int, page: int) -> None:
    """Remove a page from the list: it is unpoisoned."""
    number, count = entry(block, page), values[DENIED]
    for at in range(DENIED_AT + count - 1, DENIED_AT - 1, -1):
        if values[at] == number:
            count -= 1
            values[at] = values[DENIED_AT + count]
            values[DENIED] = count


def denied(values: Sequence[int]) -> list[tuple[int, int]]:
    """(block, page) of every page in the list."""
    count = min(values[DENIED], MOST_DENIED)
    return [place_of(number) for number in values[DENIED_AT : DENIED_AT + count]]
