"""Bans: which users the kernel is to keep from the attach socket for a while, because they connect without end.

Each connection has a place in the socket's backlog until it is accepted and refused. One program can connect as fast as
we can refuse, so it could keep the backlog full, and others would wait. A user who is banned does not get that far."""

from __future__ import annotations

from dataclasses import dataclass, field

REFUSED_PER_SECOND, MOST_REFUSED = 50.0, 256
"""Refused connections of one user that are no reason for a ban. 256 may come at once."""
FIRST_SECONDS, LONGEST_SECONDS = 1.0, 64.0
"""A ban is twice as long as the last one, if that has ended less than its own length ago."""


@dataclass(slots=True)
class Record:
    """One user. ``left``: refused connections until a ban; ``until``: the end of the last ban."""

    left: float
    at: float
    until: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class Bans:
    """``most``: users who may be banned at once. ``changed``: other users than before, until ``taken``."""

    most: int
    changed: bool = False
    _records: dict[int, Record] = field(default_factory=dict)

    def refused(self, uid: int, now: float) -> float:
        """A connection was refused. Returns for how long its user is banned from now on; 0: it is not, or is
        already."""
        record = self._record(uid, now)
        if record is None:
            return 0.0
        record.left = min(MOST_REFUSED, record.left + (now - record.at) * REFUSED_PER_SECOND) - 1
        record.at = now
        if record.left > 0 or now < record.until:
            return 0.0
        again = now < record.until + record.seconds
        record.seconds = min(LONGEST_SECONDS, 2 * record.seconds) if again else FIRST_SECONDS
        record.until, record.left = now + record.seconds, MOST_REFUSED
        self.changed = True
        return record.seconds

    def keep_out(self, uid: int, until: float, now: float) -> bool:
        """Ban a user until then, whatever it does. True: it was not banned."""
        record = self._record(uid, now)
        if record is None:
            return False
        news = now >= record.until
        self.changed |= news
        record.until, record.at = max(record.until, until), now
        return news

    def _record(self, uid: int, now: float) -> Record | None:
        """None: there are ``most`` already."""
        if uid not in self._records and len(self._records) >= self.most:
            self.check(now)
        if uid not in self._records and len(self._records) >= self.most:
            return None
        return self._records.setdefault(uid, Record(MOST_REFUSED, now))

    def check(self, now: float) -> None:
        """Notice bans that have ended, and forget users who have been quiet since."""
        for uid, record in list(self._records.items()):
            if record.until and record.at < record.until <= now:
                record.at = record.until  # noticed once
                self.changed = True
            if now > record.until + record.seconds and now > record.at + MOST_REFUSED / REFUSED_PER_SECOND:
                del self._records[uid]

    def take(self, now: float) -> list[int]:
        """The users who are banned now."""
        self.changed = False
        return [uid for uid, record in self._records.items() if now < record.until]
