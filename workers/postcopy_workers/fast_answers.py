"""Answers to the common page faults: closures over what never changes while a worker lives.

Every fault runs one of them while its client waits. One flat closure over local names costs 16 % of the latency of a C
handler; methods and attribute reads would cost 30 %. Each closure leaves to ``SlowPath`` as soon as a case is not the
common one. Fault-around begins in ``SlowPath.widen``.
"""

from __future__ import annotations

from collections.abc import Callable
from fcntl import LOCK_EX, LOCK_UN
from time import perf_counter_ns
from typing import Protocol

from postcopy_kernel.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE
from postcopy_protocol.counters import FAULTS, PLAIN, bucket
from postcopy_protocol.received_map import MISSING, PLACING, RECEIVED
from postcopy_protocol.stages import PLACED as PLACED_STAGE
from postcopy_protocol.stages import WOKEN

from .client_ufd import FAULT_MINOR, FAULT_WRITE, Region
from .guarded_block import GuardedBlock
from .page_sources import RemotePages
from .placing import COPY_DONTWAKE, Calls, Structure
from .requests import Requests

BASE_SHIFT = 12
TIMED = 17
"""One common fault in so many is timed and counts for as many: clocks and histograms cost 2 us each time. The first
fault, for which no cache is warm, is timed too and counts for itself alone. The number is a prime, because programs
cycle through two, three, four or eight arrays or threads: each of them gets its share of the samples."""

Answer = Callable[[int, int], None]
"""Resolves a page fault of one region, or of all regions of a client: its flags, its address."""


class SlowPath(Protocol):
    """What the closures leave to the fault handler."""

    def resolve(self, region: Region, page: int, flags: int, begun: int) -> None:
        """Resolve a fault that is not a common one; ``begun`` (ns) is when its message was read."""

    def widen(self, region: Region, page: int, pages: int) -> None:
        """Place up to ``pages`` pages from ``page`` on; ``page`` itself is placed."""

    def outside(self, address: int) -> None:
        """Report a fault that is in no region."""


def fast_answer(
    region: Region, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath, requests: Requests | None
) -> Answer:
    """The closure that answers the faults of one region. Local blocks have lean closures only for 4 KiB pages that are
    copied from a file: a huge page, or one that a function makes, costs far more than the way to it."""
    pages = region.block.pages
    if isinstance(pages, RemotePages):
        assert requests is not None
        return _remote(region, counters, slow, requests)
    if region.own or not pages.linear or region.block.shift != BASE_SHIFT:
        return _not_linear(region, slow)
    if isinstance(region.block, GuardedBlock):
        return _guarded(region, region.block, userfaultfd, counters, calls, slow)
    local = _private if region.in_block else _shared
    return local(region, userfaultfd, counters, calls, slow)


def _not_linear(region: Region, slow: SlowPath) -> Answer:
    base, shift, resolve = region.base, region.block.shift, slow.resolve
    first, end, outside = region.first_page, region.end_page, slow.outside

    def answer(flags: int, address: int) -> None:
        page = address - base >> shift
        if not first <= page < end:
            return outside(address)
        return resolve(region, page, flags, perf_counter_ns())

    return answer


def _remote(region: Region, counters: memoryview, slow: SlowPath, requests: Requests) -> Answer:
    base, shift, resolve = region.base, region.block.shift, slow.resolve
    first, end, outside = region.first_page, region.end_page, slow.outside
    received, number, ask = region.block.received, region.block.grant.block, requests.ask

    def answer(flags: int, address: int) -> None:
        page = address - base >> shift
        if not first <= page < end:
            return outside(address)
        if received[page] >= RECEIVED or flags & FAULT_MINOR:
            return resolve(region, page, flags, perf_counter_ns())
        counters[FAULTS] += 1
        return ask(number, page << shift)

    return answer


