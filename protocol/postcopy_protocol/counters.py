"""Two shared pages of 512 little-endian u64 words, each with one writer: figures of a worker, wishes of the house.

**Statistics page**, one a client, written by its worker only and handed on to its successor, so the figures survive a
restart. The supervisor reads it at any time without asking: an aligned word does not tear, and words read a moment
apart may disagree by one fault, which is no harm. The words from 64 on are a log-linear histogram of latencies:
eight buckets for every power of two from 256 ns to 2**38 ns (4.6 minutes), so a bucket is at most an eighth of its
value wide. ``bucket`` is on the fault path; everything below it is for readers.

**MainLoop page**, one for all, written by the supervisor only: what every worker should heed at its next fault.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, compress
from operator import add, mul

PAGE_BYTES = 4096
WORDS = PAGE_BYTES // 8

# --- words of a statistics page; those up to LAST_COUNTER only grow -------------------------------------------------

FAULTS = 0  # page-fault messages answered, but for PLAIN
PLACED = 1  # pages placed, fault-around included, but for PLAIN
WAKES = 2  # wake or continue calls
REQUESTS = 3  # pages asked of the supervisor
DEDUPLICATED = 4  # messages for a page that was already asked for or present
AROUND = 5  # pages placed by fault-around, beyond the faulting one
LOST = 6  # pages that their source could not supply
FAILURES = 7  # calls that failed and were reported
# 8 is free: it was used by older workers.
PLAIN = 9  # faults answered by placing their page and nothing else: one word for both, it is stored in every fault
AROUND_USED = 10  # of those placed by fault-around: in windows that a stream of faults went through to the end
LAST_COUNTER = AROUND_USED

LONGEST_NS = 16  # longest latency seen (0: the histogram's last bucket stands for it)
BUSY_SINCE_NS = 17  # CLOCK_MONOTONIC of the fault in hand; 0 idle
WORKER_PID = 18
INCARNATION = 19
OUTSIDE = 20  # faults outside every region, left waiting on purpose
SANDBOX = 21  # what the worker has given up, as bits (see sandbox_names)

HISTOGRAM = 64
"""First word of the histogram."""
_LOW_BITS = 8  # 2**8 ns: below it everything falls into the first bucket
_HIGH_BITS = 38  # 2**38 ns: from it on everything falls into the last
BUCKETS = (_HIGH_BITS - _LOW_BITS) * 8
LAST_BUCKET = HISTOGRAM + BUCKETS - 1

LOWEST = 1 << _LOW_BITS
BEYOND = 1 << _HIGH_BITS
# A value of b bits has its upper four in 8..15: word = HISTOGRAM + (b - 1 - _LOW_BITS) * 8 + (upper four - 8).
BIAS = HISTOGRAM - (1 + _LOW_BITS) * 8 - 8

DENIED = LAST_BUCKET + 1  # pages noted behind it, see ``deny``
UNNOTED = DENIED + 1  # pages that found no room there
DENIED_AT = UNNOTED + 1
MOST_DENIED = WORDS - DENIED_AT
_PAGE_BITS = 40

# --- words of the house page ------------------------------------------------------------------------------------------

WINDOW_LIMIT = 0  # bytes: the largest fault-around that memory pressure allows now
ENDING = 1  # not 0: the house ends, place nothing more
RECOVERED = 2  # how many supervisors have taken over from one that was gone

# --- bits of SANDBOX ------------------------------------------------------------------------------------------------

NO_CAPABILITIES, NO_NEW_PRIVILEGES, LANDLOCK, SECCOMP, CGROUP = 1, 2, 4, 8, 16
_SANDBOX = {
    NO_CAPABILITIES: "no-capabilities",
    NO_NEW_PRIVILEGES: "no-new-privileges",
    LANDLOCK: "landlock",
    SECCOMP: "seccomp",
    CGROUP: "cgroup",
}


def sandbox_names(bits: int) -> list[str]:
    """Names of the restrictions in ``bits``."""
    return [name for bit, name in _SANDBOX.items() if bits & bit]


def bucket(ns: int) -> int:
    """Word that counts a latency of ``ns`` nanoseconds."""
    if ns < LOWEST:
        return HISTOGRAM
    bits = ns.bit_length()
    return (bits << 3) + (ns >> (bits - 4)) + BIAS if ns < BEYOND else LAST_BUCKET


def bounds(word: int) -> tuple[int, int]:
    """Half-open range of nanoseconds that ``word`` counts (the first also what is shorter, the last what is longer)."""
    power, eighth = divmod(word - HISTOGRAM, 8)
    width = 1 << (power + _LOW_BITS - 3)
    low = (8 + eighth) * width
    return low, low + width


def faults(words: Sequence[int]) -> int:
    """Page-fault messages answered."""
    return words[FAULTS] + words[PLAIN]


def placed(words: Sequence[int]) -> int:
    """Pages placed, fault-around included."""
    return words[PLACED] + words[PLAIN]


def count(words: Sequence[int]) -> int:
    """Latencies in the histogram."""
    return sum(words[HISTOGRAM : LAST_BUCKET + 1])


def percentile(words: Sequence[int], percent: float) -> float:
    """Latency in microseconds that ``percent`` of all did not exceed (middle of its bucket: within 1/16); 0.0: none."""
    return _percentile(*_sums(words), percent, words[LONGEST_NS])


def longest(words: Sequence[int]) -> float:
    """Longest latency in microseconds: exact where the worker noted it, else the end of the last bucket in use."""
    return _longest(*_sums(words), words[LONGEST_NS])


BucketRun = tuple[int, Sequence[int]]
"""Of a histogram the first bucket that counts, and from there to the last that does: a few of hundreds."""


def in_use(buckets: Sequence[int]) -> BucketRun:
    """What is in use of these. A status asks for that of hundreds of clients, so the loops here and below are C's, and
    short."""
    if isinstance(buckets, memoryview):
        buckets = buckets.tolist()  # once: a worker goes on writing there
    first = next(compress(_PLACES, buckets), None)
    if first is None:
        return 0, ()
    return first, buckets[first : len(buckets) - next(compress(_PLACES, reversed(buckets)))]


_PLACES = range(WORDS)


def _sums(words: Sequence[int]) -> tuple[int, list[int]]:
    """The first bucket that counts, and from there on by bucket how many latencies are in it or before."""
    first, buckets = in_use(words[HISTOGRAM : LAST_BUCKET + 1])
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


def sum_ns(words: Sequence[int]) -> int:
    """Nanoseconds of all latencies together, each taken as the middle of its bucket (within 1/16): how long a client's
    threads stood at missing pages. Costs the fault path nothing."""
    first, buckets = in_use(words[HISTOGRAM : LAST_BUCKET + 1])
    return sum(map(mul, buckets, _MIDDLES[first:]))


_MIDDLES = [sum(bounds(word)) // 2 for word in range(HISTOGRAM, LAST_BUCKET + 1)]


def cumulative(words: Sequence[int]) -> list[tuple[int, int]]:
    """(upper bound in ns, latencies up to it) for every power of two; the last has them all."""
    found, total = [], 0
    for word in range(HISTOGRAM, LAST_BUCKET + 1, 8):
        total += sum(words[word : word + 8])
        found.append((bounds(word + 7)[1], total))
    return found


def summary(words: Sequence[int]) -> dict[str, float]:
    """``p50``, ``p99`` and ``max`` in microseconds, to a tenth."""
    return _summary(*_sums(words), words[LONGEST_NS])


def summary_of(stretch: BucketRun) -> dict[str, float]:
    """The same of a histogram alone, and their ``count``; {}: there are none."""
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
    """One page for many: counters and histogram added, the longest kept, what belongs to one worker is 0."""
    total = [0] * WORDS
    for words in pages:
        join(total, words)
    return tuple(total)


def join(total: list[int], words: Sequence[int]) -> None:
    """Merge one more page into ``total``, of zeros at first."""
    add_up(total, 0, (0, words[: LAST_COUNTER + 1]))
    add_up(total, HISTOGRAM, in_use(words[HISTOGRAM : LAST_BUCKET + 1]))
    total[LONGEST_NS] = max(total[LONGEST_NS], words[LONGEST_NS])


def add_up(total: list[int], at: int, stretch: BucketRun) -> None:
    """Add a histogram to that in ``total`` from word ``at`` on."""
    begin, words = at + stretch[0], stretch[1]
    end = begin + len(words)
    total[begin:end] = map(add, total[begin:end], words)


# --- pages denied to one client ---------------------------------------------------------------------------------------


def deny(words: memoryview, block: int, page: int) -> None:
    """Note a page that this client was given SIGBUS for though others may have it, because its worker had no source or
    its handler failed: it is healed when there is one, or when the block is whole. Killed between the stores a note may
    be there twice, which is no harm."""
    entry, count = block << _PAGE_BITS | page, words[DENIED]
    if entry in words[DENIED_AT : DENIED_AT + count].tolist():
        return
    if count >= MOST_DENIED:
        words[UNNOTED] += 1
        return
    words[DENIED_AT + count] = entry
    words[DENIED] = count + 1


def allow(words: memoryview, block: int, page: int) -> None:
    """Forget the note: the page is healed."""
    entry, count = block << _PAGE_BITS | page, words[DENIED]
    for at in range(DENIED_AT + count - 1, DENIED_AT - 1, -1):
        if words[at] == entry:
            count -= 1
            words[at] = words[DENIED_AT + count]
            words[DENIED] = count


def denied(words: Sequence[int]) -> list[tuple[int, int]]:
    """(block, page) of every page that is noted."""
    count = min(words[DENIED], MOST_DENIED)
    return [(word >> _PAGE_BITS, word & (1 << _PAGE_BITS) - 1) for word in words[DENIED_AT : DENIED_AT + count]]
