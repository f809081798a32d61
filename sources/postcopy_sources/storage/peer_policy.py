"""Which host is asked for a chunk: the nearest that is well and has room. Pure: the time is an argument.

    well       it answers; it has room while its window is not full (pace.py), so load spreads to the next host
    away       it was late, failed, or gave other bytes: not asked for a pause that doubles with each such time,
               from FIRST_PAUSE to LONGEST_PAUSE. Then one request at a time tries it, until one is answered
    store      asked when no host has room or the chunk. While the store fails, hosts without room are asked too

One chunk is asked of each host at most once. A host that does not have it answers so at once: that is no failure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from .pace import Pace

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
WRONG_COUNTS = 5
"""Wrong bytes count as so many failures: such a host costs a fetch and a digest each time."""


class Outcome(Enum):
    SERVED = "served"
    ABSENT = "absent"
    LATE = "late"
    FAILED = "failed"
    WRONG = "wrong"


@dataclass(slots=True)
class Peer:
    """``up``: there is a connection, and it offers the block. ``failures`` in a row; ``served`` counts chunks."""

    pace: Pace = field(default_factory=Pace)
    up: bool = False
    failures: int = 0
    away_until: float = -1e9
    served: int = 0

    def well(self, now: float) -> bool:
        """May it be asked?"""
        return self.up and now >= self.away_until and not (self.failures and self.pace.in_flight)


class PeerPolicy:
    """The hosts by number, the nearest first."""

    def __init__(self, count: int) -> None:
        self.peers = [Peer() for _ in range(count)]

    def choose(self, tried: Collection[int], store_ready: bool, now: float) -> int | None:
        """Whom to ask for a chunk that those of ``tried`` did not give; None: the store."""
        well = [number for number, peer in enumerate(self.peers) if number not in tried and peer.well(now)]
        for number in well:
            if self.peers[number].pace.room:
                return number
        if store_ready or not well:
            return None
        return min(well, key=lambda number: self.peers[number].pace.in_flight / self.peers[number].pace.window)

    def sent(self, number: int) -> float:
        """It is asked; returns the seconds after which it is late."""
        pace = self.peers[number].pace
        pace.sent()
        return pace.patience

    def ended(self, number: int, outcome: Outcome, took: float, now: float) -> None:
        """What came of it, after ``took`` seconds."""
        peer = self.peers[number]
        peer.pace.ended()
        if outcome in (Outcome.SERVED, Outcome.ABSENT):
            peer.failures = 0
            if outcome is Outcome.SERVED:
                peer.served += 1
                peer.pace.answered(took, now)
            return
        if now < peer.away_until:  # it was asked before it was away: the same failure
            return
        peer.pace.failed()
        peer.failures = min(peer.failures + (WRONG_COUNTS if outcome is Outcome.WRONG else 1), 16)
        peer.away_until = now + min(FIRST_PAUSE * 2 ** (peer.failures - 1), LONGEST_PAUSE)
