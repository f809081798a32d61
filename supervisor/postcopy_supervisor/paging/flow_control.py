"""Flow control towards one page source: what is sent now, queued, sent again, given up. Pure: the time is an argument.

A request for a range goes through these states:

    queued       no room, or the source is away             --room--> in flight
    in flight    sent                                       --all of it came--> finished
                 neither an answer nor a sign that the source
                 waits itself, for ``patience`` seconds             --> queued (first in its queue), with a new number
                 ... after ``attempts`` times               --> given up: its pages are lost
                 the source is lost                         --> queued, all attempts forgiven
    deferred     its pages came and found no memory         --at ``retry_at``--> queued

Urgent requests (a client waits) are sent at once, up to a bound of requests and bytes in flight. The others wait in a
queue per client; the queues are served in turns, so one client's storm does not starve another client. Background
requests have a bound of their own, and a window that follows the link and is small while urgent requests are frequent
(link_pace.py): on one connection an urgent answer comes behind everything that was requested before it.

A fault on a page inside an outstanding background request waits for that request, unless an urgent request would arrive
``hurry`` seconds earlier (on a slow link four MiB may be ahead of it). Then the page is requested again as urgent and
the later copy is dropped.

Requests of a client that leaves stay: other clients may wait for their pages. No time passes while the source is away.
After a shortage of memory the pause doubles from SHORTEST_PAUSE to LONGEST_PAUSE; until then there is no background."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from postcopy_protocol.templates import FIRST_REQUEST

from .link_pace import LinkPace

PAST = 1024
SHORTEST_PAUSE = 0.01
LONGEST_PAUSE = 1.0  # seconds to wait after pages found no memory
BACKGROUND = -1  # the "client" of background requests


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds. ``requests`` bounds the urgent requests in flight, and also those of the background. ``calm``:
    how long after an urgent request the background window stays small, at least. ``patience`` times ``attempts``
    exceeds a source's own ``--read-timeout`` (30 s by default), so that a read that hangs is reported by the source,
    with its reason, before it is given up here."""

    requests: int = 64
    bytes: int = 8 << 20
    background_busy: int = 1 << 20
    background_calm: int = 4 << 20
    patience: float = 15.0
    attempts: int = 3
    calm: float = 0.05
    hurry: float = 0.01


