"""The engine: who waits for which page, and what has been asked for. Pure: events in, effects out, no clock, no
descriptor.

Pages are asked for once, however many wait. Waiters are numbers (0 is the supervisor itself, client zero; a client's
number else). Invariant: every waited-for page is inside exactly one request in flight, so nobody can be forgotten;
``check`` asserts it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """Bring pages ``first`` to ``end`` of a block."""

    block: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let a waiter of this page run: it is present; or, ``lost``, it never will be."""

    waiter: int
    block: int
    page: int
    lost: bool


Effect = Ask | Release


class Flight:
    """Ranges of one block in flight, none overlapping another: found by page without looking at all of them."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []  # ascending
        self.ends: dict[int, int] = {}  # by start, in the order in which they were asked

    def take_off(self, first: int, end: int) -> int:
        """Add the first part, from ``first`` on, that is not in flight; its end. 0 when ``first`` itself is."""
        starts, ends = self.starts, self.ends
        at = bisect_right(starts, first)
        if at and first < ends[starts[at - 1]]:
            return 0
        if at < len(starts) and starts[at] < end:
            end = starts[at]
        starts.insert(at, first)
        ends[first] = end
        return end

    def land(self, first: int, end: int) -> None:
        """Take a range out, whole requests or parts of them."""
        starts, ends = self.starts, self.ends
        if ends.get(first) == end:  # the rule
            del ends[first]
            del starts[bisect_left(starts, first)]
            return
        at = max(0, bisect_right(starts, first) - 1)
        while at < len(starts) and starts[at] < end:
            start = starts[at]
            stop = ends[start]
            if stop <= first:
                at += 1
                continue
            del starts[at], ends[start]
            for low, high in ((start, min(stop, first)), (max(start, end), stop)):
                if low < high:
                    starts.insert(at, low)
                    ends[low] = high
                    at += 1

    def free(self, first: int, end: int) -> tuple[int, int] | None:
        """The first part of a range that is not in flight."""
        starts, ends = self.starts, self.ends
        at = bisect_right(starts, first)
        if at:
            first = max(first, ends[starts[at - 1]])
        while at < len(starts) and starts[at] == first:
            first = ends[first]
            at += 1
        if at < len(starts):
            end = min(end, starts[at])
        return (first, end) if first < end else None


class Engine:
    """Waiters and requests in flight of all blocks. The lanes (lanes.py) do by hand what ``stand`` and ``answered``
    do for one page; ``fault`` and ``answered`` say the same in effects, of any number of pages."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[int, int], set[int]] = {}
        """Who stands at a page, by (block, page)."""
        self.flights: dict[int, Flight] = {}
        """By block."""
        self.requests = 0
        self.deduplicated = 0

    def flight(self, block: int) -> Flight:
        """What is in flight of a block; always the same object."""
        flight = self.flights.get(block)
        if flight is None:
            flight = self.flights[block] = Flight()
        return flight

    def stand(self, waiter: int, block: int, page: int, end: int) -> int:
        """A waiter stands at ``page``. The end of what has to be asked for from there, at most ``end``; 0: nothing."""
        key = (block, page)
        waiters = self.waiting.get(key)
        if waiters is not None:
            waiters.add(waiter)
            self.deduplicated += 1
            return 0
        self.waiting[key] = {waiter}
        end = self.flight(block).take_off(page, end)
        if end:
            self.requests += 1
        else:
            self.deduplicated += 1
        return end

    def fault(self, waiter: int, block: int, page: int, end: int) -> list[Effect]:
        """A waiter stands at ``page``; if it has to be asked for, then pages up to ``end`` in the same breath."""
        end = self.stand(waiter, block, page, end)
        return [Ask(block, page, end)] if end else []

    def ask(self, block: int, first: int, end: int) -> list[Effect]:
        """Ask for a range, whoever wants it (background too); what is in flight of it is not asked for again."""
        free = self.first_free(block, first, end)
        if free is None:
            return []
        self.flight(block).take_off(*free)
        self.requests += 1
        return [Ask(block, *free)]

    def answered(self, block: int, first: int, end: int, lost: Iterable[int] = ()) -> list[Effect]:
        """Pages ``first`` to ``end`` have an answer, asked for or not, whole requests or parts: release all who
        wait."""
        if block in self.flights:
            self.flights[block].land(first, end)
        gone = set(lost)
        if end - first == 1:
            keys = [(block, first)] if (block, first) in self.waiting else []
        else:
            keys = sorted(key for key in self.waiting if key[0] == block and first <= key[1] < end)
        effects: list[Effect] = []
        for key in keys:
            for waiter in sorted(self.waiting.pop(key)):
                effects.append(Release(waiter, block, key[1], key[1] in gone))
        return effects

    def first_free(self, block: int, first: int, end: int) -> tuple[int, int] | None:
        """The first part of a range that is not in flight."""
        flight = self.flights.get(block)
        return flight.free(first, end) if flight is not None else (first, end) if first < end else None

    def outstanding(self) -> Iterator[tuple[int, int, int]]:
        """(block, first, end) of everything in flight, block by block in the order in which it was asked."""
        for block, flight in sorted(self.flights.items()):
            for first, end in flight.ends.items():
                yield block, first, end

    def asked_anew(self) -> list[Effect]:
        """Whoever was asked has died: everything in flight is asked again, in the old order."""
        return [Ask(*outstanding) for outstanding in self.outstanding()]

    def leave(self, waiter: int) -> list[tuple[int, int]]:
        """A waiter is gone; returns the (block, page) it stood at. What it asked for is brought all the same."""
        stood = [key for key, waiters in self.waiting.items() if waiter in waiters]
        for key in stood:
            self.waiting[key].discard(waiter)
            if not self.waiting[key]:
                del self.waiting[key]
        return sorted(stood)

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return sum(len(flight.starts) for flight in self.flights.values())

    @property
    def idle(self) -> bool:
        """Nothing in flight and nobody waiting."""
        return not self.waiting and not any(flight.starts for flight in self.flights.values())

    def waits(self, waiter: int) -> bool:
        """Does it stand anywhere?"""
        return any(waiter in waiters for waiters in self.waiting.values())

    def waited_for(self, block: int) -> list[int]:
        """Pages of a block that somebody stands at."""
        return sorted(page for number, page in self.waiting if number == block)

    def standing(self, block: int, page: int) -> list[int]:
        """Who stands at a page."""
        return sorted(self.waiting.get((block, page), ()))

    def check(self) -> None:
        """Assert the invariants (tests call it after every event)."""
        for (block, page), waiters in self.waiting.items():
            assert waiters, f"page {page} of block {block} is waited for by nobody"
            flights = sum(number == block and first <= page < end for number, first, end in self.outstanding())
            assert flights == 1, f"page {page} of block {block} is waited for and in flight {flights} times"
        for flight in self.flights.values():
            assert flight.starts == sorted(flight.ends)
            ends = [flight.ends[start] for start in flight.starts]
            assert all(start < end for start, end in zip(flight.starts, ends, strict=True))
            assert all(end <= start for end, start in zip(ends, flight.starts[1:], strict=False)), "asked for twice"
