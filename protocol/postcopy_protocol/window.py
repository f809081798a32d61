"""Fault-around: how many pages to place for one fault.

A fault costs far more than a page. A sequential reader should cause few faults; a random reader should not get pages
that it never touches. The faults show which it is. A stream is a sequence of faults in which each begins exactly where
the window of the previous one ended. Its window doubles from one page to the largest. A fault that continues no stream
is placed alone.

A client has several threads, and a loop over two arrays is two streams. So eight streams are remembered, and the least
recently continued one is forgotten. The state is one small dict ``{expected next page: width of the window before
it}``. A dict keeps the order of insertion, and a stream that continues is inserted again.

Clients that walk through a block together race for each window: one of them has it placed, the others find its pages
present and fault again somewhere behind it, or inside it. ``follow`` reports such a page. From then on a fault up to
the largest window behind it continues the stream, which is as wide as if this client had placed the pages.

This is on the fault path: no allocation except in the dict, and no call of a Python function.
"""

from __future__ import annotations

from .received_map import MISSING

STREAMS = 8
NOWHERE = -1 << 62
MISSING_BYTE = bytes((MISSING,))


class FaultAround:
    """Windows for the faults of one client on one block.

    ``largest_pages`` may be changed at any time (memory pressure lowers it). ``adaptive=False``: the window is fixed.
    """

    __slots__ = ("_behind", "_expected", "_width", "adaptive", "largest_pages", "used")

    def __init__(self, largest_pages: int, adaptive: bool = True) -> None:
        self.largest_pages = largest_pages
        self.adaptive = adaptive
        self.used = 0
        """Pages beyond the faulting ones in windows that a stream read to the end. The reader resets it."""
        self._expected: dict[int, int] = {}
        self._behind = NOWHERE
        """The first page behind what another client had placed in this client's way, and ``_width`` its window then."""
        self._width = 1

    def window(self, page: int) -> int:
        """Pages to place from ``page`` on, at least 1. The caller clips them to region, block and what is missing."""
        expected = self._expected
        if page in expected:
            width = expected.pop(page)
            self.used += width - 1
            width <<= 1
            if width > self.largest_pages:
                width = self.largest_pages or 1
            expected[page + width] = width
            return width
        if not self.adaptive:
            return self.largest_pages or 1
        width = 1
        if 0 <= page - self._behind < self.largest_pages:
            width = self._width = min(self._width << 1, self.largest_pages)
            self._behind = page + width
        if len(expected) >= STREAMS:
            del expected[next(iter(expected))]
        expected[page + width] = width
        return width

    def expected(self) -> tuple[tuple[int, ...], int]:
        """At which pages streams go on, the least recently continued first; and the page behind what another client
        had placed. A page that is none of them, nor behind that, has a window of one."""
        return tuple(self._expected), self._behind

    def follow(self, page: int, end: int) -> None:
        """A fault found that another client has, or is having, the pages from ``page`` up to ``end`` placed."""
        width = self._expected.pop(page, 0)
        if 0 <= page - self._behind < self.largest_pages:
            width = max(width, self._width)
        elif not width:
            self._expected.setdefault(end, 1)  # its first fault, one at random, or one inside its own window
            if len(self._expected) > STREAMS:
                del self._expected[next(iter(self._expected))]
            return
        self._width = min(max(width << 1, 1), self.largest_pages or 1)
        self._behind = end


def placed_until(page: int, states: bytes) -> int:
    """The end of the run of pages from ``page`` on that are placed, or are being placed. ``states``: a piece of the
    received map from ``page`` on."""
    missing = states.find(MISSING_BYTE)
    return page + (len(states) if missing < 0 else missing)
