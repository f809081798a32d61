"""Answers to the common page faults of remote and guarded blocks: closures over what never changes in a worker.
Those of other local blocks are answered by ``fault_loop``.

Every fault runs one of them while its client waits. One flat closure over local names costs 16 % of the latency of a C
handler; methods and attribute reads would cost 30 %. Each closure leaves to ``SlowPath`` as soon as a case is not the
common one. Fault-around begins in ``SlowPath.widen``.
"""

from __future__ import annotations

from collections.abc import Callable
from fcntl import LOCK_EX, LOCK_UN
from time import perf_counter_ns
from typing import Protocol

from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY
from postcopy_protocol.counters import FAULTS, HELD_UNTIL_NS, PLAIN, bucket
from postcopy_protocol.received_map import MISSING, PLACING, RECEIVED
from postcopy_protocol.stages import PLACED as PLACED_STAGE
from postcopy_protocol.stages import WOKEN

from .client_ufd import FAULT_MINOR, Region
from .fault_loop import BASE_SHIFT, TIMED
from .guarded_block import GuardedBlock
from .page_sources import RemotePages
from .placing import COPY_DONTWAKE, Calls, Structure
from .requests import Requests

Answer = Callable[[int, int], None]
"""Resolves a page fault of one region, or of all regions of a client: its flags, its address. For a region that is not
for the loop it is made by ``fast_answer``; of a remote block it is ``_remote.answer_remote``."""


class SlowPath(Protocol):
    """What the closures leave to the fault handler; ``control`` is the supervisor's page."""

    control: memoryview

    def resolve(self, region: Region, page: int, flags: int, begun: int) -> None:
        """Resolve a fault that is not a common one; ``begun`` (ns) is when its message was read."""

    def widen(self, region: Region, page: int, pages: int) -> None:
        """Place up to ``pages`` pages from ``page`` on; ``page`` itself is placed."""

    def outside(self, address: int) -> None:
        """Report a fault that is in no region."""


def is_for_loop(region: Region) -> bool:
    """Are the common faults of a region answered by ``FaultLoop``, and not by a closure?"""
    block = region.block
    return bool(block.pages.linear) and block.shift == BASE_SHIFT and not (block.guarded or region.own)


def fast_answer(
    region: Region, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath, requests: Requests | None
) -> Answer:
    """The closure that answers the faults of a region that is not for the loop. It is lean only where a page is
    requested, or copied from a file: a huge page, or one that a function makes, costs far more than the way to it."""
    pages = region.block.pages
    if isinstance(pages, RemotePages):
        assert requests is not None
        return _remote(region, counters, slow, requests)
    linear = pages.linear and region.block.shift == BASE_SHIFT and not region.own
    if linear and isinstance(region.block, GuardedBlock):
        return _guarded(region, region.block, userfaultfd, counters, calls, slow)
    return _not_linear(region, slow)


def _not_linear(region: Region, slow: SlowPath) -> Answer:
    base, shift, resolve = region.base, region.block.shift, slow.resolve
    first, end, outside = region.first_page, region.end_page, slow.outside

    def answer_by_resolve(flags: int, address: int) -> None:
        page = address - base >> shift
        if not first <= page < end:
            return outside(address)
        return resolve(region, page, flags, perf_counter_ns())

    return answer_by_resolve


def _remote(region: Region, counters: memoryview, slow: SlowPath, requests: Requests) -> Answer:
    """A missing page is requested (``Requests.ask``); its Wake comes to ``WakerThread.run``."""
    base, shift, resolve = region.base, region.block.shift, slow.resolve
    first, end, outside = region.first_page, region.end_page, slow.outside
    received, number, ask = region.block.received, region.block.grant.block, requests.ask

    def answer_remote(flags: int, address: int) -> None:
        page = address - base >> shift
        if not first <= page < end:
            return outside(address)
        if received[page] >= RECEIVED or flags & FAULT_MINOR:
            return resolve(region, page, flags, perf_counter_ns())
        counters[FAULTS] += 1
        return ask(number, page << shift)

    return answer_remote


def _guarded(
    region: Region, block: GuardedBlock, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath
) -> Answer:
    """Placed through our own mapping, in turn with other workers, then CONTINUE; that also for a page that is there."""
    base, clock, received, trust_at = region.base, perf_counter_ns, block.received, block.trust_at
    ioctl, lockf, locks, lock_at = calls.ioctl, calls.lockf, block.locks, block.lock_at
    own_fd, own, source = block.own.userfaultfd, block.own.address - base, block.pages.linear - base
    copy_structure = Structure(5, 0, 0, 1 << BASE_SHIFT, COPY_DONTWAKE)
    copy, copy_buffer = copy_structure.fields, copy_structure.buffer
    resume_structure = Structure(4, 0, 1 << BASE_SHIFT)
    resume, resume_buffer = resume_structure.fields, resume_structure.buffer
    window, resolve, widen, tidy = region.around.window, slow.resolve, slow.widen, block.tidy
    first, end, outside, stages = region.first_page, region.end_page, slow.outside, region.stages
    control = slow.control

    def answer_guarded(flags: int, address: int) -> None:
        page = address - base >> BASE_SHIFT
        if not first <= page < end:
            return outside(address)
        plain = counters[PLAIN]
        begun = 0 if plain % TIMED else clock()
        missing = not flags & FAULT_MINOR
        if received[page] != (MISSING if missing else RECEIVED):
            return resolve(region, page, flags, begun or clock())
        if missing:
            # Without a lease it is read and checked before it is placed; without memory it waits.
            if received[trust_at] or (begun and control[HELD_UNTIL_NS]):
                return resolve(region, page, flags, begun or clock())
            copy[0], copy[1], placed = address + own, address + source, False
            lockf(locks, LOCK_EX, 1, lock_at + page)
            try:
                if received[page] == MISSING:  # still: no worker had the turn before
                    received[page] = PLACING
                    ioctl(own_fd, UFFDIO_COPY, copy_buffer)
                    received[page] = RECEIVED
                    placed = True
                    if begun:
                        stages[bucket(clock() - begun) + PLACED_STAGE] += TIMED if plain else 1
            except OSError:
                pass  # ``resolve`` meets the same error
            finally:
                lockf(locks, LOCK_UN, 1, lock_at + page)
            if not placed:
                return resolve(region, page, flags, begun or clock())
        resume[0] = address
        try:
            ioctl(userfaultfd, UFFDIO_CONTINUE, resume_buffer)
        except OSError:
            return resolve(region, page, flags, begun or clock())
        counters[PLAIN if missing else FAULTS] += 1
        if begun:
            taken, weight = bucket(clock() - begun), TIMED if plain else 1
            counters[taken] += weight
            stages[taken + WOKEN] += weight
            tidy(TIMED)
        pages = window(page)
        if pages > 1:
            widen(region, page, pages)

    return answer_guarded
