"""The pace of the background on one link: how much of it is in flight, and in pieces of what size. Pure: the time is an
argument.

An urgent answer comes behind everything that was requested before it and is still on the link. So what is in flight is
bounded in seconds of the link, not in bytes. A Ping measures them: its Pong takes the way that an urgent answer would
take. Reads that are slow at the source do not delay it, so they do not make the window smaller.

    calm   no client waits or has waited lately   a window, such that a Pong is ``target`` later than on the empty link
    busy   otherwise, on a link of FAST or more   the small window of ``Limits``, or BUSY_WINDOW seconds
           otherwise, on a slower link            one piece of BUSY_PIECE seconds, then a pause: a quarter of the link

The window follows FAST TCP: times (empty + target) / measured, from Pong to Pong; it doubles until the first Pong is
late. What the empty link takes is the quickest Pong of the last two periods of PERIOD seconds. A stream that never ends
would hide it behind its own queue. So at the end of a period nothing is requested until the link is empty; then a Ping
goes first. A source answers it before it sends what is requested behind it.

A piece now and then does not show the rate: a link that rests carries the first bytes at once (token buckets do). So
each period begins with a calibration, for which clients count as calm: some 20 ms of the whole window."""

from __future__ import annotations

from dataclasses import dataclass

TARGET = 0.006  # seconds that the background may delay an urgent answer that comes out of the blue
TARGET_SHARE = 0.25  # ... or this share of what it takes over the empty link, where that is longer
BUSY_PIECE = 0.0015  # seconds of the link that one piece takes while clients wait
BUSY_REST = 3  # pause behind a piece while clients wait, in times of that piece
BUSY_WINDOW = 0.001
FAST = 256e6  # bytes a second: a piece of 256 KiB takes a millisecond
START_WINDOW = 256 << 10
SMALLEST_WINDOW, SMALLEST_PIECE = 64 << 10, 16 << 10
BUSY_LARGEST, CALM_LARGEST = 256 << 10, 1 << 20
"""Bytes of the largest pieces. The cost of a request is paid once for 1 MiB and not four times; both sizes are what a
source sends in one message (its answering.py)."""
PERIOD = 5.0
FIRST_CALIBRATION, CALIBRATION = 0.1, 0.02  # seconds, beside some times of the empty link
PROBE_SECONDS, FIRST_PROBE_SECONDS = 0.02, 0.002  # between two Pings while the background streams; while it starts
PROBE_PATIENCE = 1.0  # seconds after which a Pong is lost: a source that is congested drops it
LONGEST_BUSY = 1.0
NEVER = -1e9