def _shared(region: Region, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath) -> Answer:
    block, base, clock = region.block, region.base, perf_counter_ns
    ioctl, received, trust_at = calls.ioctl, block.received, block.trust_at
    source = block.pages.linear - base  # from an address of the client to the bytes that belong there
    structure = Structure(5, 0, 0, 1 << BASE_SHIFT)
    copy, buffer = structure.fields, structure.buffer
    window, resolve, widen, tidy = region.around.window, slow.resolve, slow.widen, block.tidy
    first, end, outside = region.first_page, region.end_page, slow.outside
    stages = region.stages

    def answer(flags: int, address: int) -> None:
        page = address - base >> BASE_SHIFT
        if not first <= page < end:
            return outside(address)
        plain = counters[PLAIN]
        begun = 0 if plain % TIMED else clock()
        if received[page] or flags & FAULT_MINOR:
            return resolve(region, page, flags, begun or clock())
        if received[trust_at]:  # no lease: read and checked before it is placed
            return resolve(region, page, flags, begun or clock())
        copy[0] = address
        copy[1] = address + source
        received[page] = PLACING
        try:
            ioctl(userfaultfd, UFFDIO_COPY, buffer)
        except OSError:
            return resolve(region, page, flags, begun or clock())
        received[page] = RECEIVED
        counters[PLAIN] = plain + 1
        if begun:  # placed and woken are one call
            taken, weight = bucket(clock() - begun), TIMED if plain else 1
            counters[taken] += weight
            stages[taken + PLACED_STAGE] += weight
            stages[taken + WOKEN] += weight
            tidy(TIMED)
        pages = window(page)
        if pages > 1:
            widen(region, page, pages)

    return answer


def _private(region: Region, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath) -> Answer:
    block, base, clock = region.block, region.base, perf_counter_ns
    ioctl, received, trust_at = calls.ioctl, block.received, block.trust_at
    own_fd, own = block.own.userfaultfd, block.own.address - base
    source = block.pages.linear - base
    copy_structure = Structure(5, 0, 0, 1 << BASE_SHIFT, COPY_DONTWAKE)
    copy, copy_buffer = copy_structure.fields, copy_structure.buffer
    resume_structure = Structure(4, 0, 1 << BASE_SHIFT)
    resume, resume_buffer = resume_structure.fields, resume_structure.buffer
    window, resolve, widen, tidy = region.around.window, slow.resolve, slow.widen, block.tidy
    first, end, outside = region.first_page, region.end_page, slow.outside
    stages = region.stages

    def answer(flags: int, address: int) -> None:
        page = address - base >> BASE_SHIFT
        if not first <= page < end:
            return outside(address)
        plain = counters[PLAIN]
        begun = 0 if plain % TIMED else clock()
        if received[page] or flags & FAULT_MINOR:
            return resolve(region, page, flags, begun or clock())
        if received[trust_at]:  # no lease: read and checked before it is placed
            return resolve(region, page, flags, begun or clock())
        copy[0] = address + own
        copy[1] = address + source
        received[page] = PLACING
        try:
            ioctl(own_fd, UFFDIO_COPY, copy_buffer)
            received[page] = RECEIVED
            if begun:
                weight = TIMED if plain else 1
                stages[bucket(clock() - begun) + PLACED_STAGE] += weight
            resume[0] = address
            # A writer faults again after a WAKE, straight into its own copy; CONTINUE would map the page read-only.
            ioctl(userfaultfd, UFFDIO_WAKE if flags & FAULT_WRITE else UFFDIO_CONTINUE, resume_buffer)
        except OSError:
            return resolve(region, page, flags, begun or clock())
        counters[PLAIN] = plain + 1
        if begun:
            taken = bucket(clock() - begun)
            counters[taken] += weight
            stages[taken + WOKEN] += weight
            tidy(TIMED)
        pages = window(page)
        if pages > 1:
            widen(region, page, pages)

    return answer


def _guarded(
    region: Region, block: GuardedBlock, userfaultfd: int, counters: memoryview, calls: Calls, slow: SlowPath
) -> Answer:
    """Private or shared: as ``_private``, in turn with other workers, and CONTINUE also for a page that is there."""
    base, clock, received, trust_at = region.base, perf_counter_ns, block.received, block.trust_at
    ioctl, lockf, locks, lock_at = calls.ioctl, calls.lockf, block.locks, block.lock_at
    own_fd, own, source = block.own.userfaultfd, block.own.address - base, block.pages.linear - base
    copy_structure = Structure(5, 0, 0, 1 << BASE_SHIFT, COPY_DONTWAKE)
    copy, copy_buffer = copy_structure.fields, copy_structure.buffer
    resume_structure = Structure(4, 0, 1 << BASE_SHIFT)
    resume, resume_buffer = resume_structure.fields, resume_structure.buffer
    window, resolve, widen, tidy = region.around.window, slow.resolve, slow.widen, block.tidy
    first, end, outside, stages = region.first_page, region.end_page, slow.outside, region.stages

    def answer(flags: int, address: int) -> None:
        page = address - base >> BASE_SHIFT
        if not first <= page < end:
            return outside(address)
        plain = counters[PLAIN]
        begun = 0 if plain % TIMED else clock()
        missing = not flags & FAULT_MINOR
        if received[page] != (MISSING if missing else RECEIVED):
            return resolve(region, page, flags, begun or clock())
        if missing:
            if received[trust_at]:  # no lease: read and checked before it is placed
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

    return answer
