"""The engine: which waiter waits for which page, and which pages are requested. Pure: events in, effects out.

A page is requested once, however many clients wait for it. A waiter is a number: 0 is client zero, the supervisor
itself; any other is a client. Invariant: every page that has a waiter is inside exactly one requested range, so no
waiter can be forgotten. ``check`` asserts it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: request pages ``first`` to ``end`` of a block."""

    block: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Release:
    """Effect: let a waiter of this page run. The page is present or, with ``lost``, will never be."""

    waiter: int
    block: int
    page: int
    lost: bool


Effect = Ask | Release


class Ranges:
    """Requested ranges of one block. They do not overlap; a page is found by bisection."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []  # ascending
        self.ends: dict[int, int] = {}  # by start, in the order of the requests

    def add(self, first: int, end: int) -> int:
        """Add the part from ``first`` up to the next requested page; its end. 0: ``first`` itself is requested."""
        starts, ends = self.starts, self.ends
        at = bisect_right(starts, first)
        if at and first < ends[starts[at - 1]]:
            return 0
        if at < len(starts) and starts[at] < end:
            end = starts[at]
        starts.insert(at, first)
        ends[first] = end
        return end

    def remove(self, first: int, end: int) -> None:
        """Remove a range: whole requests or parts of them."""
        starts, ends = self.starts, self.ends
        if ends.get(first) == end:  # one whole request: the common case
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

    def start(self, page: int) -> int:
        """The first page of the request that brings ``page``, which is requested."""
        return self.starts[bisect_right(self.starts, page) - 1]

    def first_gap(self, first: int, end: int) -> tuple[int, int] | None:
        """The first part of ``first`` to ``end`` that is not requested."""
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
    """Waiters and requested ranges of all blocks. The fast path (fast_path.py) inlines ``wait`` and ``answered`` for
    one page; ``fault`` and ``answered`` give the same as effects, for any number of pages."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[int, int], set[int]] = {}  # waiters by (block, page)
        self._ranges: dict[int, Ranges] = {}  # by block
        self.requests = 0
        self.deduplicated = 0  # faults on pages that were requested already

    def ranges(self, block: int) -> Ranges:
        """The requested ranges of a block; always the same object."""
        ranges = self._ranges.get(block)
        if ranges is None:
            ranges = self._ranges[block] = Ranges()
        return ranges

    def wait(self, waiter: int, block: int, page: int, end: int) -> int:
        """Add a waiter of ``page``. Returns the end of the range to request from there, at most ``end``; 0: none."""
        key = (block, page)
        waiters = self.waiting.get(key)
        if waiters is not None:
            waiters.add(waiter)
            self.deduplicated += 1
            return 0
        self.waiting[key] = {waiter}
        end = self.ranges(block).add(page, end)
        if end:
            self.requests += 1
        else:
            self.deduplicated += 1
        return end

    def fault(self, waiter: int, block: int, page: int, end: int) -> list[Effect]:
        """A waiter faulted on ``page``. If the page must be requested, the pages up to ``end`` go with it."""
        end = self.wait(waiter, block, page, end)
        return [Ask(block, page, end)] if end else []

    def ask(self, block: int, first: int, end: int) -> list[Effect]:
        """Request the first part of a range that is not requested, without a waiter (background)."""
        gap = self.first_gap(block, first, end)
        if gap is None:
            return []
        self.ranges(block).add(*gap)
        self.requests += 1
        return [Ask(block, *gap)]

    def answered(self, block: int, first: int, end: int, lost: Iterable[int] = ()) -> list[Effect]:
        """Pages ``first`` to ``end`` have an answer, requested or not: release all their waiters."""
        if block in self._ranges:
            self._ranges[block].remove(first, end)
        lost = set(lost)
        if end - first == 1:
            keys = [(block, first)] if (block, first) in self.waiting else []
        else:
            keys = sorted(key for key in self.waiting if key[0] == block and first <= key[1] < end)
        effects: list[Effect] = []
        for key in keys:
            for waiter in sorted(self.waiting.pop(key)):
                effects.append(Release(waiter, block, key[1], key[1] in lost))
        return effects

    def first_gap(self, block: int, first: int, end: int) -> tuple[int, int] | None:
        """The first part of ``first`` to ``end`` that is not requested."""
        ranges = self._ranges.get(block)
        return ranges.first_gap(first, end) if ranges is not None else (first, end) if first < end else None

    def outstanding(self) -> Iterator[Ask]:
        """Every requested range, block by block in the order of the requests."""
        for block, ranges in sorted(self._ranges.items()):
            for first, end in ranges.ends.items():
                yield Ask(block, first, end)

    def leave(self, waiter: int) -> list[tuple[int, int]]:
        """Forget a waiter; returns the (block, page) it waited for. Its requests stay: others may wait for them."""
        left = [key for key, waiters in self.waiting.items() if waiter in waiters]
        for key in left:
            self.waiting[key].discard(waiter)
            if not self.waiting[key]:
                del self.waiting[key]
        return sorted(left)

    @property
    def in_flight(self) -> int:
        """Number of requested ranges."""
        return sum(len(ranges.starts) for ranges in self._ranges.values())

    @property
    def idle(self) -> bool:
        """Nothing is requested and no waiter is left."""
        return not self.waiting and not self.in_flight

    def is_waiting(self, waiter: int) -> bool:
        """Does it wait for any page?"""
        return any(waiter in waiters for waiters in self.waiting.values())

    def pages_waited_for(self, block: int) -> list[int]:
        """Pages of a block that have a waiter."""
        return sorted(page for number, page in self.waiting if number == block)

    def waiters_of(self, block: int, page: int) -> list[int]:
        """Waiters of one page."""
        return sorted(self.waiting.get((block, page), ()))

    def check(self) -> None:
        """Assert the invariants (tests call it after every event)."""
        outstanding = list(self.outstanding())
        for (block, page), waiters in self.waiting.items():
            assert waiters, f"page {page} of block {block} has an empty set of waiters"
            count = sum(ask.block == block and ask.first <= page < ask.end for ask in outstanding)
            assert count == 1, f"page {page} of block {block} has waiters and is requested {count} times"
        for ranges in self._ranges.values():
            assert ranges.starts == sorted(ranges.ends)
            ends = [ranges.ends[start] for start in ranges.starts]
            assert all(start < end for start, end in zip(ranges.starts, ends, strict=True))
            assert all(end <= start for end, start in zip(ends, ranges.starts[1:], strict=False)), "requested twice"
