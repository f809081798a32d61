"""The common faults of local blocks, from reading a message to the wake, as one loop.

A fault is common when its block is a file under a lease, in pages of 4 KiB, and its page is missing. Then the answer
needs two or three system calls, some stores into shared memory, and no object of Python. The loop returns as soon as
anything else is to be done; ``FaultHandler`` does it and calls the loop again.

This file is the source of both: Python runs it as it is, and ``fault_loop.pxd`` has the types with which Cython makes
C of it (see ``twin``). Compiled, the loop does not hold the GIL, and ``read`` and ``ioctl`` are calls of C. The build
replaces the import of the stand-in by ``import cython``.

Everything that the loop needs is bound to local names first: in Python that saves a quarter of the time.
"""

from __future__ import annotations

import io
import os
from typing import Any

from postcopy_kernel.userfaultfd import MESSAGE_BYTES, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE
from postcopy_protocol.counters import HELD_UNTIL_NS, PLAIN
from postcopy_protocol.received_map import MISSING, PLACING, RECEIVED
from postcopy_protocol.stages import PLACED as PLACED_STAGE
from postcopy_protocol.stages import WOKEN
from postcopy_protocol.window import REACH, STREAMS

from . import cython_stand_in as cython
from .client_ufd import FAULT_MINOR, FAULT_WRITE, Region
from .placing import COPY_DONTWAKE, TIDY_AFTER, Calls, Structure

if not cython.compiled:
    from .cython_stand_in import bucket, bytes_of, clock, ioctl_of, read, use_ioctl, words_of

EVENT_PAGEFAULT = 0x12
MESSAGE_FIELDS = 4  # u64 fields of a message: event, flags, address, and one that we do not use
BATCH = 16  # messages that one read may give; behind them is room for the message of ``answer``
BASE_SHIFT = 12
TIMED = 17
"""One common fault in so many is timed and counts for as many: clocks and histograms cost 2 us each time. The first
fault, for which no cache is warm, is timed too and counts for itself alone. The number is a prime, because programs
cycle through two, three, four or eight arrays or threads: each of them gets its share of the samples."""

TIDY_PAGES = TIDY_AFTER >> BASE_SHIFT

# What the loop returns. But for the first two its message is ``FaultLoop.at`` - 1.
ANSWERED = 0  # the one message of ``answer``
NOTHING_READ = 1
BEHIND = 2  # answered, but something is to be done behind it: fault-around, or page tables to drop
UNCOMMON = 3  # untouched: its caller answers it
ELSEWHERE = 4  # the same, and its address is in no region of the loop
FAILED = 5  # a system call failed: its caller answers it
READING = -1


class LocalRegion:
    """What the loop knows of one region. Where Python has views of memory, C has pointers."""

    def __init__(
        self, region: Region, userfaultfd: int, counters: memoryview, control: memoryview, calls: Calls
    ) -> None:
        block = region.block
        self.region = region
        self.base, self.first, self.end = region.base, region.first_page, region.end_page
        self.private = region.in_block
        self.resume_on = userfaultfd
        self.place_on = block.own.userfaultfd if region.in_block else userfaultfd
        self.target = block.own.address - region.base if region.in_block else 0
        self.source = block.pages.linear - region.base
        copy = Structure(5, 0, 0, 1 << BASE_SHIFT, COPY_DONTWAKE if region.in_block else 0)
        resume = Structure(4, 0, 1 << BASE_SHIFT)
        self.kept = copy, resume, block.received, counters, region.stages, control, calls
        self.copy, self.copy_buffer = words_of(copy.fields), words_of(copy.buffer)
        self.resume, self.resume_buffer = words_of(resume.fields), words_of(resume.buffer)
        self.received, self.trust_at = bytes_of(block.received), block.trust_at
        self.counters, self.stages, self.control = words_of(counters), words_of(region.stages), words_of(control)
        self.ioctl = ioctl_of(calls.ioctl)
        self.placed = 0  # by the loop, in timed faults: they stand for all
        self.adaptive = False
        self.streams = 0  # of ``expected`` in use
        self.noted = 0  # the newest of them that ``FaultAround`` does not have yet
        if not cython.compiled:
            self.expected = [0] * STREAMS
            self.window = region.around.window

    def note_time(self, taken: int, weight: int) -> None:
        """A timed fault is answered, after so many ns, and counts for so many."""
        index = bucket(taken)
        self.counters[index] += weight
        self.stages[index + WOKEN] += weight
        if not self.private:  # placed and woken are one call
            self.stages[index + PLACED_STAGE] += weight
        self.placed += TIMED

    def take_streams(self) -> None:
        """Before the compiled loop: a copy of what ``FaultAround`` expects."""
        expected, self.adaptive = self.region.around.expected(), self.region.around.adaptive
        self.streams, self.noted = len(expected), 0
        for at, page in enumerate(expected):
            self.expected[at] = page

    def give_streams(self) -> None:
        """After it: ``FaultAround`` learns of the faults that were alone."""
        first = self.streams - self.noted
        for at in range(first, self.streams):
            self.region.around.window(self.expected[at] - 1)
        self.noted = 0

    def alone(self, page: int) -> bool:
        """Does a fault continue no stream? Then it is noted as ``FaultAround.window`` would, and its window is 1."""
        if not self.adaptive:
            return False
        nearest = page - REACH - 1  # where the last stream before it goes on
        for at in range(self.streams):
            expected = self.expected[at]
            if page <= expected <= page + 1:
                return False
            if nearest < expected < page:
                nearest = expected
        if nearest >= page - REACH:
            first = page  # of the placed pages before it
            while first > nearest and self.received[first - 1] != MISSING:
                first -= 1
            if first == nearest:
                return False
        if self.streams == STREAMS:
            for at in range(1, STREAMS):
                self.expected[at - 1] = self.expected[at]
        else:
            self.streams += 1
        self.expected[self.streams - 1] = page + 1
        self.noted = min(self.noted + 1, STREAMS)
        return True


