"""A machine under chaos: ``python machine.py JOB``. As ``program``, with memory that is a virtual machine's.

    vm       a simulated Firecracker with a copy of one block; threads read it
    vm-kvm   the same, but a guest of KVM reads and fills it
    guest    a guest of KVM whose memory is a block, mapped private

Balloons inflate and deflate: what was given back must be zeros from then on in a copy, and the block's bytes in a
private mapping. Everything is checked after every change, and once more at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import postcopy
from postcopy.firecracker.simulated import Machine
from postcopy_kernel.memory import DONTNEED, advise
from tests.chaos import progress
from tests.chaos.contents import PAGE
from tests.chaos.program import PATIENCE, Program, run
from tests.system.kvm_guest import MOST_PAGES, Guest, sum_of

BALLOON = 16
"""Pages that are given back at a time, at most."""
DIRTY = 256
"""Pages that a guest has changed, at most."""
Reader = Callable[[int], object]


class Virtual(Program):
    """What the three kinds have in common. Block numbers of ``Program``: a machine has one block, ``self.block``."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.block = self.seat // 2 % 2

    def act(self) -> None:
        chance, block = self.random.random(), self.block
        if chance < 0.5:
            self.doing("touch", block, page := self.at_front(block), lambda: self.check(page))
        elif chance < 0.7:
            self.doing("check", block, page := self.behind(block), lambda: self.check(page))
        elif chance < 0.85:
            self.doing("write", block, page := self.behind(block), lambda: self.change(page))
        else:
            self.doing("balloon", block, page := self.behind(block), lambda: self.balloon(page))

    def check(self, page: int) -> None:
        """Read a page, which may be missing, and note how it went."""
        block, cold = self.block, self.cold(page)
        begun = time.monotonic_ns()
        right = self.right(page)
        now = time.monotonic_ns()
        if cold:
            self.row[progress.COLD + block] += 1
            self.row[progress.BEGAN + block] = begun
            self.row[progress.LAST_COLD + block] = now
            self.row[progress.SLOWEST] = max(self.row[progress.SLOWEST], now - begun)
        self.row[progress.CHECKED] += PAGE
        if not right:
            self.row[progress.WRONG] += PAGE
            found = self.bytes_of(page)
            self.find(block, page, found, self.contents.check(block + 1, page, found) or [0])

    def balloon(self, page: int) -> None:
        pages = range(page, min(page + self.random.randint(1, BALLOON), self.pages))
        for one in pages:
            self.give_back(one)
        for one in pages:
            self.check(one)

    def change(self, page: int) -> None:
        self.fill(page)
        self.check(page)

    def last_pass(self) -> None:
        for page in range(self.pages):
            self.doing("last pass", self.block, page, lambda page=page: self.check(page))  # type: ignore[misc]

    def cold(self, page: int) -> bool:
        raise NotImplementedError

    def right(self, page: int) -> bool:
        raise NotImplementedError

    def bytes_of(self, page: int) -> bytes:
        raise NotImplementedError

    def give_back(self, page: int) -> None:
        raise NotImplementedError

    def fill(self, page: int) -> None:
        raise NotImplementedError


