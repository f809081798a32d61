"""Flow control towards one page source: what is sent now, what waits, what is sent again. Pure; the time comes in.

Urgent before background: ranges that somebody waits for are sent at once, up to a bound of requests and bytes in
flight, and what does not fit waits in a queue *per client*, served in turns, so that one client's storm does not
starve another. Background pieces have a bound of requests of their own, and go only into a window that is small while
anything urgent is under way: on one connection an urgent answer stands behind whatever was asked before it.

The wishes of a client that leaves stay: the engine counts them as asked for, and others may wait for the same pages.

Somebody may come to wait for a page that is on its way already, in a piece of the background. Where pieces take long
(a slow link: four MiB may be ahead of it) the page is asked for once more, as urgent; what comes second is not placed.

A request that is not answered in ``patience`` seconds is sent again under a new number; after ``attempts`` its pages
are lost. While the source is away nothing is sent and no time passes; when it is back everything open is sent anew.

What has come and finds no memory is wished for again after a pause, which grows while that lasts; until then nothing is
asked in the background.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from postcopy_protocol.templates import FIRST_REQUEST

PAST = 1024
SHORTEST_PAUSE = 0.01
LONGEST_PAUSE = 1.0
"""Seconds, after pages found no memory: doubled from one to the other as long as there is none."""
BACKGROUND = -1
"""The "client" of pieces that nobody waits for yet."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds; ``requests`` urgent ones in flight, and as many of the background. ``calm`` is for how long
    after an urgent request the window of the background stays small. ``patience`` times ``attempts`` is longer than a
    source's own ``--read-timeout`` (30 by default): a read that hangs is told as lost by the source, with its reason,
    before we give it up without one."""

    requests: int = 64
    bytes: int = 8 << 20
    background_busy: int = 1 << 20
    background_calm: int = 4 << 20
    patience: float = 15.0
    attempts: int = 3
    calm: float = 0.05
    hurry: float = 0.01
    """A page is asked for again when that should bring it so much sooner than its piece of the background does."""


@dataclass(frozen=True, slots=True)
class Send:
    """Ask the source for ``length`` bytes of a block from ``offset``."""

    request: int
    block: int
    offset: int
    length: int
    urgent: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No answer after all attempts: these bytes are lost."""

    block: int
    offset: int
    length: int


Effect = Send | GiveUp


@dataclass(slots=True)
class RangeRequest:
    """A range on its way: asked for ``attempts`` times, last at ``sent`` (monotonic seconds) under the number
    ``request``. ``missing``: what has not come of it since then, as (offset, end); None: all of it."""

    client: int
    block: int
    offset: int
    length: int
    sent: float = 0.0
    attempts: int = 0
    request: int = 0
    missing: list[tuple[int, int]] | None = None

    def covers(self, block: int, offset: int) -> bool:
        return self.block == block and self.offset <= offset < self.offset + self.length


