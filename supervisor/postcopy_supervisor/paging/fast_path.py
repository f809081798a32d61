"""The fast path: the common fault of a remote block, one page that one client waits for, in few steps of Python.

Everything else takes the full path (``RemotePaging.fault`` and ``arrived``, ``SourceLink.on_message``), and so does a
fault that turns out on the way not to be common. The order is the same on both: PLACING, UFFDIO_COPY, RECEIVED, and
only then a message to the workers that wait.

A fast path is one flat closure over what never changes for it. It inlines ``Engine.wait`` and ``answered``,
``FlowControl.send`` and ``completed``, and ``SourceLink.request`` and ``completed``. Between two faults the processor
has run other processes, so each function and object that a fault passes costs several times what it costs in a loop,
and all of them together cost as much as ZeroMQ. The invariants are those of the inlined methods; tests check them after
each fault."""

from __future__ import annotations

import fcntl
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from postcopy_kernel import crashpoints
from postcopy_kernel.memory import address_of
from postcopy_kernel.userfaultfd import UFFDIO_COPY
from postcopy_protocol.codec import pack_offsets
from postcopy_protocol.counters import bucket
from postcopy_protocol.messages import Wake
from postcopy_protocol.received_map import LOST, PLACING, RECEIVED
from postcopy_protocol.return_path import RangeKind
from postcopy_protocol.stages import ARRIVED, PLACED
from postcopy_protocol.templates import NUMBER_BYTES, OFFSET_BYTES, REQUEST_LIMIT, template_of

from ..blocks import RamBlock
from .engine import Engine
from .flow_control import BACKGROUND, RangeRequest
from .placer import Placer
from .source_link import Arrived, LinkState, SourceLink
from .wakers import Wakers

SAMPLE_MASK = 3  # of the pages that come one in four is timed while it is placed, and counts for four


WorkerFastPath = Callable[[bytes], None]
"""Takes a RequestPages of one page whose head is the one that this fast path was made for."""
SourceFastPath = Callable[[bytes, memoryview], bool | None]
"""Takes a head and the one frame behind it. None: it is not an expected answer, and nothing was done. Otherwise its
pages are placed; True when more may be requested in the background."""
Window = Callable[[int], int]  # fault-around of one block (``FaultAround.window``)
Ioctl = Callable[[int, int, bytearray], object]  # ``fcntl.ioctl``
Place = Callable[[RangeRequest, memoryview], bool]
AddressOf = Callable[[memoryview], int]  # address of a buffer's first byte


class Paging(Protocol):
    """The full path and its parts (``RemotePaging``)."""

    engine: Engine
    placer: Placer
    wakers: Wakers
    cursor: dict[int, int]

    @property
    def following(self) -> Mapping[tuple[int, int], object]: ...

    def fault(self, waiter: int, block: RamBlock, pages: Sequence[int], window: int = 0) -> None: ...

    def arrived(self, arrived: Arrived, addresses: Sequence[int]) -> None: ...

    def catch_up(self, block: int, first: int, end: int) -> None: ...


def worker_fast_path(paging: Paging, waiter: int, block: RamBlock, link: SourceLink, window: Window) -> WorkerFastPath:
    """For each RequestPages of one worker for one page of one remote block, from ``MainLoop.on_message``. Sends
    RequestRanges: ``send`` is ``Router.send``, usually ``NativeRouter.send``."""
    received, number, length, size = block.received, block.number, block.length, block.page_size
    shift, width, clock = size.bit_length() - 1, size.to_bytes(OFFSET_BYTES, "little"), time.monotonic
    engine, cursor, full_path, up = paging.engine, paging.cursor, paging.fault, LinkState.UP
    flow, templates, answers, send = link.flow, link.templates, link.answers, link.send
    waiting, ranges, outstanding, queues = engine.waiting, engine.ranges(number), flow.outstanding, flow.queues
    starts, ends, most, most_bytes = ranges.starts, ranges.ends, flow.limits.requests, flow.limits.bytes

    def on_request(data: bytes) -> None:
        offset = int.from_bytes(data[-OFFSET_BYTES:], "little")
        if offset >= length:
            return
        page = offset >> shift
        if received[page] > PLACING or link.state is not up or page << shift != offset:
            return full_path(waiter, block, (page,))
        key, at, request = (number, page), bisect_right(starts, page), flow.next_number
        if key in waiting or (at and page < ends[starts[at - 1]]):  # it has a waiter, or is requested, already
            return full_path(waiter, block, (page,))
        pages = window(page)
        if (
            pages > 1
            or queues  # others come first
            or len(outstanding) >= most
            or flow.bytes_in_flight >= most_bytes
            or request >= REQUEST_LIMIT
        ):
            return full_path(waiter, block, (page,), pages)
        waiting[key] = {waiter}
        starts.insert(at, page)
        cursor[number] = ends[page] = page + 1
        engine.requests += 1
        link.requests += 1
        now = clock()
        flow.next_number = request + 1
        flow.bytes_in_flight += size
        flow.urgent_at = now
        name, span = request.to_bytes(NUMBER_BYTES, "big"), data[-OFFSET_BYTES:] + width
        before, behind, answer, between, end = templates[number].urgent
        outstanding[request] = answers[answer + name + between + span + end] = RangeRequest(
            waiter, number, offset, size, now, 1, request
        )
        send(before + name + behind + span)

    return on_request


