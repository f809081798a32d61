"""Requests for pages of remote blocks: each page once however many threads wait, all of one read in one message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from time import perf_counter_ns

from postcopy_protocol.codec import encode, pack_offsets
from postcopy_protocol.counters import DEDUPLICATED, REQUESTS, bucket
from postcopy_protocol.messages import RequestPages
from postcopy_protocol.stages import ASKED, WOKEN, scratch

OFFSET_BYTES = 8
SAMPLE_MASK = 3
"""Of the requests for one page one in four, the first among them, is timed while it is sent, and counts for four."""


class Requests:
    """What is asked for and not yet answered. ``ask`` belongs to the main thread, ``answered`` to the waker; the two
    meet in a dict whose single operations are atomic. A page is taken out before its waiters are woken, so a
    fault that comes after the wake is asked for again rather than forgotten."""

    def __init__(
        self,
        worker: int,
        words: memoryview,
        send: Callable[[bytes], None],
        stages: Mapping[int, memoryview] | None = None,
    ) -> None:
        self._worker = worker
        self._words = words
        self._send = send
        self._stages = stages if stages is not None else defaultdict(scratch)
        self._asked: dict[tuple[int, int], int] = {}
        self._held: dict[int, list[int]] | None = None
        self._heads: dict[int, bytes] = {}

    def ask(self, block: int, offset: int) -> None:
        """The client waits for the page at ``offset``."""
        key = (block, offset)
        if key in self._asked:
            self._words[DEDUPLICATED] += 1
            return
        self._asked[key] = begun = perf_counter_ns()
        self._words[REQUESTS] = count = self._words[REQUESTS] + 1
        if self._held is None:
            head = self._heads.get(block) or self._head(block)
            self._send(head + offset.to_bytes(OFFSET_BYTES, "little"))
            if count & SAMPLE_MASK == 1:
                self._stages[block][bucket(perf_counter_ns() - begun) + ASKED] += SAMPLE_MASK + 1
        else:
            self._held.setdefault(block, []).append(offset)

    def _head(self, block: int) -> bytes:
        """All of a request for one page but its offset, which stands at the end: somebody waits while it is made."""
        whole = encode(RequestPages(self._worker, block, pack_offsets([0])))
        self._heads[block] = whole[:-OFFSET_BYTES]
        return self._heads[block]

    def hold(self) -> None:
        """Several messages follow: gather."""
        self._held = {}

    def flush(self) -> None:
        """Send what was gathered, one message a block."""
        held, self._held = self._held, None
        for block, offsets in (held or {}).items():
            self._send(encode(RequestPages(self._worker, block, pack_offsets(offsets))))
            now = perf_counter_ns()
            for offset in offsets:
                self._stages[block][bucket(now - self._asked.get((block, offset), now)) + ASKED] += 1

    def answered(self, block: int, offsets: tuple[int, ...]) -> None:
        """The supervisor has spoken; how long each took goes into the histogram."""
        now = perf_counter_ns()
        for offset in offsets:
            begun = self._asked.pop((block, offset), None)
            if begun is not None:
                self._took(block, now - begun)

    def lane(self, block: int, wake: Callable[[int], None]) -> Callable[[int], None]:
        """``answered`` of one page, and then ``wake``: a closure over what never changes."""
        asked, words, stages, clock = self._asked, self._words, self._stages[block], perf_counter_ns

        def placed(offset: int) -> None:
            begun = asked.pop((block, offset), 0)
            if begun:
                word = bucket(clock() - begun)
                words[word] += 1
                stages[word + WOKEN] += 1
            wake(offset)

        return placed

    def _took(self, block: int, taken: int) -> None:
        word = bucket(taken)
        self._words[word] += 1
        self._stages[block][word + WOKEN] += 1

    def forget(self) -> None:
        """Nothing counts as asked for; whoever waits is to be woken, and asks again."""
        self._asked.clear()
