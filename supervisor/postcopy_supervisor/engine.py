"""The engine: who waits for which page, and what has been asked for. Pure: events in, effects out, no clock, no
descriptor.

Pages are asked for once, however many wait. Waiters are numbers (0 is the supervisor itself, client zero; a client's
number else). Invariant: every waited-for page is inside exactly one request in flight, so nobody can be forgotten;
``check`` asserts it.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class Engine:
    """Waiters and requests in flight of all blocks."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], set[int]] = {}
        self._asked: dict[int, list[tuple[int, int]]] = {}
        self.requests = 0
        self.deduplicated = 0

    def fault(self, waiter: int, block: int, page: int, end: int) -> list[Effect]:
        """A waiter stands at ``page``; if it has to be asked for, then pages up to ``end`` in the same breath."""
        waiters = self._waiting.setdefault((block, page), set())
        known = bool(waiters) or self._in_flight(block, page)
        waiters.add(waiter)
        if known:
            self.deduplicated += 1
            return []
        return self.ask(block, page, end)

    def ask(self, block: int, first: int, end: int) -> list[Effect]:
        """Ask for a range, whoever wants it (background too); what is in flight of it is not asked for again."""
        free = self.first_free(block, first, end)
        if free is None:
            return []
        first, end = free
        self._asked.setdefault(block, []).append((first, end))
        self.requests += 1
        return [Ask(block, first, end)]

    def answered(self, block: int, first: int, end: int, lost: Iterable[int] = ()) -> list[Effect]:
        """Pages ``first`` to ``end`` have an answer, asked for or not, whole requests or parts: release all who
        wait."""
        asked = self._asked.get(block)
        if asked:
            self._asked[block] = [
                (low, high)
                for start, stop in asked
                for low, high in ((start, min(stop, first)), (max(start, end), stop))
                if low < high
            ]
        gone = set(lost)
        if end - first == 1:
            keys = [(block, first)] if (block, first) in self._waiting else []
        else:
            keys = sorted(key for key in self._waiting if key[0] == block and first <= key[1] < end)
        effects: list[Effect] = []
        for key in keys:
            for waiter in sorted(self._waiting.pop(key)):
                effects.append(Release(waiter, block, key[1], key[1] in gone))
        return effects

    def first_free(self, block: int, first: int, end: int) -> tuple[int, int] | None:
        """The first part of a range that is not in flight."""
        for start, stop in sorted(self._asked.get(block, ())):
            if start <= first < stop:
                first = stop
            elif first < start < end:
                end = start
        return (first, end) if first < end else None

    def asked_anew(self) -> list[Effect]:
        """Whoever was asked has died: everything in flight is asked again, in the old order."""
        return [Ask(block, first, end) for block, ranges in sorted(self._asked.items()) for first, end in ranges]

    def leave(self, waiter: int) -> list[tuple[int, int]]:
        """A waiter is gone; returns the (block, page) it stood at. What it asked for is brought all the same."""
        stood = [key for key, waiters in self._waiting.items() if waiter in waiters]
        for key in stood:
            self._waiting[key].discard(waiter)
            if not self._waiting[key]:
                del self._waiting[key]
        return sorted(stood)

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return sum(len(ranges) for ranges in self._asked.values())

    @property
    def idle(self) -> bool:
        """Nothing in flight and nobody waiting."""
        return not self._waiting and not any(self._asked.values())

    def waits(self, waiter: int) -> bool:
        """Does it stand anywhere?"""
        return any(waiter in waiters for waiters in self._waiting.values())

    def waited_for(self, block: int) -> list[int]:
        """Pages of a block that somebody stands at."""
        return sorted(page for number, page in self._waiting if number == block)

    def standing(self, block: int, page: int) -> list[int]:
        """Who stands at a page."""
        return sorted(self._waiting.get((block, page), ()))

    def _in_flight(self, block: int, page: int) -> bool:
        return any(first <= page < end for first, end in self._asked.get(block, ()))

    def check(self) -> None:
        """Assert the invariants (tests call it after every event)."""
        for (block, page), waiters in self._waiting.items():
            assert waiters, f"page {page} of block {block} is waited for by nobody"
            flights = sum(first <= page < end for first, end in self._asked.get(block, ()))
            assert flights == 1, f"page {page} of block {block} is waited for and in flight {flights} times"
