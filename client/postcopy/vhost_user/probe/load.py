"""Requests in flight: the rings are kept full, or to a rate, until every request is answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from ...errors import BackEndGone, VhostUserError
from .disturbances import Disturbances
from .plan import Plan, Planned, offer
from .rings import Rings
from .settings import Settings

STALL_SECONDS = 60.0
"""Without an answer for so long, while requests are in flight, the back-end is stuck."""

Place = tuple[int, int]
"""Queue, and slot on its ring."""


class Judge(Protocol):
    """Checks an answered request."""

    def __call__(self, request: Planned) -> None: ...


class Load:
    """One load: ``judge`` gets every answered request. ``done`` lists them, ``latencies`` their times in seconds."""

    def __init__(
        self, settings: Settings, plan: Plan, rings: Rings, judge: Judge, disturbances: Disturbances | None
    ) -> None:
        self.done: list[Planned] = []
        self.latencies: list[float] = []
        self._settings, self._plan, self._rings = settings, plan, rings
        self._judge, self._disturbances = judge, disturbances
        self._waiting: list[list[Planned]] = [[] for _ in rings.rings]
        self._in_flight: dict[Place, Planned] = {}
        self._sent: dict[Place, float] = {}
        self._count = 0

    def drive(self, requests: Sequence[Planned], outstanding: dict[Place, Planned]) -> None:
        """Complete all requests; ``outstanding`` are already on the rings. Raises BackEndGone, VhostUserError."""
        self._begun = self._answered = time.monotonic()
        self._in_flight, self._sent, self._count = (
            dict(outstanding),
            dict.fromkeys(outstanding, self._begun),
            len(outstanding),
        )
        there = {request.number for request in outstanding.values()}
        for request in reversed(requests):
            if request.number not in there:
                self._waiting[request.queue].append(request)
        while self._in_flight or any(self._waiting):
            self._fill()
            self._collect()
            self._check_progress()

    def _fill(self) -> None:
        """Put requests on the rings, as far as slots, rate and time allow."""
        elapsed = time.monotonic() - self._begun
        if self._settings.duration and elapsed > self._settings.duration:
            self._waiting = [[] for _ in self._waiting]
        allowed = elapsed * self._settings.rate if self._settings.rate else float("inf")
        for queue, rest in enumerate(self._waiting):
            for slot in self._rings.free(queue, self._in_flight, self._plan.settings.depth):
                if not rest or self._count > allowed:
                    break
                self._in_flight[queue, slot] = request = rest.pop()
                offer(self._rings.rings[queue], request, slot)
                self._sent[queue, slot] = time.monotonic()
                self._rings.events[queue].notify()
                self._count += 1

    def _collect(self) -> None:
        timeout = self._disturbances.next_step if self._disturbances else 1.0
        if self._settings.rate:
            timeout = min(timeout, 1 / self._settings.rate)
        for place in self._rings.wait(timeout):
            self._answered = time.monotonic()
            request = self._in_flight.pop(place, None)
            if request is None:
                raise VhostUserError("requests", f"ring {place[0]} answered slot {place[1]}, which has no request")
            self.latencies.append(self._answered - self._sent.pop(place))
            self.done.append(request)
            self._judge(request)

    def _check_progress(self) -> None:
        """Disturb if it is time. Raises BackEndGone, VhostUserError when no request is answered."""
        now = time.monotonic()
        if self._disturbances is not None:
            self._disturbances.step(len(self.done), now - self._begun)
        if not self._in_flight:
            self._answered = now
        elif now - self._answered > 1.0 and self._rings.gone:
            raise BackEndGone(f"the back-end ended with {len(self._in_flight)} requests in flight")
        elif now - self._answered > STALL_SECONDS:
            raise VhostUserError("acknowledge", f"no request was answered for {STALL_SECONDS:.0f} s")
