"""All rings of a probe, with the requests on them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

from ..back_end import BackEnd
from ..virtqueue import Ring, RingEvents, start_ring
from .plan import PAGE, SLOT, Plan, Planned

BLOCK = "guest"


class Rings:
    """The rings of all queues, with their eventfds."""

    def __init__(self, back_end: BackEnd, plan: Plan, memory: memoryview) -> None:
        self._back_end, self._plan = back_end, plan
        queues = range(plan.settings.queues)
        self.rings: list[Ring] = [plan.ring(queue, memory) for queue in queues]
        self.events = [RingEvents() for _ in queues]
        self.prepared: dict[tuple[int, int], Planned] = {}
        self._poll = select.poll()
        for events in self.events:
            self._poll.register(events.call, select.POLLIN)

    def start(self) -> None:
        """Start the rings with the requests that are already on them."""
        for queue, (ring, events) in enumerate(zip(self.rings, self.events, strict=True)):
            start_ring(self._back_end, queue, ring, events)
            first = self._plan.first(queue)
            ring.next_available = len(first)
            for slot, request in enumerate(first):
                self.prepared[queue, slot] = request
        for events in self.events:
            events.notify()

    def free(self, queue: int, outstanding: dict[tuple[int, int], Planned], depth: int) -> Iterator[int]:
        """The free slots of a queue."""
        return (slot for slot in range(depth) if (queue, slot) not in outstanding)

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """(queue, slot) of completed requests; empty after ``seconds``."""
        found = self._collect()
        if not found:
            for fd, _ in self._poll.poll(seconds * 1000):
                os.eventfd_read(fd)
            found = self._collect()
        return found

    def _collect(self) -> list[tuple[int, int]]:
        return [
            (queue, first // SLOT)
            for queue, ring in enumerate(self.rings)
            if self._started(queue)
            for first, _ in ring.completed()
        ]

    def _started(self, queue: int) -> bool:
        """Whether its used page is present: before that, reading it would be a fault of the probe itself."""
        return bool(self._back_end.blocks[BLOCK].mark(self._plan.ring_offsets(queue)[2] // PAGE))

    @property
    def gone(self) -> bool:
        """Whether the back-end has hung up."""
        return self._back_end.gone

    def close(self) -> None:
        for events in self.events:
            events.close()