@dataclass(slots=True)
class LinkPace:
    """``largest``: bytes of the largest window. ``window``: bytes in flight while clients are calm. ``rate``: bytes a
    second that the link carries; 0.0: not known. ``empty``: seconds that a Pong takes over the empty link."""

    largest: int
    window: float = START_WINDOW
    rate: float = 0.0
    empty: float = 0.0
    resume_at: float = NEVER
    """End of the pause behind a piece, while clients wait."""
    _bytes_came: int = 0
    _quickest: float = 0.0  # Pong of this period; 0.0: none
    _period_ends: float = NEVER
    _calibrating_until: float = NEVER
    _draining: bool = False
    _starting: bool = True
    _limited: bool = False  # was the window in the way since the last Pong?
    _delayed: float = 0.0  # how much later than over the empty link the last Pong came
    _delayed_before: float = 0.0  # and the one before
    _probe_sent: float = 0.0  # of the Ping whose Pong is awaited; 0.0: none
    _ponged_at: float = NEVER
    _came_before: int = 0  # ``_bytes_came`` at the last Pong

    def __post_init__(self) -> None:
        self.window = min(self.window, self.largest)

    @property
    def slow(self) -> bool:
        """Would the small window of ``Limits`` be felt by a client that waits?"""
        return self.rate < FAST

    @property
    def target(self) -> float:
        """How much later a Pong may come. On a long link more: there the machines at its ends, which are busy while
        they stream, delay it as well, and a window too small by that fills only a part of the link."""
        return max(TARGET, TARGET_SHARE * self.empty)

    def busy(self, since_urgent: float, shortest: float, now: float) -> bool:
        """Do clients count as waiting, so many seconds after the last urgent request? The more the next one would meet,
        the longer they do; never less than ``shortest`` seconds."""
        if since_urgent >= LONGEST_BUSY or now < self._calibrating_until:
            return False
        return since_urgent < (max(shortest, 50 * BUSY_LARGEST / self.rate) if self.rate else LONGEST_BUSY)

    def piece(self, busy: bool) -> int:
        """Bytes of the next request."""
        if not busy:
            return _piece(min(self.window / 4, self.rate * self.target or START_WINDOW), CALM_LARGEST)
        return _piece(self.rate * BUSY_PIECE, BUSY_LARGEST) if self.slow else BUSY_LARGEST

    def room(self, in_flight: int, busy_window: int, busy: bool, now: float) -> int:
        """Bytes that may be requested beside ``in_flight`` bytes of background."""
        if self._draining and in_flight:
            return 0
        if not busy:
            room = int(self.window) - in_flight
            self._limited = self._limited or room < self.piece(busy)
            return max(0, room)
        if not self.slow:
            return max(0, min(busy_window, max(2 * BUSY_LARGEST, int(self.rate * BUSY_WINDOW))) - in_flight)
        return 0 if in_flight or now < self.resume_at else busy_window

    def came(self, length: int, alone: bool, took: float, busy: bool, now: float) -> None:
        """A request of ``length`` bytes took so long; ``alone``: nothing else of the background is in flight."""
        self._bytes_came += length
        if busy and alone and self.slow:
            self._learn(min(length / max(took - self.empty, 1e-6), self.rate or FAST))
            self.resume_at = now + (BUSY_REST * length / self.rate if self.rate else 0.0)

    def probe(self, in_flight: int, now: float) -> bool:
        """Is a Ping to be sent now, before anything else is requested? It counts as sent."""
        if self._probe_sent and now - self._probe_sent < PROBE_PATIENCE:
            return False
        if now >= self._period_ends:
            self._draining = in_flight > 0
            if self._draining:
                return False
        elif not in_flight or now - self._ponged_at < (
            FIRST_PROBE_SECONDS if self._starting or now < self._calibrating_until else PROBE_SECONDS
        ):
            return False
        self._probe_sent = now
        return True

    def pong(self, busy: bool, now: float) -> None:
        """The answer to the Ping that ``probe`` granted."""
        sent, self._probe_sent = self._probe_sent, 0.0
        took = now - sent
        if sent >= self._period_ends:  # it met an empty link
            seconds, times = (CALIBRATION, 2) if self._quickest else (FIRST_CALIBRATION, 8)
            self.empty, self._quickest, self._period_ends = min(took, self._quickest or took), took, now + PERIOD
            self._calibrating_until = now + seconds + times * self.empty
        self._quickest, self.empty = min(took, self._quickest), min(took, self.empty)
        # One late Pong, or two, may be the fault of a busy processor, three are a queue.
        late = min(took - self.empty, self._delayed, self._delayed_before)
        self._delayed_before, self._delayed = self._delayed, took - self.empty
        self._measure_rate(late, busy, now)
        if not busy:
            if self._starting and self._delayed > self.target / 2:
                self._starting, self._calibrating_until = False, now
            self._follow(late)
        self._limited = False

    def _measure_rate(self, late: float, busy: bool, now: float) -> None:
        seconds, came = now - self._ponged_at, self._bytes_came - self._came_before
        self._ponged_at, self._came_before = now, self._bytes_came
        if (busy and self.slow) or seconds > 4 * (PROBE_SECONDS + self.empty + self.target):
            return
        if late > self.target / 4:  # the link was never idle
            self._learn(came / seconds)
        else:
            self.rate = max(self.rate, came / seconds)

    def _follow(self, late: float) -> None:
        if self._starting:
            factor = 2.0
        elif late < self.target / 2:  # on a long link the formula below would need seconds
            factor = 1.25
        else:
            factor = min(1.25, (1.0 + (self.empty + self.target) / (self.empty + late)) / 2)
        if factor < 1.0 or self._limited:
            self.window = min(float(self.largest), max(SMALLEST_WINDOW, self.window * factor))

    def _learn(self, rate: float) -> None:
        self.rate += (rate - self.rate) / 4 if self.rate else rate


def _piece(most: float, largest: int) -> int:
    """The power of two that is at most ``most``, within the bounds."""
    return min(largest, max(SMALLEST_PIECE, 1 << max(0, int(most).bit_length() - 1)))
