"""Fault-around: how many pages to place for one fault.

A fault costs far more than a page. A sequential reader should cause few faults; a random reader should not get pages
that it never touches. The faults show which it is. A stream is a sequence of faults in which each begins exactly where
the window of the previous one ended. Its window doubles from one page to the largest. A fault that continues no stream
is placed alone.

A client has several threads, and a loop over two arrays is two streams. So eight streams are remembered, and the least
recently continued one is forgotten. The state is one small dict ``{expected next page: width of the window before
it}``. A dict keeps the order of insertion, and a stream that continues is inserted again.

This is on the fault path: no allocation except in the dict, and no call of a Python function.
"""

from __future__ import annotations

STREAMS = 8


class FaultAround:
    """Windows for the faults of one client on one block.

    ``largest_pages`` may be changed at any time (memory pressure lowers it). ``adaptive=False``: the window is fixed.
    """

    __slots__ = ("_expected", "adaptive", "largest_pages", "used")

    def __init__(self, largest_pages: int, adaptive: bool = True) -> None:
        self.largest_pages = largest_pages
        self.adaptive = adaptive
        self.used = 0
        """Pages beyond the faulting ones in windows that a stream read to the end. The reader resets it."""
        self._expected: dict[int, int] = {}

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
        if len(expected) >= STREAMS:
            del expected[next(iter(expected))]
        expected[page + 1] = 1
        return 1