class Copy(Virtual):
    """A simulated Firecracker; ``vm-kvm``: with a processor."""

    guest: Guest | None = None

    def _attach(self) -> None:
        limit = time.monotonic() + PATIENCE
        while True:
            try:
                profile = {"regions": [self.pages], "version": ("1.1", "1.7", "1.12", "2.0")[self.seat % 4]}
                self.machine = Machine(self.job["faces"][self.block], self.job["files"][self.block], profile)
                break
            except OSError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)
        if self.mode == "vm-kvm":
            self.guest = Guest(self.machine.memory.address, self.machine.memory.length)

    def close(self) -> None:
        """A machine ends with its process."""

    def act(self) -> None:
        if self.guest is None and self.random.random() < 0.02:
            self.doing("race", self.block, 0, self.race)
        else:
            super().act()

    def race(self) -> None:
        if wrong := self.machine.race(2, self.random.getrandbits(30)):
            self.row[progress.WRONG] += wrong * PAGE
            self.find(self.block, 0, bytes(PAGE), [0])

    def cold(self, page: int) -> bool:
        return not self.machine.touched[page]

    def right(self, page: int) -> bool:
        if self.guest is None:
            return self.machine.right(page)
        found = self.guest.sum(page * PAGE)
        self.machine.touched[page] = 1
        return found == sum_of(self.machine.expected(page))

    def bytes_of(self, page: int) -> bytes:
        return bytes(self.machine.page(page))

    def give_back(self, page: int) -> None:
        self.machine.remove(page)

    def fill(self, page: int) -> None:
        if self.guest is None:
            self.machine.write(page)
            return
        word = self.random.getrandbits(32)
        self.guest.fill(page * PAGE, word)
        self.machine.changed[page] = word.to_bytes(4, "little") * (PAGE // 4)

    def last_pass(self) -> None:
        if self.guest is None:
            return super().last_pass()
        many(self.guest, self.pages, self.machine.expected, self.check, self.doing_last)

    def doing_last(self, page: int, act: Callable[[], object]) -> None:
        self.doing("last pass", self.block, page, act)


class Private(Virtual):
    """A guest of KVM whose memory is a block, mapped private."""

    def _attach(self) -> None:
        limit = time.monotonic() + PATIENCE
        while True:
            try:
                self.memory = postcopy.attach(self.names[self.block], self.directory, timeout=30.0)
                break
            except (postcopy.NoSupervisor, postcopy.AttachTimeout):
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)
        self.view = (ctypes.c_ubyte * self.memory.size).from_buffer(self.memory.buf)
        self.address = ctypes.addressof(self.view)
        self.guest = Guest(self.address, self.memory.size)
        self.seen = bytearray(self.pages)
        self.words: dict[int, int] = {}

    def close(self) -> None:
        """A machine ends with its process."""

    def expected(self, page: int) -> bytes:
        if page in self.words:
            return self.words[page].to_bytes(4, "little") * (PAGE // 4)
        return self.contents.page(self.block + 1, page)

    def cold(self, page: int) -> bool:
        return not self.seen[page]

    def right(self, page: int) -> bool:
        found = self.guest.sum(page * PAGE)
        self.seen[page] = 1
        return found == sum_of(self.expected(page))

    def bytes_of(self, page: int) -> bytes:
        return bytes(self.memory.buf[page * PAGE : (page + 1) * PAGE])

    def give_back(self, page: int) -> None:
        """The guest's own copy goes; what is there then is the block's page."""
        assert advise(self.address + page * PAGE, PAGE, DONTNEED) == 0
        self.words.pop(page, None)

    def fill(self, page: int) -> None:
        if len(self.words) < DIRTY or page in self.words:
            self.words[page] = self.random.getrandbits(32)
            self.guest.fill(page * PAGE, self.words[page])

    def last_pass(self) -> None:
        many(self.guest, self.pages, self.expected, self.check, self.doing_last)

    def doing_last(self, page: int, act: Callable[[], object]) -> None:
        self.doing("last pass", self.block, page, act)


def many(
    guest: Guest,
    pages: int,
    expected: Callable[[int], bytes],
    check: Callable[[int], None],
    doing: Callable[[int, Callable[[], object]], None],
) -> None:
    """The guest reads all of its memory, many pages at a time, and one by one where their sum is wrong."""
    step = MOST_PAGES // 8
    for first in range(0, pages, step):
        count = min(step, pages - first)
        want = sum(sum_of(expected(page)) for page in range(first, first + count)) & 0xFFFFFFFF
        found: list[int] = []
        doing(first, lambda first=first, count=count, to=found: to.append(guest.sum(first * PAGE, count)))  # type: ignore[misc]
        if found != [want]:
            for page in range(first, first + count):
                doing(page, lambda page=page: check(page))  # type: ignore[misc]


KINDS: dict[str, type[Virtual]] = {"vm": Copy, "vm-kvm": Copy, "guest": Private}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    assert Path("/dev/kvm").exists() or job["mode"] == "vm"
    status = run(KINDS[job["mode"]](job))
    sys.stdout.flush()
    os._exit(status)
