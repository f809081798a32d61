"""How much is in flight to one server: a window that follows the measured rate and delay. Pure: time is an argument.

What comes later waits behind what is in flight. So the window is such that an answer begins TARGET seconds later than
from an idle server: rate x (delay + TARGET), as in FAST TCP, from answer to answer. On a slow link that is one request,
to a distant store with a fast link many.

What the idle server takes is the quickest answer of the last two periods of PERIOD seconds. Our own queue would hide
it, so each period begins with half a window."""

from __future__ import annotations

from dataclasses import dataclass

TARGET = 0.05
PERIOD = 10.0
FIRST_WINDOW, LARGEST_WINDOW = 4.0, 64.0
SHORTEST_PATIENCE, LONGEST_PATIENCE = 0.25, 2.0


@dataclass(slots=True)
class Pace:
    """``window``: requests that may be in flight. ``delay``, ``deviation``: seconds until answers begin, smoothed."""

    window: float = FIRST_WINDOW
    in_flight: int = 0
    delay: float = 0.0
    deviation: float = 0.0
    _quickest: float = 0.0  # answer of this period, and of the one before; 0.0: none
    _quickest_before: float = 0.0
    _period_ends: float = -1e9
    _limited: bool = False  # was the window in the way since the last answer?

    @property
    def room(self) -> int:
        """Requests that may be sent now."""
        return max(0, int(self.window) - self.in_flight)

    @property
    def patience(self) -> float:
        """Seconds after which an answer is late, for a client that can ask another server."""
        if not self.delay:
            return LONGEST_PATIENCE
        return min(max(self.delay + 4 * self.deviation + TARGET, SHORTEST_PATIENCE), LONGEST_PATIENCE)

    def sent(self) -> None:
        """One more request is in flight."""
        self.in_flight += 1
        self._limited = self._limited or not self.room

    def answered(self, waited: float, now: float) -> None:
        """An answer begins ``waited`` seconds after its request."""
        waited = max(waited, 1e-6)
        if now >= self._period_ends:
            if self._quickest:
                self.window = max(1.0, self.window / 2)
            self._period_ends, self._quickest_before, self._quickest = now + PERIOD, self._quickest, waited
        self._quickest = min(self._quickest, waited)
        self.deviation += (abs(waited - self.delay) - self.deviation) / 4 if self.delay else waited / 2
        self.delay += (waited - self.delay) / 8 if self.delay else waited
        idle = min(self._quickest, self._quickest_before or self._quickest)
        goal = min(self.window * (idle + TARGET) / waited, 2 * self.window)
        if goal < self.window or self._limited:
            self.window = min(max(self.window + (goal - self.window) / self.window, 1.0), LARGEST_WINDOW)
        self._limited = not self.room

    def ended(self) -> None:
        """A request is no longer in flight."""
        self.in_flight -= 1

    def failed(self) -> None:
        """A request was late or failed."""
        self.window = max(1.0, self.window / 2)
