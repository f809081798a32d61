"""Fault-around: how many pages to place for one fault.

A fault costs far more than a page. A sequential reader should cause few faults; a random reader should not get pages
that it never touches. The faults show which it is. A stream is a sequence of faults in which each begins where the
window of the previous one ended. Its window doubles from one page to the largest. A fault that continues no stream is
placed alone.

A client has several threads, and a loop over two arrays is two streams. So eight streams are remembered, and the least
recently continued one is forgotten. The state is one small dict ``{expected next page: width of the window before
it}``. A dict keeps the order of insertion, and a stream that continues is inserted again.

Clients that walk through a block together race for each window: one of them has it placed, the others find its pages
present. So a fault also continues a stream where all pages are placed from the end of its window up to the fault. Where
the faulting page itself is another's, ``follow`` says what to place behind the run that the other places.

This is on the fault path: no allocation except in the dict, and a call of a function only behind a placed page.
"""

from __future__ import annotations

from typing import Any

from .received_map import MISSING

STREAMS = 8
REACH = 4096
"""Pages: so far behind the end of its window a fault continues a stream."""
NEAR = 4  # pages: a run of them is looked at one by one, because that of a fault at random is short
MISSING_BYTE = bytes((MISSING,))


class FaultAround:
    """Windows for faults on one block: of one client, or with ``streams`` of all of them. ``received``: the block's
    received map, if windows are to continue behind pages that others have placed.

    ``largest_pages`` may be changed at any time (memory pressure lowers it). ``adaptive=False``: the window is fixed.
    """

    __slots__ = ("_expected", "_received", "_streams", "adaptive", "largest_pages", "used")

    def __init__(self, largest_pages: int, adaptive: bool = True, received: Any = None, streams: int = STREAMS) -> None:
        self.largest_pages = largest_pages
        self.adaptive = adaptive
        self.used = 0
        """Pages beyond the faulting ones in windows that a stream read to the end. The reader resets it."""
        self._expected: dict[int, int] = {}
        self._received, self._streams = received, streams

    def window(self, page: int) -> int:
        """Pages to place from ``page`` on, at least 1. The caller clips them to region, block and what is missing."""
        expected, received = self._expected, self._received
        width = expected.pop(page, 0)
        if not width and received is not None and page and received[page - 1] != MISSING:
            width = self._continued(page)
        if width:
            self.used += width - 1
            width = min(width << 1, self.largest_pages) or 1
        elif not self.adaptive:
            return self.largest_pages or 1
        else:
            width = 1
            if len(expected) >= self._streams:
                del expected[next(iter(expected))]
        expected[page + width] = width
        return width

    def expected(self) -> tuple[int, ...]:
        """At which pages streams go on, the least recently continued first. A page that is none of them, nor behind
        placed pages from there on, has a window of one."""
        return tuple(self._expected)

    def follow(self, page: int, end: int) -> int:
        """A fault found that another client has, or is having, the pages from ``page`` up to ``end`` placed. Returns
        how many pages to place from ``end`` on, which is the share of this client: 0, if it is no stream, or if that
        is a whole window ahead already."""
        if not self.adaptive:
            return 0
        width = self._take(self._run_before(page), page)
        if not width:  # its first fault, one at random, or one inside its own window
            width = self._take(page, end)
            if not width and len(self._expected) >= self._streams:
                del self._expected[next(iter(self._expected))]
            self._expected[end] = width or 1
            return 0
        width = min(width << 1, self.largest_pages) or 1
        ahead = width if end - page < self.largest_pages else 0
        self._expected[end + ahead] = width
        return ahead

    def extend(self, page: int, end: int) -> int:
        """As ``follow``, where all clients share these windows: the pages up to ``end`` are placed or requested, and
        one more client waits among them. A window of its own is placed behind them, if they are a stream."""
        width = self._take(self._run_before(page), end)
        ahead = min(width << 1, self.largest_pages) if width > 1 else 0
        if width:
            self._expected[end + ahead] = ahead or 1
        return ahead

    def _take(self, first: int, last: int) -> int:
        """The width of a stream that is expected from page ``first`` to ``last``, which is forgotten; 0: none is."""
        for page in min(range(first, last + 1), self._expected, key=len):  # a run at random is short, streams are many
            if first <= page <= last and page in self._expected:
                return self._expected.pop(page)
        return 0

    def _continued(self, page: int) -> int:
        """The width of the stream that a fault behind a placed page continues, which is forgotten; 0: none."""
        for before in range(page - 1, max(-1, page - 1 - NEAR), -1):
            if self._received[before] == MISSING:
                return 0
            if before in self._expected:
                return self._expected.pop(before)
        return self._take(self._run_before(page), page)

    def _run_before(self, page: int) -> int:
        """The first of the pages before ``page`` that are all placed, or are being placed."""
        low = max(0, page - REACH)
        states = b"" if self._received is None else bytes(self._received[low:page])
        return low + states.rfind(MISSING_BYTE) + 1 if states else page


def placed_until(page: int, states: bytes) -> int:
    """The end of the run of pages from ``page`` on that are placed, or are being placed. ``states``: a piece of the
    received map from ``page`` on."""
    missing = states.find(MISSING_BYTE)
    return page + (len(states) if missing < 0 else missing)