@dataclass(slots=True)
class FlowControl:
    """All wishes towards one source."""

    limits: Limits = field(default_factory=Limits)
    up: bool = False
    outstanding: dict[int, RangeRequest] = field(default_factory=dict)
    """Wishes in flight, by number."""
    queues: dict[int, deque[RangeRequest]] = field(default_factory=dict)
    deferred: list[RangeRequest] = field(default_factory=list)
    """Wishes that have come and found no memory, until ``again_at``."""
    again_at: float = -1e9
    _pause: float = 0.0
    bytes_in_flight: int = 0
    _background: int = 0
    pieces: int = 0
    """Of the background, in flight."""
    next_request: int = FIRST_REQUEST
    urgent_at: float = -1e9
    _pace: float = 0.0
    """Seconds that the last piece of the background took."""
    urgent_pace: float = 0.0
    """... and the last urgent wish."""
    past: deque[tuple[RangeRequest, float]] = field(default_factory=lambda: deque(maxlen=PAST))
    """The last wishes that have landed, and when their answer came (0.0: it did not). One append a request: it is
    what ``status --story`` knows of a page's way here."""

    # --- events -------------------------------------------------------------------------------------------------------

    def wish(self, client: int, block: int, offset: int, length: int, now: float) -> list[Effect]:
        """A range is wanted by a client, or by nobody yet (BACKGROUND)."""
        wish = self.launch(client, block, offset, length, now)
        if wish is not None:
            return [Send(wish.request, block, offset, length, True)]
        self.queues.setdefault(client, deque()).append(RangeRequest(client, block, offset, length))
        return self._pump(now)

    def launch(self, client: int, block: int, offset: int, length: int, now: float) -> RangeRequest | None:
        """Somebody waits for a range, there is room for it and no queue, which is the rule: to be sent at once. Else
        None, and nothing has changed."""
        if client == BACKGROUND or not self._free:
            return None
        wish = RangeRequest(client, block, offset, length)
        self._fly(wish, now)
        return wish

    def promote(self, client: int, block: int, offset: int, length: int, now: float) -> list[Effect]:
        """A client has come to wait for a page that is wished for already: again, as urgent, if only the background
        brings it, and not soon."""
        covering = [wish for wish in self.outstanding.values() if wish.covers(block, offset)]
        if not self.up or any(wish.client != BACKGROUND for wish in (*covering, *self._waiting_for(block, offset))):
            return []
        oldest = next((wish.sent for wish in self.outstanding.values() if wish.client == BACKGROUND), now)
        pace = max(self._pace, now - oldest)
        if covering and covering[0].sent + pace - now < self.urgent_pace + self.limits.hurry:
            return []
        return self.wish(client, block, offset, length, now)

    def landed(self, wish: RangeRequest, now: float) -> Sequence[Effect]:
        """All of a wish in flight has come at once: what may be sent now."""
        del self.outstanding[wish.request]
        if wish.client == BACKGROUND:
            self._pace = now - wish.sent
        else:
            self.urgent_pace = now - wish.sent
        self._landed(wish, now)
        return self._pump(now) if self.queues else ()

    def answered(
        self, request: int, block: int, ranges: Sequence[tuple[int, int]], now: float
    ) -> tuple[list[Effect], float]:
        """``ranges`` (offset, length) have come in answer to a request. When that was the rest of it: what may be sent
        now, and how many seconds it took (0.0 before that, and for a request that nobody remembers)."""
        wish = self.outstanding.get(request)
        if wish is None or wish.block != block:
            return [], 0.0
        if len(ranges) != 1 or ranges[0] != (wish.offset, wish.length):  # else all at once, which is the rule
            missing = wish.missing or [(wish.offset, wish.offset + wish.length)]
            for offset, length in ranges:
                missing = _less(missing, offset, offset + length)
            if missing:
                wish.missing = missing
                return [], 0.0
        return list(self.landed(wish, now)), now - wish.sent

    def defer(self, wanted: Sequence[tuple[int, int, int, int]], now: float) -> None:
        """There was no memory for what has come. These ranges (client, block, offset, length) of it, which no open wish
        brings, are wished for again at ``again_at``, by ``tick``."""
        if now >= self.again_at:  # before that it is the same moment's
            self._pause = min(LONGEST_PAUSE, 2 * self._pause) if self.short(now) else SHORTEST_PAUSE
            self.again_at = now + self._pause
        self.deferred += [RangeRequest(*want) for want in wanted]

    def lost_source(self) -> None:
        """Nothing can be sent; everything open will be sent anew."""
        self.up = False
        for wish in reversed(self.outstanding.values()):  # the oldest will be first in its queue
            self._landed(wish)
            self.queues.setdefault(wish.client, deque()).appendleft(wish)
        self.outstanding.clear()
        for queue in self.queues.values():
            for wish in queue:
                wish.attempts = 0

    def found_source(self, now: float) -> list[Effect]:
        """It is there (again)."""
        self.up = True
        return self._pump(now)

    def tick(self, now: float) -> list[Effect]:
        """Send again what was not answered in time, give up what never is."""
        effects: list[Effect] = []
        if not self.up:
            return effects
        if now >= self.again_at:
            for wish in self.deferred:
                self.queues.setdefault(wish.client, deque()).append(wish)
            self.deferred.clear()
        for request, wish in reversed(list(self.outstanding.items())):
            if now - wish.sent < self.limits.patience:
                continue
            del self.outstanding[request]
            self._landed(wish)
            if wish.attempts >= self.limits.attempts:
                effects.append(GiveUp(wish.block, wish.offset, wish.length))
            else:
                self.queues.setdefault(wish.client, deque()).appendleft(wish)
        return effects + self._pump(now)

    # --- figures ------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self.outstanding)

    @property
    def streaming(self) -> bool:
        """Is any background piece in flight?"""
        return self.pieces > 0

    @property
    def waiting(self) -> int:
        """Wishes not sent yet, or to be sent again."""
        return sum(map(len, self.queues.values())) + len(self.deferred)

    def open_wish(self, block: int, offset: int) -> tuple[RangeRequest, bool] | None:
        """The wish that brings the bytes at ``offset``, and whether it is sent."""
        outstanding = (wish for wish in self.outstanding.values() if wish.covers(block, offset))
        for sent, wishes in ((True, outstanding), (False, self._waiting_for(block, offset))):
            for wish in wishes:
                return wish, sent
        return None

    def unwished(self, block: int, offset: int, end: int) -> list[tuple[int, int]]:
        """Parts (offset, end) of a range that no open wish brings."""
        left = [(offset, end)]
        for wish in (*self.outstanding.values(), *self.deferred, *chain.from_iterable(self.queues.values())):
            if wish.block == block:
                for low, high in wish.missing or [(wish.offset, wish.offset + wish.length)]:
                    left = _less(left, low, high)
        return left

    def short(self, now: float) -> bool:
        """Was there no memory for what came, a moment ago?"""
        return now < self.again_at + LONGEST_PAUSE

    def busy(self, now: float) -> bool:
        """Has somebody been waiting a moment ago?"""
        return now - self.urgent_at < self.limits.calm

    def room_for_background(self, now: float) -> int:
        """Bytes of background that may be wished for now; 0 while urgent wishes wait, or all do for memory."""
        if not self.up or self.deferred or now < self.again_at:
            return 0
        if any(queue for client, queue in self.queues.items() if client != BACKGROUND):
            return 0
        window = self.limits.background_busy if self.busy(now) else self.limits.background_calm
        waiting = sum(wish.length for wish in self.queues.get(BACKGROUND, ()))
        return max(0, window - self._background - waiting)

    def check(self) -> None:
        """Assert the invariants (tests call it after every event)."""
        assert self.bytes_in_flight == sum(wish.length for wish in self.outstanding.values())
        background = sum(wish.length for wish in self.outstanding.values() if wish.client == BACKGROUND)
        assert self._background == background
        assert self.up or not self.outstanding
        pieces = [wish for wish in self.outstanding.values() if wish.client == BACKGROUND]
        assert len(pieces) == self.pieces <= self.limits.requests
        assert len(self.outstanding) - self.pieces <= self.limits.requests
        assert all(wish.missing is None or wish.missing for wish in self.outstanding.values())
        assert not any(self.outstanding.get(wish.request) is wish for wish in self.deferred)
        assert not self.up or self._take() is None, "something waits though there is room"
        urgent = self.bytes_in_flight - background
        largest = max((wish.length for wish in self.outstanding.values()), default=0)
        assert urgent <= self.limits.bytes + largest

    def _waiting_for(self, block: int, offset: int) -> Iterator[RangeRequest]:
        """Wishes for these bytes that are not sent."""
        waiting = chain(chain.from_iterable(self.queues.values()), self.deferred)
        return (wish for wish in waiting if wish.covers(block, offset))

    # --- the law ------------------------------------------------------------------------------------------------------

    def _landed(self, wish: RangeRequest, came: float = 0.0) -> None:
        self.past.append((wish, came))
        self.bytes_in_flight -= wish.length
        if wish.client == BACKGROUND:
            self._background -= wish.length
            self.pieces -= 1

    def _pump(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self.up and self.queues and (wish := self._take()) is not None:
            self._fly(wish, now)
            effects.append(Send(wish.request, wish.block, wish.offset, wish.length, wish.client != BACKGROUND))
        return effects

    @property
    def _free(self) -> bool:
        """May an urgent wish be sent at once, overtaking nobody?"""
        return (
            self.up
            and len(self.queues) == (BACKGROUND in self.queues)
            and len(self.outstanding) - self.pieces < self.limits.requests
            and self.bytes_in_flight - self._background < self.limits.bytes
        )

    def _fly(self, wish: RangeRequest, now: float) -> None:
        wish.sent, wish.attempts = now, wish.attempts + 1
        wish.missing = None
        self.bytes_in_flight += wish.length
        if wish.client != BACKGROUND:
            self.urgent_at = now
        else:
            self._background += wish.length
            self.pieces += 1
        wish.request, self.next_request = self.next_request, self.next_request + 1
        self.outstanding[wish.request] = wish

    def _take(self) -> RangeRequest | None:
        """The next wish: clients in turns, background last; None when there is no room or nothing waits."""
        urgent, size = len(self.outstanding) - self.pieces, self.bytes_in_flight - self._background
        for client, queue in self.queues.items():
            if client == BACKGROUND or not queue:
                continue
            if urgent >= self.limits.requests or size >= self.limits.bytes:
                return None
            del self.queues[client]
            wish = queue.popleft()
            if queue:
                self.queues[client] = queue  # behind the others: its next turn comes after theirs
            return wish
        pieces = self.queues.get(BACKGROUND)
        return pieces.popleft() if pieces and self.pieces < self.limits.requests else None


def _less(ranges: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges (offset, end) without those from ``start`` to ``stop``."""
    return [
        (low, high)
        for offset, end in ranges
        for low, high in ((offset, min(end, start)), (max(offset, stop), end))
        if low < high
    ]
