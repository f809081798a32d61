"""The background stream: missing pages are requested before a client waits for them, local and remote blocks in turns.

One token bucket bounds all of it: ``--background-rate`` holds for the whole supervisor, not per kind of block. Urgent
requests go first; flow_control.py says how much room they leave on a link."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED

from ..blocks import RamBlock
from .engine import Ask, Effect, Engine
from .link_pace import BUSY_LARGEST, CALM_LARGEST
from .source_link import SourceLink

PIECE = BUSY_LARGEST  # bytes of one request where a rate is given; else the link decides (link_pace.py)
LOCAL_WINDOW = 4 << 20
"""Bytes of local blocks that worker zero is asked for at a time: more would delay an urgent page behind them."""
LOCAL_REQUESTS = 4  # ... but so many requests, however large their pages are
SHORTEST_WAIT = 0.005  # seconds between two ticks for the background alone

TO_PLACE = bytes((MISSING,)), bytes((PLACING,))
"""States of pages to request, in this order. PLACING at rest: its writer was killed before its COPY."""
HERE = bytes((RECEIVED, LOST))


class TokenBucket:
    """Bytes that may be requested, ``rate`` of them a second; negative: no limit. Pure; the time is an argument.

    A request larger than the bucket is granted when the bucket is full and leaves a debt, so the mean rate holds.

    >>> bucket = TokenBucket(1000, smallest=100, now=0.0)
    >>> bucket.wait(100, now=0.1), bucket.wait(250, now=0.1)
    (0.0, 0.15)
    """

    def __init__(self, rate: int, smallest: int, now: float) -> None:
        self.rate = rate
        self._size = float(max(smallest, rate // 4))
        self._tokens = 0.0
        self._filled = now

    def wait(self, amount: int, now: float) -> float:
        """Seconds until ``amount`` bytes may be taken; 0.0: now."""
        if self.rate < 0:
            return 0.0
        self._tokens = min(self._tokens + (now - self._filled) * self.rate, self._size)
        self._filled = now
        return max(0.0, (min(amount, self._size) - self._tokens) / self.rate)

    def take(self, amount: int) -> None:
        """Take bytes, which ``wait`` has granted."""
        self._tokens -= amount


class Requester(Protocol):
    """Carries out what the engine decides."""

    def do(self, effects: list[Effect]) -> None: ...


class Background:
    """The stream of all blocks. ``links``: of remote blocks, by number; ``rate`` in bytes a second. 0: no stream;
    negative: remote blocks as fast as their links allow, and local blocks not at all."""

    def __init__(
        self,
        engine: Engine,
        blocks: dict[int, RamBlock],
        links: dict[int, SourceLink],
        rate: int,
        now: float,
        requester: Requester,
    ) -> None:
        self.cursor = dict.fromkeys(blocks, 0)
        """By block: where to go on. Faults set it too, because the pages behind a fault are the most likely next."""
        self.rate = rate
        self._bucket = TokenBucket(rate, PIECE, now)
        self._engine, self._links = engine, links
        self._turns = deque(blocks.values())
        self._due, self._requester = now, requester

    def stream(self, left: int, now: float) -> float | None:
        """Request what the rate, the links and ``left`` bytes of memory allow. Returns when to call again, or None: at
        the next tick or arrival."""
        rate, turns, idle = self.rate, self._turns, 0
        if not rate:
            return None
        if now < self._due:
            return self._due
        for link in {id(link): link for link in self._links.values()}.values():
            link.probe(now)
        # Turns are shares of the rate only where the pieces of all blocks are equally large.
        largest = min([PIECE, *(link.flow.piece(now) for link in self._links.values())])
        while idle < len(turns):
            block = turns[0]
            piece = self._next_piece(block, left, now, largest if rate > 0 else CALM_LARGEST)
            if piece is None:
                idle += 1
            else:
                states = block.received[piece.first : piece.end]
                length = len(states.translate(None, HERE)) * block.page_size
                wait = self._bucket.wait(length, now)
                if wait:  # it stays this block's turn: the others do not take what it saves for
                    self._due = now + max(SHORTEST_WAIT, wait)
                    return self._due
                self._bucket.take(length)
                left, idle = left - length, 0
                self.cursor[block.number] = piece.end
                self._requester.do(self._engine.ask(piece.block, piece.first, piece.end))
            turns.rotate(-1)
        # The answers of worker zero, unlike those of a source, do not call this; nor does the end of a pause.
        due = [link.flow.pace.resume_at for link in self._links.values() if link.flow.pace.resume_at > now]
        if rate > 0 and self._local_requests():
            due.append(now + max(SHORTEST_WAIT, PIECE / rate))
        return min(due, default=None)

    def _next_piece(self, block: RamBlock, left: int, now: float, largest: int) -> Ask | None:
        """What to request next of a block: missing pages behind the cursor, around the end once. None: nothing now."""
        link, limited = self._links.get(block.number), self.rate > 0
        if link is not None:
            largest = min(largest, link.flow.piece(now))
            room = link.flow.room_for_background(now)
        elif not limited or block.complete:
            return None
        else:
            room = largest * (max(LOCAL_REQUESTS, LOCAL_WINDOW // largest) - self._local_requests())
        # Not into every gap: a small piece would come back as a small gap, and soon all pieces would be small.
        if min(left, room) < largest:
            return None
        received, pages, cursor = block.received, max(1, largest // block.page_size), self.cursor[block.number]
        for state in TO_PLACE:
            for low, high in ((cursor, block.pages), (0, cursor)):
                first = received.find(state, low, high)
                while first >= 0:
                    states = received[first : min(high, first + pages)]
                    # A source sends all that is requested; worker zero skips what is received.
                    run = len(states) - len(states.lstrip(state))
                    part = states[:run] if link is not None else states.rstrip(HERE)
                    gap = self._engine.first_gap(block.number, first, first + len(part))
                    if gap is not None:
                        return Ask(block.number, *gap)
                    first = received.find(state, first + len(part), high)
        return None

    def _local_requests(self) -> int:
        """Requests that worker zero has not answered."""
        locals_ = (block.number for block in self._turns if block.number not in self._links)
        return sum(len(self._engine.ranges(number).starts) for number in locals_)
