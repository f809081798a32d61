"""The record of a client's touches: three histograms and a timeline, of a fixed size for any number of touches.

*Latency* is the time of a first touch of a page by this client; later touches are plain memory accesses. A touch of a
page that was not yet received is a *fault* too. *Response* (open loop only) is counted for every touch from the instant
at which it was **due**: while one touch hangs, the touches that are due meanwhile wait too, and a tester that waits for
each would not count them (coordinated omission).

The timeline has bins of ``width`` nanoseconds; when there are too many, two bins become one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from postcopy_protocol import counters
from postcopy_protocol.counters import bucket

MOST_BINS = 1024
FIRST_WIDTH = 20_000_000
TOUCHES, FIRSTS, MISSING, SLOWEST = range(4)
"""Fields of a bin: touches, first touches, touches of missing pages, ns of the slowest touch."""


class Recorder:
    """``origin`` (CLOCK_MONOTONIC, ns) is the start of the test, the same for all clients."""

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
        """Record a touch that was due at ``due``, began at ``begun`` and ended at ``ended`` (ns)."""
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

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "touches": self.touches,
            "missed": self.missed,
            "latency": self.latency,
            "faults": self.faults,
            "response": self.response,
            "width": self.width,
            "bins": [[number, *figures] for number, figures in self.bins.items()],
            "begun": self.begun - self.origin,
            "ended": self.ended - self.origin,
        }


def _count(histogram: list[int], taken: int) -> None:
    histogram[counters.FAULTS] += 1
    histogram[bucket(taken)] += 1
    if taken > histogram[counters.LONGEST_NS]:
        histogram[counters.LONGEST_NS] = taken


def halved(bins: dict[int, list[int]]) -> dict[int, list[int]]:
    """The same time in half as many bins."""
    return added((number // 2, figures) for number, figures in bins.items())


def added(bins: Iterable[tuple[int, list[int]]]) -> dict[int, list[int]]:
    """Add up bins of the same number."""
    total: dict[int, list[int]] = {}
    for number, figures in bins:
        found = total.setdefault(number, [0] * 4)
        for place in (TOUCHES, FIRSTS, MISSING):
            found[place] += figures[place]
        found[SLOWEST] = max(found[SLOWEST], figures[SLOWEST])
    return total


def merged(records: Iterable[dict[str, Any]]) -> tuple[int, dict[int, list[int]]]:
    """Width in ns and bins of several recorders together (their widths are powers of two times the first width)."""
    parts = [(record["width"], {row[0]: row[1:] for row in record["bins"]}) for record in records]
    widest = max((width for width, _ in parts), default=FIRST_WIDTH)
    rows: list[tuple[int, list[int]]] = []
    for width, bins in parts:
        rows += [(number * width // widest, figures) for number, figures in bins.items()]
    return widest, added(rows)


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of a client's threads as one."""
    width, bins = merged(records)
    responses = [record["response"] for record in records if record["response"]]
    return {
        "touches": sum(record["touches"] for record in records),
        "missed": sum(record["missed"] for record in records),
        "latency": list(counters.merge(record["latency"] for record in records)),
        "faults": list(counters.merge(record["faults"] for record in records)),
        "response": list(counters.merge(responses)) if responses else None,
        "width": width,
        "bins": [[number, *figures] for number, figures in sorted(bins.items())],
        "begun": min((record["begun"] for record in records), default=0),
        "ended": max((record["ended"] for record in records), default=0),
    }
