"""All rings of a probe, with the requests that are on them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

from ..back_end import BackEnd
from ..rings import Bells, Ring, start_ring
from .plan import PAGE, SLOT, Plan, Planned

BLOCK = "guest"


class Rings:
    """The rings of all queues, with their bells."""

    def __init__(self, back_end: BackEnd, plan: Plan, memory: memoryview) -> None:
        self._back_end, self._plan = back_end, plan
        queues = range(plan.wishes.queues)
        self.rings: list[Ring] = [plan.ring(queue, memory) for queue in queues]
        self.bells = [Bells() for _ in queues]
        self.prepared: dict[tuple[int, int], Planned] = {}
        self._poll = select.poll()
        self._queues = {bells.call: queue for queue, bells in enumerate(self.bells)}
        for bells in self.bells:
            self._poll.register(bells.call, select.POLLIN)

    def start(self) -> None:
        """With the requests that are on them already."""
        for queue, (ring, bells) in enumerate(zip(self.rings, self.bells, strict=True)):
            start_ring(self._back_end, queue, ring, bells)
            first = self._plan.first(queue)
            ring.next_available = len(first)
            for slot, request in enumerate(first):
                self.prepared[queue, slot] = request
        for bells in self.bells:
            bells.ring()

    def free(self, queue: int, outstanding: dict[tuple[int, int], Planned], depth: int) -> Iterator[int]:
        """Slots of a queue that may be used now."""
        return (slot for slot in range(depth) if (queue, slot) not in outstanding)

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """(queue, slot) of requests that were answered, or nothing when the time is over."""
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
        """Its used page is there: before that a look would be our own fault, and not the back-end's."""
        return bool(self._back_end.blocks[BLOCK].mark(self._plan.ring_offsets(queue)[2] // PAGE))

    @property
    def gone(self) -> bool:
        """Has the back-end hung up?"""
        return self._back_end.gone

    def close(self) -> None:
        for bells in self.bells:
            bells.close()
