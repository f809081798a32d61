"""Lanes: the common fault of a remote block, one page that one client waits for, in as few steps of Python as it takes.

Everything else goes the careful way (``Paging``, ``SourceLink.heard``), and so does what turns out to
be not so common on the way. The order is the same here and there: PLACING, UFFDIO_COPY, RECEIVED, and only then word
to exactly the workers that wait.

A lane is one flat closure over what never changes for it, and does by hand what ``Engine.stand``, ``answered``,
``FlowControl.launch`` and ``landed``, ``SourceLink.wish`` and ``expected`` say in words. Between two faults
the processor has done other processes' work, so each function and object that a fault passes costs several times what
it costs in a loop of its own, and all of them cost as much as ZeroMQ. The laws are still theirs: the tests check
their invariants after each lane.
"""

from __future__ import annotations

import fcntl
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

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
from .flow_control import BACKGROUND, RangeRequest
from .source_link import Arrived, SourceLink

if TYPE_CHECKING:
    from .paging import Paging

SAMPLE_MASK = 3
"""Of the pages that come one in four is timed while it is placed, and counts for four."""
WorkerFastPath = Callable[[bytes], None]
"""Given what a worker says: a RequestPages of one page whose head is the one that the lane was made for."""
SourceFastPath = Callable[[bytes, memoryview], "bool | None"]
"""Given a head and the one frame behind it. None: not an answer as it was expected, nothing is done. Else its pages are
placed by now; True when more may be wanted in the background."""


def worker_fast_path(paging: Paging, waiter: int, block: RamBlock, link: SourceLink) -> WorkerFastPath:
    """For the requests of one worker for pages of one remote block."""
    received, number, length, size = block.received, block.number, block.length, block.page_size
    shift, width, clock = size.bit_length() - 1, size.to_bytes(OFFSET_BYTES, "little"), time.monotonic
    window, cursor, careful = paging.window_of(waiter, block), paging.cursor, paging.fault
    engine, flow, templates, answers, say = paging.engine, link.flow, link.templates, link.answers, link.say
    waiting, flight, outstanding, queues = engine.waiting, engine.flight(number), flow.outstanding, flow.queues
    starts, ends, most, most_bytes = flight.starts, flight.ends, flow.limits.requests, flow.limits.bytes

    def asked(data: bytes) -> None:
        offset = int.from_bytes(data[-OFFSET_BYTES:], "little")
        if offset >= length:
            return
        page = offset >> shift
        if received[page] > PLACING or link.state != "up" or page << shift != offset:
            return careful(waiter, block, (page,))
        pages, key, at, request = window(page), (number, page), bisect_right(starts, page), flow.next_request
        if (
            pages > 1
            or key in waiting  # somebody waits for it already
            or (at and page < ends[starts[at - 1]])  # it is on its way already
            or queues  # others are before us
            or len(outstanding) >= most
            or flow.bytes_in_flight >= most_bytes
            or request >= REQUEST_LIMIT
        ):
            return careful(waiter, block, (page,), pages)
        waiting[key] = {waiter}
        starts.insert(at, page)
        cursor[number] = ends[page] = page + 1
        engine.requests += 1
        link.requests += 1
        now = clock()
        flow.next_request = request + 1
        flow.bytes_in_flight += size
        flow.urgent_at = now
        name, span = request.to_bytes(NUMBER_BYTES, "big"), data[-OFFSET_BYTES:] + width
        before, behind, answer, between, end = templates[number].urgent
        outstanding[request] = answers[answer + name + between + span + end] = RangeRequest(
            waiter, number, offset, size, now, 1, request
        )
        say(before + name + behind + span)

    return asked


def source_fast_path(
    paging: Paging,
    link: SourceLink,
    blocks: list[RamBlock],
    ioctl: Callable[..., object] = fcntl.ioctl,
    address: Callable[[memoryview], int] = address_of,
) -> SourceFastPath:
    """For the answers of one source. ``ioctl`` and ``address``: on a simulated kernel they are others."""
    come = {block.number: _come(paging, link, block, ioctl, address) for block in blocks}
    answers, outstanding = link.answers, link.flow.outstanding

    def answered(head: bytes, buffer: memoryview) -> bool | None:
        wish = answers.pop(head, None)
        if wish is None or wish.length != len(buffer) or outstanding.get(wish.request) is not wish:
            return None
        return come[wish.block](wish, buffer)

    return answered


def _come(
    paging: Paging,
    link: SourceLink,
    block: RamBlock,
    ioctl: Callable[..., object],
    address: Callable[[memoryview], int],
) -> Callable[[RangeRequest, memoryview], bool]:
    """Place what has come of a block as it was expected, and release whoever waits."""
    received, number, size, base = block.received, block.number, block.page_size, block.mapping.address
    shift, core, clock = size.bit_length() - 1, paging.core.fileno(), time.monotonic
    ioctl = crashpoints.around("page.arrived", ioctl, "page.placed")
    count, heal, healing, arrived = paging.count, paging.heal, paging.healing, paging.arrived
    tell, release_own, engine, flow = paging.tell_worker, paging.release_own, paging.engine, link.flow
    waiting, flight, outstanding, queues, past = (
        engine.waiting,
        engine.flight(number),
        flow.outstanding,
        flow.queues,
        flow.past,
    )
    starts, ends, words, stages = flight.starts, flight.ends, link.words, link.stages[number]
    wake = template_of(Wake(number, pack_offsets([0])), OFFSET_BYTES)
    argument = bytearray(40)  # of UFFDIO_COPY: destination, source, length, mode, result
    copy = memoryview(argument).cast("Q")
    copy[2] = size

    def carefully(wish: RangeRequest, now: float, source: int) -> bool:
        link.landed(wish, now)  # first: what there is no memory for is wished for anew
        arrived(Arrived(number, ((wish.offset, wish.length, RangeKind.DATA, 0),), ""), (source,))
        return wish.client == BACKGROUND or not flow.pieces

    def come(wish: RangeRequest, buffer: memoryview) -> bool:
        now, offset, source = clock(), wish.offset, address(buffer)
        page = offset >> shift
        if wish.length != size or wish.client == BACKGROUND or received[page] == LOST:
            return carefully(wish, now, source)
        if received[page] != RECEIVED:
            copy[0], copy[1] = base + offset, source
            received[page] = PLACING
            try:
                ioctl(core, UFFDIO_COPY, argument)
            except OSError:  # it is there already, there is no memory for it: the careful way knows
                return carefully(wish, now, source)
            received[page] = RECEIVED
            if not wish.request & SAMPLE_MASK:
                stages[bucket(int((clock() - now) * 1e9)) + PLACED] += SAMPLE_MASK + 1
            count(block, 1)
        if ends.get(page) == page + 1:
            del ends[page], starts[bisect_left(starts, page)]
        else:
            flight.land(page, page + 1)
        waiters = waiting.pop((number, page), None)
        if waiters:
            word = wake + offset.to_bytes(OFFSET_BYTES, "little")
            for waiter in waiters:
                if waiter:
                    tell(waiter, word)
                else:
                    release_own(block, page, False)
        if healing:
            heal(block, page, page + 1)
        if queues:
            link.landed(wish, now)
            return not flow.pieces
        del outstanding[wish.request]
        flow.bytes_in_flight -= size
        flow.urgent_pace = took = now - wish.sent
        past.append((wish, now))
        link.silent_since = None
        link.pages += 1
        link.bytes += size
        at = bucket(int(took * 1e9))
        words[at] += 1
        stages[at + ARRIVED] += 1
        return not flow.pieces

    return come
