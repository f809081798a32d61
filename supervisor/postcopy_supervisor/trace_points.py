"""Trace points: ``serve --trace request,wake`` logs what passes them, one line each, in the fields of an event.

    loop     the main loop begins and ends                quit     the supervisor is asked to end
    core     a fault of the supervisor's own mapping      foreign  any other event: clients, custodian, pidfds, ticks
    request  a client waits for a page: block and offset  place    the supervisor places pages
    wake     a worker has to wake its client, or a page is lost

They cost nothing when off: the traced parts are subclasses, used only with ``--trace``. Then every remote page takes
the slow path instead of the fast one. What a worker places from a file or a handler does not pass the supervisor;
``serve --record`` shows that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from postcopy_protocol.codec import decode, unpack_offsets
from postcopy_protocol.messages import Lost, Wake

from .blocks import RamBlock
from .event_log import field
from .events import ClientMessage, CoreFaults, CustodianMessage, ListenerEvent, StopRequested
from .main_loop import MainLoop, Ports
from .paging.paging import RemotePaging
from .paging.placer import Placer
from .paging.ports import WorkerSender

log = logging.getLogger("postcopy.trace")

ON_FAULTS = frozenset({"request", "place", "wake"})  # points that the fast paths do not pass


def trace(point: str, **fields: int | str) -> None:
    """Log one line: ``trace.POINT key=value ...``."""
    log.info("trace.%s %s", point, " ".join(f"{key}={field(value)}" for key, value in fields.items()))


class TracedSender:
    """Sends to workers; the wakers' way to them."""

    def __init__(self, sender: WorkerSender, blocks: Mapping[int, RamBlock]) -> None:
        self._sender, self._blocks = sender, blocks

    def send(self, worker: int, data: bytes) -> None:
        message = decode(data, expect=(Wake, Lost))
        assert isinstance(message, Wake | Lost)
        block = self._blocks.get(message.block)
        for offset in unpack_offsets(message.offsets):
            page = "lost" if isinstance(message, Lost) else "present"
            trace("wake", worker=worker, block=block.name if block else "-", offset=offset, page=page)
        self._sender.send(worker, data)


class TracedPlacer(Placer):
    """Logs every range that is placed."""

    def place(self, block: RamBlock, first: int, end: int, source: int) -> int:
        trace("place", block=block.name, offset=first * block.page_size, length=(end - first) * block.page_size)
        return super().place(block, first, end, source)


class SlowPaging(RemotePaging):
    """Has no fast paths, which pass no trace point."""

    def learn(self, data: bytes, waiter: int, block: RamBlock) -> None:
        pass


class TracedPaging(SlowPaging):
    """Logs every page that a client waits for."""

    def fault(self, waiter: int, block: RamBlock, pages: Sequence[int], window: int = 0) -> None:
        for page in pages:
            trace("request", client=waiter, block=block.name, offset=page * block.page_size)
        super().fault(waiter, block, pages, window)


class TracedMainLoop(MainLoop):
    """Logs its begin and end, and events."""

    def __init__(self, points: frozenset[str]) -> None:
        self._points = points

    def start(self, ports: Ports) -> None:
        super().start(ports)
        if self._points & ON_FAULTS:
            self._source_fast_paths = dict.fromkeys(ports.sources.fast_paths, _never_expected)

    def run(self) -> None:
        if "loop" not in self._points:
            return super().run()
        trace("loop", at="entry")
        try:
            super().run()
        finally:
            trace("loop", at="exit")

    def on_event(self, event: ListenerEvent) -> None:
        point = "core" if isinstance(event, CoreFaults) else "quit" if isinstance(event, StopRequested) else "foreign"
        if point in self._points:
            fields: dict[str, int | str] = {"descriptor": type(event).__name__}
            if isinstance(event, CoreFaults):
                fields["events"] = len(event.events)
            elif isinstance(event, ClientMessage | CustodianMessage) and event.message is not None:
                fields["message"] = type(event.message).__name__
            trace(point, **fields)
        super().on_event(event)


def _never_expected(head: bytes, buffer: memoryview) -> bool | None:
    """A fast path that takes no answer."""
    return None