def source_fast_path(
    paging: Paging,
    link: SourceLink,
    blocks: list[RamBlock],
    ioctl: Ioctl = fcntl.ioctl,
    address: AddressOf = address_of,
) -> SourceFastPath:
    """For the Pages of one source, from ``MainLoop.on_source_message``; ``_placing.place`` does the rest. ``ioctl`` and
    ``address`` are others on a simulated kernel."""
    ioctl = crashpoints.around("page.arrived", ioctl, "page.placed")
    place = {block.number: _placing(paging, link, block, ioctl, address) for block in blocks}
    answers, outstanding = link.answers, link.flow.outstanding

    def on_answer(head: bytes, buffer: memoryview) -> bool | None:
        request = answers.pop(head, None)
        # Sent again under another number, or the source was lost: the pages are good, but not this request's.
        if request is None or request.length != len(buffer) or outstanding.get(request.number) is not request:
            return None
        return place[request.block](request, buffer)

    return on_answer


def _full_path(paging: Paging, link: SourceLink, request: RangeRequest, now: float, source: int) -> bool:
    link.completed(request, now)  # first: pages that find no memory are requested again
    ranges = ((request.offset, request.length, RangeKind.DATA, 0),)
    paging.arrived(Arrived(request.block, ranges, ""), (source,))
    return request.client == BACKGROUND or not link.flow.background_in_flight


def _argument(size: int) -> tuple[bytearray, memoryview]:
    """Of UFFDIO_COPY: destination, source, length, mode, result; and its fields."""
    argument = bytearray(40)
    fields = memoryview(argument).cast("Q")
    fields[2] = size
    return argument, fields


def _placing(paging: Paging, link: SourceLink, block: RamBlock, ioctl: Ioctl, address: AddressOf) -> Place:
    """Place what has come of a block in the expected form, and send Wake to its waiters (``WorkerPool.send``)."""
    received, number, size, base = block.received, block.number, block.page_size, block.mapping.address
    engine, placer, wakers, flow = paging.engine, paging.placer, paging.wakers, link.flow
    shift, core, clock = size.bit_length() - 1, placer.core.fileno(), time.monotonic
    count, unpoison, awaited, following = placer.count, wakers.unpoison, wakers.awaited, paging.following
    send, release_own, waiting, ranges = wakers.send, wakers.release_own, engine.waiting, engine.ranges(number)
    outstanding, queues, finished = flow.outstanding, flow.queues, flow.finished
    starts, ends, counters, stages = ranges.starts, ranges.ends, link.counters, link.stages[number]
    full_path, wake = partial(_full_path, paging, link), template_of(Wake(number, pack_offsets([0])), OFFSET_BYTES)
    argument, copy = _argument(size)

    def place(request: RangeRequest, buffer: memoryview) -> bool:
        now, offset, source = clock(), request.offset, address(buffer)
        page = offset >> shift
        if request.length != size or request.client == BACKGROUND or received[page] == LOST:
            return full_path(request, now, source)
        if received[page] != RECEIVED:
            copy[0], copy[1] = base + offset, source
            received[page] = PLACING
            try:
                ioctl(core, UFFDIO_COPY, argument)
            except OSError:  # it is present already, or there is no memory for it
                return full_path(request, now, source)
            received[page] = RECEIVED
            if not request.number & SAMPLE_MASK:
                stages[bucket(int((clock() - now) * 1e9)) + PLACED] += SAMPLE_MASK + 1
            count(block, 1)
        if ends.get(page) == page + 1:
            del ends[page], starts[bisect_left(starts, page)]
        else:
            ranges.remove(page, page + 1)
        waiters = waiting.pop((number, page), None)
        if waiters:
            message = wake + offset.to_bytes(OFFSET_BYTES, "little")
            for waiter in waiters:
                if waiter:
                    send(waiter, message)
                else:
                    release_own(block, page, False)
        if awaited:
            unpoison(block, page, page + 1)
        if following and (number, page) in following:
            paging.catch_up(number, page, page + 1)
        if queues:
            link.completed(request, now)
            return not flow.background_in_flight
        del outstanding[request.number]
        flow.bytes_in_flight -= size
        flow.urgent_pace = took = now - request.sent
        finished.append((request, now))
        link.silent_since = None
        link.pages += 1
        link.bytes += size
        at = bucket(int(took * 1e9))
        counters[at] += 1
        stages[at + ARRIVED] += 1
        return not flow.background_in_flight

    return place