@dataclass(slots=True)
class RangeRequest:
    """A range that a client (or BACKGROUND) wants from the source. As an effect: send it.

    Last sent at ``sent`` (monotonic seconds) as number ``number``. ``missing``: what has not come since then, as
    (offset, end); None: all of it. ``held``: when the source last said that it waits for these pages itself."""

    client: int
    block: int
    offset: int
    length: int
    sent: float = 0.0
    attempts: int = 0
    number: int = 0
    missing: list[tuple[int, int]] | None = None
    held: float = -1e9

    @property
    def urgent(self) -> bool:
        return self.client != BACKGROUND

    @property
    def end(self) -> int:
        return self.offset + self.length

    def covers(self, block: int, offset: int) -> bool:
        return self.block == block and self.offset <= offset < self.end


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Effect: no answer after all attempts; these bytes are lost."""

    request: RangeRequest


Effect = RangeRequest | GiveUp


@dataclass(slots=True)
class FlowControl:
    """All requests towards one source."""

    limits: Limits = field(default_factory=Limits)
    up: bool = False
    outstanding: dict[int, RangeRequest] = field(default_factory=dict)  # in flight, by number; the oldest first
    queues: defaultdict[int, deque[RangeRequest]] = field(default_factory=lambda: defaultdict(deque))
    """By client, in the order of their turns."""
    deferred: deque[RangeRequest] = field(default_factory=deque)
    held: bool = False
    """While held nothing is sent: there is no memory for what would come."""
    filling: bool = False
    """Pages are still coming to the source itself: how long a background request takes says nothing of the link."""
    retry_at: float = -1e9
    _pause: float = 0.0
    bytes_in_flight: int = 0
    _background_bytes: int = 0
    background_in_flight: int = 0
    next_number: int = FIRST_REQUEST
    urgent_at: float = -1e9  # when the last urgent request was sent
    _background_pace: float = 0.0
    urgent_pace: float = 0.0  # seconds that the last urgent request took; above, the last background request
    finished: deque[tuple[RangeRequest, float]] = field(default_factory=lambda: deque(maxlen=PAST))
    """The last that left ``outstanding``, and when their answer came (0.0: never), for ``status --story``."""
    pace: LinkPace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = LinkPace(self.limits.background_calm)

    def request(self, client: int, block: int, offset: int, length: int, now: float) -> list[Effect]:
        """A client, or BACKGROUND, wants a range."""
        request = self.send(client, block, offset, length, now)
        if request is not None:
            return [request]
        self.queues[client].append(RangeRequest(client, block, offset, length))
        return self._fill(now)

    def send(self, client: int, block: int, offset: int, length: int, now: float) -> RangeRequest | None:
        """The common case of ``request``: urgent, room and no queue. Returns what the caller must send. None: it is not
        the common case, and nothing has changed."""
        if client == BACKGROUND or not self._may_send_at_once:
            return None
        request = RangeRequest(client, block, offset, length)
        self._start(request, now)
        return request

    def promote(self, client: int, block: int, offset: int, length: int, now: float) -> list[Effect]:
        """A client waits for a page that is requested already: request it again, as urgent, if only a background
        request brings it, and not soon."""
        covering = [request for request in self.outstanding.values() if request.covers(block, offset)]
        unsent = (request for request in self._unsent() if request.covers(block, offset))
        if not self.up or any(request.urgent for request in (*covering, *unsent)):
            return []
        oldest = next((request.sent for request in self.outstanding.values() if request.client == BACKGROUND), now)
        pace = max(self._background_pace, now - oldest)
        if not self.filling and covering and covering[0].sent + pace - now < self.urgent_pace + self.limits.hurry:
            return []
        return self.request(client, block, offset, length, now)

    def completed(self, request: RangeRequest, now: float) -> Sequence[Effect]:
        """All of a request in flight has come at once; returns what to send now."""
        del self.outstanding[request.number]
        if request.urgent:
            self.urgent_pace = now - request.sent
        else:
            took, alone = now - request.sent, self.background_in_flight == 1 and not self.filling
            if not self.filling:
                self._background_pace = took
            self.pace.came(request.length, alone, took, self.busy(now), now)
        self._stop(request, now)
        return self._fill(now) if self.queues else ()

    def answered(
        self, number: int, block: int, ranges: Sequence[tuple[int, int]], now: float
    ) -> tuple[Sequence[Effect], float]:
        """``ranges`` (offset, length) have come for a request. Returns what to send now and the seconds it took, if it
        is complete; else nothing and 0.0, also for an unknown number."""
        request = self.outstanding.get(number)
        if request is None or request.block != block:
            return (), 0.0
        if len(ranges) != 1 or ranges[0] != (request.offset, request.length):  # not all of it at once
            missing = request.missing or [(request.offset, request.end)]
            for offset, length in ranges:
                missing = _less(missing, offset, offset + length)
            if missing:
                request.missing = missing
                return (), 0.0
        return self.completed(request, now), now - request.sent

    def source_waits(self, number: int, block: int, now: float) -> None:
        """The source waits for the pages of this request itself: it is not late."""
        request = self.outstanding.get(number)
        if request is not None and request.block == block:
            request.held, request.attempts = now, 1

    def defer(self, wanted: Sequence[RangeRequest], now: float) -> None:
        """Pages have come and found no memory. ``wanted``, which no open request brings, is requested again at
        ``retry_at``, by ``tick``."""
        if now >= self.retry_at:  # else it belongs to the same shortage
            self._pause = min(LONGEST_PAUSE, 2 * self._pause) if self.short_of_memory(now) else SHORTEST_PAUSE
            self.retry_at = now + self._pause
        self.deferred += wanted

    def lost_source(self) -> None:
        """Nothing can be sent; all open requests will be sent again."""
        self.up, self.pace = False, LinkPace(self.limits.background_calm)
        for request in reversed(self.outstanding.values()):  # the oldest becomes the first of its queue
            self._stop(request)
            self.queues[request.client].appendleft(request)
        self.outstanding.clear()
        for request in chain.from_iterable(self.queues.values()):
            request.attempts = 0

    def found_source(self, now: float) -> list[Effect]:
        """The source is there, for the first time or again."""
        self.up = True
        return self._fill(now)

    def hold(self, held: bool, now: float) -> list[Effect]:
        """Begin or end to hold everything back."""
        self.held = held
        return self._fill(now)

    def tick(self, now: float) -> list[Effect]:
        """Send again what was not answered in time; give up what never is."""
        if not self.up:
            return []
        while self.deferred and now >= self.retry_at:
            request = self.deferred.popleft()
            self.queues[request.client].append(request)
        effects: list[Effect] = []
        late = [
            request
            for request in self.outstanding.values()
            if now - request.sent >= self.limits.patience and now - request.held >= self.limits.patience
        ]
        for request in reversed(late):
            del self.outstanding[request.number]
            self._stop(request)
            if request.attempts >= self.limits.attempts:
                effects.append(GiveUp(request))
            else:
                self.queues[request.client].appendleft(request)
        return effects + self._fill(now)

    @property
    def in_flight(self) -> int:
        return len(self.outstanding)

    @property
    def waiting(self) -> int:
        """Requests that are queued or deferred."""
        return sum(map(len, self.queues.values())) + len(self.deferred)

    def find_open(self, block: int, offset: int) -> tuple[RangeRequest, bool] | None:
        """The request that brings the bytes at ``offset``, and whether it is in flight."""
        found = (one for one in (*self.outstanding.values(), *self._unsent()) if one.covers(block, offset))
        return next(((request, request.number in self.outstanding) for request in found), None)

    def not_requested(self, block: int, offset: int, end: int) -> list[tuple[int, int]]:
        """Parts (offset, end) of a range that no open request brings."""
        left = [(offset, end)]
        for request in (*self.outstanding.values(), *self._unsent()):
            if request.block == block:
                for low, high in request.missing or [(request.offset, request.end)]:
                    left = _less(left, low, high)
        return left

    def short_of_memory(self, now: float) -> bool:
        """Did pages find no memory a moment ago?"""
        return now < self.retry_at + LONGEST_PAUSE

    def busy(self, now: float) -> bool:
        """Was an urgent request sent a moment ago?"""
        return self.pace.busy(now - self.urgent_at, self.limits.calm, now)

    def piece(self, now: float) -> int:
        """Bytes of the next background request."""
        return self.pace.piece(self.busy(now))

    def probe(self, now: float) -> bool:
        """Is a Ping to be sent now, before anything else, to measure the link?"""
        return self.up and self.pace.probe(self._background_bytes, now)

    def pong(self, now: float) -> None:
        """The answer to that Ping."""
        self.pace.pong(self.busy(now), now)

    def room_for_background(self, now: float) -> int:
        """Bytes of background that may be requested now; 0 while urgent requests are queued or memory is short, and
        between two pieces on a slow link."""
        urgent = any(queue for client, queue in self.queues.items() if client != BACKGROUND)
        if urgent or self.held or not self.up or self.deferred or now < self.retry_at:
            return 0
        queued = sum(request.length for request in self.queues.get(BACKGROUND, ()))
        return self.pace.room(self._background_bytes + queued, self.limits.background_busy, self.busy(now), now)

    def check(self) -> None:
        """Assert the invariants (tests call it after every event)."""
        in_flight = list(self.outstanding.values())
        background = [request for request in in_flight if not request.urgent]
        assert self.bytes_in_flight == sum(request.length for request in in_flight)
        assert self._background_bytes == sum(request.length for request in background)
        assert self.up or not in_flight
        assert len(background) == self.background_in_flight <= self.limits.requests
        assert len(in_flight) - self.background_in_flight <= self.limits.requests
        assert all(request.missing is None or request.missing for request in in_flight)
        assert not any(self.outstanding.get(request.number) is request for request in self.deferred)
        assert not self.up or self._next() is None, "a request is queued though there is room"
        largest = max((request.length for request in in_flight), default=0)
        assert self.bytes_in_flight - self._background_bytes <= self.limits.bytes + largest

    def _unsent(self) -> Iterator[RangeRequest]:
        """Queued and deferred requests."""
        return chain(chain.from_iterable(self.queues.values()), self.deferred)

    def _start(self, request: RangeRequest, now: float) -> None:
        """In flight from now on."""
        request.sent, request.attempts = now, request.attempts + 1
        request.missing = None
        self.bytes_in_flight += request.length
        if request.urgent:
            self.urgent_at = now
        else:
            self._background_bytes += request.length
            self.background_in_flight += 1
        request.number, self.next_number = self.next_number, self.next_number + 1
        self.outstanding[request.number] = request

    def _stop(self, request: RangeRequest, came: float = 0.0) -> None:
        """Not in flight any more."""
        self.finished.append((request, came))
        self.bytes_in_flight -= request.length
        if not request.urgent:
            self._background_bytes -= request.length
            self.background_in_flight -= 1

    def _fill(self, now: float) -> list[Effect]:
        """Send from the queues while there is room."""
        effects: list[Effect] = []
        while self.up and self.queues and (request := self._next()) is not None:
            self._start(request, now)
            effects.append(request)
        return effects

    @property
    def _room_for_urgent(self) -> bool:
        return (
            not self.held
            and len(self.outstanding) - self.background_in_flight < self.limits.requests
            and self.bytes_in_flight - self._background_bytes < self.limits.bytes
        )

    @property
    def _may_send_at_once(self) -> bool:
        """An urgent request would overtake no other, and there is room."""
        return self.up and len(self.queues) == (BACKGROUND in self.queues) and self._room_for_urgent

    def _next(self) -> RangeRequest | None:
        """Take the next request from the queues: clients in turns, background last. None: no room, or none is
        queued."""
        for client, queue in self.queues.items():
            if client == BACKGROUND or not queue:
                continue
            if not self._room_for_urgent:
                return None
            del self.queues[client]
            request = queue.popleft()
            if queue:
                self.queues[client] = queue  # behind the others: its next turn comes after theirs
            return request
        background = self.queues.get(BACKGROUND)
        room = not self.held and self.background_in_flight < self.limits.requests
        return background.popleft() if background and room else None


def _less(ranges: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges (offset, end) without those from ``start`` to ``stop``."""
    return [
        (low, high)
        for offset, end in ranges
        for low, high in ((offset, min(end, start)), (max(offset, stop), end))
        if low < high
    ]
