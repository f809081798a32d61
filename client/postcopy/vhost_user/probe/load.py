"""Requests in flight: the rings are kept full, or to a rate, until every request is answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ...errors import BackEndGone, VhostUserError
from .plan import Plan, Planned, offer
from .rings import Rings
from .settings import Settings
from .trouble import Trouble

STALL_SECONDS = 60.0
"""With requests in flight and none answered: the back-end is stuck."""

Place = tuple[int, int]
"""Queue, and slot on its ring."""


class Load:
    """One load. ``judge`` is called with every answered request; ``done`` are those, ``latencies`` (seconds) theirs."""

    def __init__(
        self, settings: Settings, plan: Plan, rings: Rings, judge: Callable[[Planned], None], trouble: Trouble | None
    ) -> None:
        self.done: list[Planned] = []
        self.latencies: list[float] = []
        self._settings, self._plan, self._rings, self._judge, self._trouble = settings, plan, rings, judge, trouble
        self._waiting: list[list[Planned]] = [[] for _ in rings.rings]
        self._flying: dict[Place, Planned] = {}
        self._sent: dict[Place, float] = {}
        self._count = 0

    def drive(self, requests: Sequence[Planned], outstanding: dict[Place, Planned]) -> None:
        """All of them; ``outstanding`` are on the rings already. Raises BackEndGone, VhostUserError (no answers)."""
        self._begun = self._answered = time.monotonic()
        self._flying, self._sent, self._count = (
            dict(outstanding),
            dict.fromkeys(outstanding, self._begun),
            len(outstanding),
        )
        there = {request.number for request in outstanding.values()}
        for request in reversed(requests):
            if request.number not in there:
                self._waiting[request.queue].append(request)
        while self._flying or any(self._waiting):
            self._fill()
            self._collect()
            self._look()

    def _fill(self) -> None:
        """Put on the rings what has room there, as the rate and the time allow."""
        elapsed = time.monotonic() - self._begun
        if self._settings.duration and elapsed > self._settings.duration:
            self._waiting = [[] for _ in self._waiting]
        allowed = elapsed * self._settings.rate if self._settings.rate else float("inf")
        for queue, rest in enumerate(self._waiting):
            for slot in self._rings.free(queue, self._flying, self._plan.wishes.depth):
                if not rest or self._count > allowed:
                    break
                self._flying[queue, slot] = request = rest.pop()
                offer(self._rings.rings[queue], request, slot)
                self._sent[queue, slot] = time.monotonic()
                self._rings.bells[queue].ring()
                self._count += 1

    def _collect(self) -> None:
        patience = self._trouble.next_look if self._trouble else 1.0
        if self._settings.rate:
            patience = min(patience, 1 / self._settings.rate)
        for place in self._rings.wait(patience):
            self._answered = time.monotonic()
            request = self._flying.pop(place, None)
            if request is None:
                raise VhostUserError("requests", f"ring {place[0]} has an answer to slot {place[1]}, where nothing is")
            self.latencies.append(self._answered - self._sent.pop(place))
            self.done.append(request)
            self._judge(request)

    def _look(self) -> None:
        """After trouble, and whether anybody is there who answers."""
        now = time.monotonic()
        if self._trouble is not None:
            self._trouble.look(len(self.done), now - self._begun)
        if not self._flying:
            self._answered = now
        elif now - self._answered > 1.0 and self._rings.gone:
            raise BackEndGone(f"the back-end went away with {len(self._flying)} requests in flight")
        elif now - self._answered > STALL_SECONDS:
            raise VhostUserError("acknowledge", f"no request was answered for {STALL_SECONDS:.0f} s")


def summary(latencies: list[float]) -> dict[str, float]:
    """Microseconds."""
    if not latencies:
        return {}
    ordered = sorted(latencies)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1e6, 1) for name, part in at.items()}
