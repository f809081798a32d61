"""Trace points: ``serve --trace request,wake`` logs what passes them, one line each, in the fields of an event.

    loop     the main loop begins and ends                quit     the supervisor is asked to end
    core     a fault of the supervisor's own mapping      foreign  any other event: clients, custodian, pidfds, ticks
    request  a client waits for a page: block and offset  place    the supervisor places pages
    wake     a worker has to wake its client, or a page is lost

They cost nothing when off: the traced parts are subclasses, used only with ``--trace``. Then every remote page takes
the slow path instead of the fast one. What a worker places from a file or a handler does not pass the supervisor;
``serve --record`` shows that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from postcopy_protocol.codec import decode, unpack_offsets
from postcopy_protocol.messages import Lost, Wake

from ..blocks import RamBlock
from ..events import ClientMessage, CoreFaults, CustodianMessage, ListenerEvent, StopRequested
from .event_log import field

log = logging.getLogger("postcopy.trace")


def trace(point: str, **fields: int | str) -> None:
    """Log one line: ``trace.POINT key=value ...``."""
    log.info("trace.%s %s", point, " ".join(f"{key}={field(value)}" for key, value in fields.items()))


class TracePoints:
    """The points that are asked for."""

    def __init__(self, points: frozenset[str], blocks: Mapping[int, RamBlock]) -> None:
        self._points = points
        self._blocks = blocks

    @property
    def on_faults(self) -> bool:
        """Is a point asked for that the fast path does not pass?"""
        return bool(self._points & {"request", "place", "wake"})

    def loop(self, at: str) -> None:
        if "loop" in self._points:
            trace("loop", at=at)

    def event(self, event: ListenerEvent) -> None:
        point = "core" if isinstance(event, CoreFaults) else "quit" if isinstance(event, StopRequested) else "foreign"
        if point not in self._points:
            return
        fields: dict[str, int | str] = {"descriptor": type(event).__name__}
        if isinstance(event, CoreFaults):
            fields["events"] = len(event.events)
        elif isinstance(event, ClientMessage | CustodianMessage) and event.message is not None:
            fields["message"] = type(event.message).__name__
        trace(point, **fields)

    def request(self, waiter: int, block: RamBlock, pages: Sequence[int]) -> None:
        if "request" in self._points:
            for page in pages:
                trace("request", client=waiter, block=block.name, offset=page * block.page_size)

    def place(self, block: RamBlock, first: int, end: int) -> None:
        if "place" in self._points:
            trace("place", block=block.name, offset=first * block.page_size, length=(end - first) * block.page_size)

    def wake(self, worker: int, data: bytes) -> None:
        message = decode(data)
        if "wake" in self._points and isinstance(message, Wake | Lost):
            block = self._blocks.get(message.block)
            for offset in unpack_offsets(message.offsets):
                lost = "lost" if isinstance(message, Lost) else "present"
                trace("wake", worker=worker, block=block.name if block else "-", offset=offset, page=lost)