class FaultLoop:
    """Reads the userfaultfd of one client and answers what is common. ``messages``: what the last read has given."""

    def __init__(self, userfaultfd: int, regions: list[LocalRegion], calls: Calls) -> None:
        self.regions = regions
        self.current = regions[0]
        self.userfaultfd = userfaultfd
        self.messages = memoryview(bytearray(MESSAGE_BYTES * (BATCH + 1))).cast("Q")
        self.fields = words_of(self.messages)
        self.at = self.count = 0  # the next message, and how many there are
        self.once = False
        self.begun = 0  # when the last message was read, if it is timed (ns)
        self.failed = 0  # errno of the read
        self.pages = 0  # BEHIND: pages that fault-around may fill, or 0: ``FaultAround.window`` says
        self.python_ioctl = calls.ioctl
        if not cython.compiled:
            self.read: Any = None
            self.buffer = self.messages[: BATCH * MESSAGE_FIELDS].cast("B")

    def answer(self, flags: int, address: int) -> int:
        """Answer one message that was read elsewhere; what ``run`` returns, or ANSWERED."""
        at, count = self.at, self.count
        place = BATCH * MESSAGE_FIELDS
        self.messages[place], self.messages[place + 1], self.messages[place + 2] = EVENT_PAGEFAULT, flags, address
        self.at, self.count, self.once = BATCH, BATCH + 1, True
        try:
            return self.run()
        finally:
            self.at, self.count, self.once = at, count, False

    def run(self) -> int:
        """Read and answer until something else is to be done; returns what. Raises OSError where the read fails."""
        if not cython.compiled and self.read is None and not self.once:
            self.read = io.FileIO(self.userfaultfd, closefd=False).readinto
        while True:
            region = self.current
            if cython.compiled:
                use_ioctl(self.python_ioctl)
                region.take_streams()
            try:
                with cython.nogil:
                    outcome = self._run(region)
            except BlockingIOError:
                outcome = NOTHING_READ if self.begun == READING else FAILED
            except OSError:
                if self.begun == READING:
                    raise
                outcome = FAILED
            if cython.compiled:
                region.give_streams()
            if outcome == NOTHING_READ and self.failed:
                raise OSError(self.failed, f"read from the client's userfaultfd: {os.strerror(self.failed)}")
            if outcome != ELSEWHERE or not self._choose(self.messages[(self.at - 1) * MESSAGE_FIELDS + 2]):
                return outcome
            self.at -= 1

    def _choose(self, address: int) -> bool:
        """Is there another region of the loop with this address? Then it is the current one."""
        for region in self.regions:
            if region.first <= address - region.base >> BASE_SHIFT < region.end:
                self.current = region
                return True
        return False

    def _run(self, region: LocalRegion) -> int:
        ioctl, received, trust_at, counters = region.ioctl, region.received, region.trust_at, region.counters
        base, first, end, private = region.base, region.first, region.end, region.private
        target, source, copy, copy_buffer = region.target, region.source, region.copy, region.copy_buffer
        place_on, resume_on = region.place_on, region.resume_on
        resume, resume_buffer = region.resume, region.resume_buffer
        fields, stages, at, count = self.fields, region.stages, self.at, self.count
        control = region.control
        if not cython.compiled:
            readinto, buffer, window = self.read, self.buffer, region.window
        while True:
            if at == count:
                if self.once:
                    return ANSWERED
                self.begun = READING
                length = read(self.userfaultfd, fields) if cython.compiled else readinto(buffer) or 0
                if length <= 0:
                    self.at, self.count, self.failed = 0, 0, -length
                    return NOTHING_READ
                at, count = 0, length // MESSAGE_BYTES
                self.count = count
            place = at * MESSAGE_FIELDS
            at += 1
            self.at = at
            flags, address = fields[place + 1], fields[place + 2]
            page = address - base >> BASE_SHIFT
            if not first <= page < end:
                return ELSEWHERE
            plain = counters[PLAIN]
            begun = 0 if plain % TIMED else clock()
            self.begun = begun
            # Without a lease the page is read and checked before it is placed.
            if received[page] or received[trust_at] or flags & FAULT_MINOR or fields[place] != EVENT_PAGEFAULT:
                return UNCOMMON
            if begun and private and control[HELD_UNTIL_NS]:  # not each fault: some more pages do no harm
                return UNCOMMON
            copy[0] = address + target
            copy[1] = address + source
            received[page] = PLACING
            if ioctl(place_on, UFFDIO_COPY, copy_buffer):
                return FAILED
            received[page] = RECEIVED
            if private:
                if begun:
                    stages[bucket(clock() - begun) + PLACED_STAGE] += TIMED if plain else 1
                resume[0] = address
                # A writer faults again after a WAKE, straight into its own copy; CONTINUE would map it read-only.
                if ioctl(resume_on, UFFDIO_WAKE if flags & FAULT_WRITE else UFFDIO_CONTINUE, resume_buffer):
                    return FAILED
            counters[PLAIN] = plain + 1
            if begun:
                region.note_time(clock() - begun, TIMED if plain else 1)
            pages = region.alone(page) if cython.compiled else window(page)
            if pages != 1 or (begun and region.placed >= TIDY_PAGES):
                self.pages = pages
                return BEHIND
