"""Pages of a machine with memory of its own: what it gave back stays zeros, whatever dies in between."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy_kernel.userfaultfd import UFFDIO_COPY, UFFDIO_WAKE
from postcopy_protocol.copied_map import COPIED, FRESH, REMOVED, size_of
from postcopy_protocol.received_map import RECEIVED
from postcopy_workers.own_memory import EVENT_REMOVE, MESSAGE_FIELDS, OwnMemory, own_answer
from postcopy_workers.placing import Calls
from tests.simulated.effort import effort

PAGE, PAGES, BASE, BATCH = 4096, 12, 1 << 40, 4
FAULT = 0x12
BLOCK, ZERO, WRITTEN = b"B", b"\0", b"W"
pages = st.integers(0, PAGES - 1)


class Killed(BaseException):
    pass


class Guest:
    """The kernel's side: page contents (None: missing), threads asleep, messages unread, ranges about to be dropped."""

    def __init__(self) -> None:
        self.pages: list[bytes | None] = [None] * PAGES
        self.given_back: set[int] = set()
        self.asleep: set[int] = set()
        self.queue: deque[tuple[int, int, int]] = deque()
        self.dropping: list[range] = []
        self.calls_to_live = self.calls_behind = 0

    def touch(self, page: int) -> None:
        if self.pages[page] is None and page not in self.asleep:
            self.asleep.add(page)
            self.queue.append((FAULT, 0, BASE + page * PAGE))

    def give_back(self, first: int, end: int) -> None:
        self.queue.append((EVENT_REMOVE, BASE + first * PAGE, BASE + end * PAGE))

    def read(self, fields: memoryview) -> int:
        count = min(BATCH, len(self.queue))
        for number in range(count):
            event, first, second = self.queue.popleft()
            at = number * MESSAGE_FIELDS
            fields[at], fields[at + 1], fields[at + 2] = event, first, second
            if event == EVENT_REMOVE:
                self.dropping.append(range((first - BASE) // PAGE, (second - BASE) // PAGE))
        return count

    def drop(self) -> None:
        """The caller of madvise goes on: from now on these pages are zeros."""
        for page in self.dropping.pop(0):
            self.pages[page] = None
            self.given_back.add(page)

    def ioctl(self, _fd: int, request: int, buffer: bytearray) -> None:
        self.calls_to_live -= 1
        self.calls_behind -= 1
        if self.calls_to_live == 0:
            raise Killed
        fields = memoryview(buffer).cast("Q")
        first, length = (fields[0] - BASE) // PAGE, fields[2 if request == UFFDIO_COPY else 1] // PAGE
        if request == UFFDIO_WAKE:
            for page in range(first, first + length):
                if page in self.asleep:
                    self.asleep.discard(page)
                    self.touch(page)
        else:
            self._fill(request, fields[1], first, length, buffer)
        if self.calls_behind == 0:
            raise Killed

    def _fill(self, request: int, source: int, first: int, length: int, buffer: bytearray) -> None:
        if any(event == EVENT_REMOVE for event, _, _ in self.queue):
            raise OSError(errno.EAGAIN, "an event is unread")
        for done in range(length):
            page = first + done
            if self.pages[page] is not None:
                struct.pack_into("=q", buffer, 32 if request == UFFDIO_COPY else 24, done * PAGE or -errno.EEXIST)
                raise OSError(errno.EAGAIN if done else errno.EEXIST, "there")
            byte = ctypes.string_at(source + done * PAGE, 1) if request == UFFDIO_COPY else ZERO
            assert byte == ZERO or page not in self.given_back, f"page {page} is back"
            assert byte != ZERO or page in self.given_back | self.about_to_be, f"page {page} is zeros by accident"
            self.pages[page] = byte
            self.asleep.discard(page)

    @property
    def about_to_be(self) -> set[int]:
        return {page for dropped in self.dropping for page in dropped}


class Machine(RuleBasedStateMachine):
    """One machine, and its workers one after the other."""

    @initialize(window=st.sampled_from((1, 1, 4)))
    def begin(self, window: int) -> None:
        self.guest, self.window = Guest(), window
        self.memory = bytearray(size_of(PAGES))
        self.steps: Iterator[None] | None = None
        self.work()

    def _life(self) -> Iterator[None]:
        """What ``client_worker`` does for such a client."""
        counters = memoryview(bytearray(8 * 64)).cast("Q")
        block: Any = SimpleNamespace(
            shift=12, huge=False, memory=-1, received=bytearray([RECEIVED]) * PAGES, all_present=lambda first, end: True
        )
        region: Any = SimpleNamespace(
            base=BASE, start=BASE, end=BASE + PAGES * PAGE, first_page=0, end_page=PAGES, block=block
        )
        region.address = lambda page: BASE + page * PAGE

        def read_block(_fd: int, buffer: memoryview, _offset: int) -> int:
            buffer[:] = BLOCK * len(buffer)
            return len(buffer)

        calls = Calls(ioctl=self.guest.ioctl)
        own = OwnMemory(3, counters, calls, memoryview(self.memory), read_block)

        def rest(_flags: int, address: int) -> None:
            page = (address - BASE) // PAGE
            if own.resume(region, page, 0):
                own.map_received(region, page + 1, min(PAGES, page + self.window))

        answer = own_answer(region, own, counters, rest)
        fields = own.messages.cast("Q")
        own.note_removals([region], fields, BATCH)
        own.wake_all([region])
        while True:
            yield
            count = self.guest.read(fields)
            yield
            own.note_removals([region], fields, count)
            for number in range(count):
                yield
                at = number * MESSAGE_FIELDS
                if fields[at] == FAULT:
                    answer(fields[at + 1], fields[at + 2])

    @rule(steps=st.integers(1, 8))
    def work(self, steps: int = 1) -> None:
        life, self.steps = self.steps or self._life(), None
        try:
            for _ in range(steps):
                next(life)
            self.steps = life
        except Killed:
            return
        finally:
            self.guest.calls_to_live = self.guest.calls_behind = 0

    @rule(before=st.integers(0, 4), behind=st.integers(0, 4), steps=st.integers(0, 8))
    def kill(self, before: int, behind: int, steps: int) -> None:
        """Before or behind a system call, or between two steps."""
        self.guest.calls_to_live, self.guest.calls_behind = before, behind
        self.work(steps)
        self.steps = None

    @rule(page=pages)
    def touch(self, page: int) -> None:
        self.guest.touch(page)

    @rule(page=pages)
    def write(self, page: int) -> None:
        if self.guest.pages[page] is not None and page not in self.guest.about_to_be:
            self.guest.pages[page] = WRITTEN

    @rule(first=pages, count=st.integers(1, 5))
    def give_back(self, first: int, count: int) -> None:
        self.guest.give_back(first, min(PAGES, first + count))

    @precondition(lambda self: self.guest.dropping)
    @rule()
    def drop(self) -> None:
        self.guest.drop()

    @invariant()
    def at_rest_no_thread_sleeps(self) -> None:
        if not hasattr(self, "guest"):
            return
        states = set(self.memory[4096 : 4096 + PAGES])
        assert states <= {FRESH, 1, COPIED, REMOVED}

    def teardown(self) -> None:
        if not hasattr(self, "guest"):
            return
        for page in range(PAGES):
            self.guest.touch(page)
        for _ in range(60):
            self.work(8)
            while self.guest.dropping:
                self.guest.drop()
        assert not self.guest.asleep and not self.guest.queue
        for page in self.guest.given_back:
            assert self.guest.pages[page] in (None, ZERO, WRITTEN)


TestMachine = Machine.TestCase
TestMachine.settings = effort(200, 40)
