"""How many lines of one kind and one peer go into the log: pure, the caller gives the time.

A peer can cause any number of lines. So the first few of a kind and peer are written, the others are counted, and the
count is written when their time is over."""

from __future__ import annotations

from dataclasses import dataclass

BURST, SECONDS = 10, 10.0  # lines of one kind and peer in this time
KIND_BURST = 100  # lines of one kind in this time, whatever the peers are
MOST_KEYS = 512

Key = tuple[str, str]
"""A kind of line, and the peer that caused it (empty: any)."""


@dataclass(slots=True)
class Window:
    """The lines of one key since ``begun``."""

    begun: float
    written: int = 0
    left_out: int = 0


class LogLimit:
    """
    >>> limit = LogLimit(burst=1)
    >>> [limit.admits("refused", "uid 7", at) for at in (0.0, 1.0, 2.0)]
    [True, False, False]
    >>> limit.over(10.5)
    [(('refused', 'uid 7'), 2)]
    """

    def __init__(self, burst: int = BURST, kind_burst: int = KIND_BURST, seconds: float = SECONDS) -> None:
        self._burst, self._kind_burst, self._seconds = burst, kind_burst, seconds
        self._windows: dict[Key, Window] = {}  # used last: last
        self._missing = 0

    @property
    def counting(self) -> bool:
        """Has a line been left out that ``over`` has not returned yet?"""
        return self._missing > 0

    def admits(self, kind: str, peer: str, now: float) -> bool:
        """May this line be written? If not, it is counted."""
        ours, theirs = self._window((kind, ""), now), None
        full = ours if ours.written >= self._kind_burst else None
        if peer and full is None:
            theirs = self._window((kind, peer), now)
            full = theirs if theirs.written >= self._burst else None
        if full is not None:
            full.left_out += 1
            self._missing += 1
            return False
        ours.written += 1
        if theirs is not None:
            theirs.written += 1
        return True

    def over(self, now: float) -> list[tuple[Key, int]]:
        """The counts whose time is over, each once."""
        ended = {key: one for key, one in self._windows.items() if now - one.begun >= self._seconds}
        found = [(key, window.left_out) for key, window in ended.items() if window.left_out]
        for key in ended:
            del self._windows[key]
        self._missing -= sum(count for _, count in found)
        return found

    def forget(self) -> None:
        """Begin again."""
        self._windows.clear()
        self._missing = 0

    def _window(self, key: Key, now: float) -> Window:
        """The window of a key. One that is over is kept as long as its count was not returned."""
        window = self._windows.pop(key, None)
        if window is not None and now - window.begun < self._seconds:
            self._windows[key] = window  # the last to be forgotten
            return window
        left_out = window.left_out if window is not None else 0
        if len(self._windows) >= MOST_KEYS:
            self._missing -= self._windows.pop(next(iter(self._windows))).left_out
        made = self._windows[key] = Window(now, 0, left_out)
        return made
