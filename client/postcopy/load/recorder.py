"""What a toucher writes down of its touches: three histograms and a timeline, small however many touches there are.

*Latency* is the time of a first touch of a page by this client, from its beginning to its end: later touches are
memory accesses. Where the page was not yet received when it was touched, it is also a *fault*. *Response* (open loop
only) is counted from the instant at which a touch was **due**, for every touch: while one touch hangs, those that
should have been made meanwhile wait too, and a tester that waits politely would never count them (coordinated
omission).

The timeline has bins of ``width`` nanoseconds; when there are too many, two become one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from postcopy_protocol import counters
from postcopy_protocol.counters import bucket

MOST_BINS = 1024
FIRST_WIDTH = 20_000_000
TOUCHES, FIRSTS, MISSING, SLOWEST = range(4)
"""Of a bin: touches, first touches, those of them whose page was missing, ns of the slowest touch."""


class Recorder:
    """``origin`` (CLOCK_MONOTONIC, ns) is when the test began, for all clients the same."""

    def __init__(self, origin: int, *, open_loop: bool = False) -> None:
        self.origin = origin
        self.width = FIRST_WIDTH
        self.latency = [0] * counters.WORDS
        self.faults = [0] * counters.WORDS
        self.response = [0] * counters.WORDS if open_loop else None
        self.bins: dict[int, list[int]] = {}
        self.touches = self.missed = 0
        self.begun = self.ended = 0

    def touch(self, begun: int, ended: int, due: int, *, first: bool, missing: bool) -> None:
        """A touch that should have begun at ``due``, did at ``begun``, and was over at ``ended`` (all ns)."""
        self.touches += 1
        taken = ended - begun
        if first:
            _count(self.latency, taken)
        if missing:
            _count(self.faults, taken)
        if self.response is not None:
            taken = ended - due
            _count(self.response, taken)
        found = self._bin((ended - self.origin) // self.width)
        found[TOUCHES] += 1
        found[FIRSTS] += first
        found[MISSING] += missing
        if taken > found[SLOWEST]:
            found[SLOWEST] = taken
        if not self.begun:
            self.begun = begun
        self.ended = ended

    def _bin(self, number: int) -> list[int]:
        found = self.bins.get(number)
        if found is None:
            found = self.bins[number] = [0] * 4
            if len(self.bins) > MOST_BINS:
                self.bins, self.width = halved(self.bins), self.width * 2
                found = self.bins[number // 2]
        return found

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "touches": self.touches,
            "missed": self.missed,
            "words": self.latency,
            "faults": self.faults,
            "response": self.response,
            "width": self.width,
            "bins": [[number, *figures] for number, figures in self.bins.items()],
            "begun": self.begun - self.origin,
            "ended": self.ended - self.origin,
        }


def _count(words: list[int], taken: int) -> None:
    words[counters.FAULTS] += 1
    words[bucket(taken)] += 1
    if taken > words[counters.LONGEST_NS]:
        words[counters.LONGEST_NS] = taken


def halved(bins: dict[int, list[int]]) -> dict[int, list[int]]:
    """The same bins, two in one."""
    return added((number // 2, figures) for number, figures in bins.items())


def added(bins: Iterable[tuple[int, list[int]]]) -> dict[int, list[int]]:
    """Bins of the same number become one."""
    total: dict[int, list[int]] = {}
    for number, figures in bins:
        found = total.setdefault(number, [0] * 4)
        for place in (TOUCHES, FIRSTS, MISSING):
            found[place] += figures[place]
        found[SLOWEST] = max(found[SLOWEST], figures[SLOWEST])
    return total


def merged(told: Iterable[dict[str, Any]]) -> tuple[int, dict[int, list[int]]]:
    """Width in ns and bins of several recorders together (their widths are powers of two times the first width)."""
    everything = [(record["width"], {row[0]: row[1:] for row in record["bins"]}) for record in told]
    widest = max((width for width, _ in everything), default=FIRST_WIDTH)
    rows: list[tuple[int, list[int]]] = []
    for width, bins in everything:
        rows += [(number * width // widest, figures) for number, figures in bins.items()]
    return widest, added(rows)


def together(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of a client's threads as one."""
    width, bins = merged(told)
    responses = [record["response"] for record in told if record["response"]]
    return {
        "touches": sum(record["touches"] for record in told),
        "missed": sum(record["missed"] for record in told),
        "words": list(counters.merge(record["words"] for record in told)),
        "faults": list(counters.merge(record["faults"] for record in told)),
        "response": list(counters.merge(responses)) if responses else None,
        "width": width,
        "bins": [[number, *figures] for number, figures in sorted(bins.items())],
        "begun": min((record["begun"] for record in told), default=0),
        "ended": max((record["ended"] for record in told), default=0),
    }
