"""Lanes: the common fault of a remote block, one page that one client waits for, in as few steps of Python as it takes.

Everything else goes the careful way (``Paging``, ``Link.heard``), and so does what turns out to be not so common on the
way. The order is the same here and there: PLACING, UFFDIO_COPY, RECEIVED, and only then word to exactly the workers
that wait. A lane is a closure over what never changes for it: looking it up in five objects again for every page
cost more than placing the page.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from postcopy_kernel import crashpoints
from postcopy_kernel.memory import address_of
from postcopy_kernel.userfaultfd import UFFDIO_COPY
from postcopy_protocol.codec import pack_offsets
from postcopy_protocol.express import OFFSET, head_of
from postcopy_protocol.messages import Wake
from postcopy_protocol.received import PLACING, RECEIVED
from postcopy_protocol.return_path import DATA
from postcopy_protocol.stages import PLACED
from postcopy_protocol.statistics import bucket

from .blocks import RamBlock
from .flow import BACKGROUND
from .link import Arrived, Link

if TYPE_CHECKING:
    from .paging import Paging

WorkerLane = Callable[[bytes], None]
"""Given what a worker says: a RequestPages of one page whose head is the one that the lane was made for."""
SourceLane = Callable[[bytes, zmq.Frame], "bool | None"]
"""Given a head and one frame behind it. None: not an answer as it was expected, nothing is done. Else its pages are
placed by now; True when more may be wanted in the background."""


def worker_lane(paging: Paging, waiter: int, block: RamBlock, link: Link) -> WorkerLane:
    """For the requests of one worker for pages of one remote block."""
    received, number, length, shift = block.received, block.number, block.length, block.page_size.bit_length() - 1
    window, end_of, cursor, careful = paging.window_of(waiter, block), paging.end_of, paging.cursor, paging.fault
    stand, wish, clock, flow, size = paging.engine.stand, link.wish, time.monotonic, link.flow, block.page_size

    def asked(data: bytes) -> None:
        offset = int.from_bytes(data[-OFFSET:], "little")
        if offset >= length:
            return
        page = offset >> shift
        if received[page] > PLACING or link.state != "up":
            return careful(waiter, block, (page,))
        pages = window(page)
        cursor[number] = end = page + 1 if pages == 1 else end_of(block, page, pages)
        end = stand(waiter, number, page, end)
        if end:
            wish(waiter, number, page << shift, (end - page) << shift, clock())
        elif flow.streaming:
            link.hasten(waiter, number, page << shift, size, clock())

    return asked


def source_lane(
    paging: Paging,
    link: Link,
    blocks: list[RamBlock],
    ioctl: Callable[..., object] = fcntl.ioctl,
    address: Callable[[memoryview], int] = address_of,
) -> SourceLane:
    """For the answers of one source. ``ioctl`` and ``address``: on a simulated kernel they are others."""
    expected, landed, flow, clock = link.expected, link.landed, link.flow, time.monotonic
    arrive = {block.number: _arrive(paging, block, link.stages[block.number], ioctl, address) for block in blocks}

    def answered(head: bytes, frame: zmq.Frame) -> bool | None:
        buffer = frame.buffer
        wish = expected(head, len(buffer))
        if wish is None:
            return None
        now = clock()
        arrive[wish.block](wish.offset, wish.length, buffer)
        landed(wish, now)
        return wish.client == BACKGROUND or not flow.streaming

    return answered


def _arrive(
    paging: Paging,
    block: RamBlock,
    stages: memoryview,
    ioctl: Callable[..., object],
    address: Callable[[memoryview], int],
) -> Callable[[int, int, memoryview], None]:
    """Place what has come of a block, one page or a range, and release whoever waits."""
    received, number, size, base = block.received, block.number, block.page_size, block.mapping.address
    shift, core = size.bit_length() - 1, paging.core.fileno()
    ioctl = crashpoints.around("page.arrived", ioctl, "page.placed")
    place, count, clock = paging.place, paging.count, time.monotonic_ns
    come, release, heal, healing = paging.engine.come, paging.release, paging.heal, paging.healing
    wake = head_of(Wake(number, pack_offsets([0])), OFFSET)
    argument = bytearray(40)  # of UFFDIO_COPY: destination, source, length, mode, result
    copy = memoryview(argument).cast("Q")
    copy[2] = size

    def arrive(offset: int, length: int, buffer: memoryview) -> None:
        source = address(buffer)
        if length != size:
            return paging.arrived(Arrived(number, ((offset, length, DATA, 0),), ""), (source,))
        page = offset >> shift
        if received[page] != RECEIVED:
            copy[0], copy[1] = base + offset, source
            received[page] = PLACING
            begun = clock()
            try:
                ioctl(core, UFFDIO_COPY, argument)
            except OSError:  # it is there already, there is no memory for it: the careful way knows
                place(block, page, page + 1, source)
            else:
                received[page] = RECEIVED
                stages[bucket(clock() - begun) + PLACED] += 1
                count(block, 1)
        waiters = come(number, page)
        if waiters:
            release(waiters, block, page, wake + offset.to_bytes(OFFSET, "little"))
        if healing:
            heal(block, page, page + 1)

    return arrive
