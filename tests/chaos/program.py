"""A program under chaos: ``python program.py JOB`` (JSON). It attaches both blocks, then reads, writes and checks.

Where it reads moves through the blocks with time, in an order that all programs share, so that pages are missing until
the round ends and several programs want the same one at once. Half of what it does happens around that front, the
rest behind it. Every byte is checked (see contents.py); a private program remembers what it wrote, a shared one writes
into its own slots only. In the last pass it reads everything once more.

On stdout: one JSON line a finding (``wrong``), one at the end. Exit status 0: it came to its end, whatever it found.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import postcopy
from tests.chaos import progress
from tests.chaos.contents import PAGE, SLOT_EVERY, ZONE, Contents
from tests.chaos.progress import Progress

PATIENCE = 120.0
"""Seconds in which a supervisor must be there again for whoever attaches."""
MOST_FINDINGS = 20
MOST_WRITTEN = 512
NOT_ATTACHED, WRONG = 7, 9
"""Exit status of a fork's child: no supervisor was there to attach it (it may not touch anything); a wrong byte."""
FRONT = 32
"""The front is a 32nd of the block wide."""


class Program:
    """What one client does until its time is over, or the round."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.seat: int = job["seat"]
        self.mode: str = job["mode"]
        self.directory: str = job["runtime_dir"]
        self.names: list[str] = job["blocks"]
        self.pages: int = job["pages"]
        self.seconds: float = job["seconds"]
        self.pause: float = job["pause"]
        self.left: int = job["operations"]
        self.contents = Contents(job["seed"])
        self.random = random.Random(job["program_seed"])
        self.table = Progress(Path(job["progress"]), job["seats"])
        self.row = self.table.row(self.seat)
        self.written: list[dict[int, tuple[int, bytes]]] = [{}, {}]
        self.slots: list[dict[int, int]] = [{}, {}]
        self.blocks: list[postcopy.Block] = []
        self.findings = 0
        self.children: dict[str, int] = {}
        self.order = [_order(self.pages, job["run"], job["seed"] + block) for block in (0, 1)]
        self.pipe = os.pipe()

    # --- the life -----------------------------------------------------------------------------------------------------

    def live(self) -> str:
        """Until the end; returns why it ended."""
        self.attach()
        while self.table.phase == progress.RUN:
            if self.left == 0:
                return "its time was over"
            self.left -= 1
            self.act()
            self.row[progress.OPERATIONS] += 1
            time.sleep(self.random.expovariate(1 / self.pause))
        self.last_pass()
        self.close()
        return "the round is over"

    def act(self) -> None:
        chance = self.random.random()
        block = self.random.randrange(2)
        if chance < 0.55:
            self.doing("touch", block, page := self.at_front(block), lambda: self.look(block, page))
        elif chance < 0.75:
            self.doing("check", block, page := self.behind(block), lambda: self.look(block, page))
        elif chance < 0.82:
            self.doing("check", block, page := self.at_front(block), lambda: self.run_of_pages(block, page))
        elif chance < 0.95:
            self.doing("write", block, page := self.behind(block), lambda: self.write(block, page))
        elif chance < 0.985:
            self.doing("system call", block, page := self.at_front(block), lambda: self.look(block, page, self.syscall))
        elif chance < 0.995:
            self.doing("fork", block, page := self.at_front(block), lambda: self.fork(block, page))
        else:
            self.doing("close", 0, 0, self.close)
            self.attach()

    def doing(self, what: str, block: int, page: int, act: Callable[[], object]) -> None:
        """Do it, and let the run see since when we are in it."""
        self.row[progress.WHAT] = progress.OPERATION.index(what) | (block + 1) << 4 | page << 8
        self.row[progress.SINCE] = time.monotonic_ns()
        act()
        self.row[progress.SINCE] = 0

    def front(self) -> int:
        gone = time.monotonic() - self.table.begun if self.table.begun else 0.0
        return int(self.pages * min(1.0, gone / self.seconds))

    def at_front(self, block: int) -> int:
        front = self.front()
        place = self.random.randint(front - self.pages // FRONT, front + self.pages // FRONT // 8)
        return self.order[block][min(max(place, 0), self.pages - 1)]

    def behind(self, block: int) -> int:
        return self.order[block][self.random.randrange(max(1, self.front()))]

    # --- what it does -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self.doing("attach", 0, 0, self._attach)
        self.row[progress.ATTACHES] += 1

    def _attach(self) -> None:
        limit = time.monotonic() + PATIENCE
        for name in self.names:
            while True:
                try:
                    self.blocks.append(postcopy.attach(name, self.directory, self.mode, timeout=30.0))
                    break
                except (postcopy.NoSupervisor, postcopy.AttachTimeout):
                    if time.monotonic() > limit:
                        raise
                    time.sleep(0.05)

    def close(self) -> None:
        """Private writes end with it; what stands in our slots stays."""
        for block in self.blocks:
            block.close()
        self.blocks = []
        self.written = [{}, {}]

    def read(self, block: int, page: int) -> bytes:
        return bytes(self.blocks[block].buf[page * PAGE : (page + 1) * PAGE])

    def syscall(self, block: int, page: int) -> bytes:
        """The kernel reads the page for us: it waits for it inside of write(2)."""
        with self.blocks[block].buf[page * PAGE : (page + 1) * PAGE] as view:
            os.write(self.pipe[1], view)
        return os.read(self.pipe[0], PAGE)

    def look(self, block: int, page: int, read: Callable[[int, int], bytes] | None = None) -> int:
        """Read a page and check it: the number of wrong bytes."""
        cold = self.blocks[block].resident(page * PAGE, 1) == 0.0
        begun = time.monotonic_ns()
        found = (read or self.read)(block, page)
        now = time.monotonic_ns()
        if cold:
            self.row[progress.COLD + block] += 1
            self.row[progress.BEGAN + block] = begun
            self.row[progress.LAST_COLD + block] = now
            self.row[progress.SLOWEST] = max(self.row[progress.SLOWEST], now - begun)
        self.row[progress.CHECKED] += PAGE
        wrong = self.wrong_bytes(block, page, found)
        if wrong:
            self.row[progress.WRONG] += len(wrong)
            self.find(block, page, found, wrong)
        return len(wrong)

    def run_of_pages(self, block: int, page: int) -> None:
        for number in range(page, min(page + 32, self.pages)):
            self.look(block, number)

    def wrong_bytes(self, block: int, page: int, found: bytes) -> list[int]:
        ours = {self.seat: self.slots[block][page]} if page in self.slots[block] else None
        mine = self.written[block].get(page)
        if mine is None:
            return self.contents.check(block + 1, page, found, ours)
        offset, data = mine
        wrong = [offset + at for at in range(len(data)) if found[offset + at] != data[at]]
        want = self.contents.page(block + 1, page)
        plain = found[:offset] + want[offset : offset + len(data)] + found[offset + len(data) :]
        return wrong + self.contents.check(block + 1, page, plain, ours)

    def write(self, block: int, page: int) -> None:
        if self.mode == "private":
            if len(self.written[block]) < MOST_WRITTEN and page not in self.written[block]:
                data = self.random.randbytes(self.random.randint(1, 64))
                offset = self.random.randrange(ZONE - len(data))
                at = page * PAGE + offset
                self.blocks[block].buf[at : at + len(data)] = data
                self.written[block][page] = (offset, data)
        else:
            page -= page % SLOT_EVERY
            word = self.contents.slot_key(block + 1, page, self.seat) << 32 | self.random.getrandbits(32)
            at = page * PAGE + ZONE + 8 * self.seat
            with self.blocks[block].buf[at : at + 8].cast("Q") as slot:
                slot[0] = word  # one store: nobody sees half of it
            self.slots[block][page] = word
        self.look(block, page)

    def fork(self, block: int, page: int) -> None:
        """The child is a client of its own at once, private writes included; it looks at some pages and ends."""
        pid = os.fork()
        if pid == 0:
            os._exit(self._child(block, page))
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        kind = {0: "good", NOT_ATTACHED: "not attached", WRONG: "wrong"}.get(code, f"ended with {code}")
        self.children[kind] = self.children.get(kind, 0) + 1
        self.row[progress.FORKS] += 1
        if kind.startswith("ended"):
            say({"child": kind, "seat": self.seat})

    def _child(self, block: int, page: int) -> int:
        try:
            for number in (0, 1):
                self.blocks[number].ensure(0, 1)  # says by an exception that it could not be attached
            pages = [(block, page), *((place, number) for place in (0, 1) for number in list(self.written[place])[:8])]
            return WRONG if any(self.look(*one) for one in pages) else 0
        except postcopy.PageLost as lost:
            if "after a fork" in str(lost):
                return NOT_ATTACHED
            say({"child": str(lost), "seat": self.seat})
            return 1
        except BaseException as error:
            say({"child": f"{type(error).__name__}: {error}", "seat": self.seat})
            return 1

    def last_pass(self) -> None:
        """Everything once more; whoever waits here waits for a page that nobody may owe him."""
        for block in (0, 1):
            start = self.random.randrange(self.pages)
            for number in range(self.pages):
                page = (start + number) % self.pages
                self.doing("last pass", block, page, lambda block=block, page=page: self.look(block, page))  # type: ignore[misc]

    def find(self, block: int, page: int, found: bytes, wrong: list[int]) -> None:
        self.findings += 1
        if self.findings <= MOST_FINDINGS:
            say(
                {
                    "wrong": len(wrong),
                    "first": wrong[0],
                    "block": block + 1,
                    "page": page,
                    "seat": self.seat,
                    "mode": self.mode,
                    "looks_like": self.contents.describe(found),
                    "written": page in self.written[block],
                    "found": found[wrong[0] : wrong[0] + 16].hex(),
                    "at": time.time(),
                }
            )


def _order(pages: int, run: int, seed: int) -> list[int]:
    """All pages, shuffled in runs of ``run``: the way that the front takes."""
    starts = list(range(0, pages, run))
    random.Random(seed).shuffle(starts)
    return [page for start in starts for page in range(start, min(start + run, pages))]


def say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def run(program: Program) -> int:
    """The life of one program; returns its exit status."""
    faulthandler.register(signal.SIGUSR1)
    program.row[progress.PID] = os.getpid()
    why = program.live()
    say({"end": why, "seat": program.seat, "findings": program.findings, "children": program.children})
    return 0


if __name__ == "__main__":
    sys.exit(run(Program(json.loads(sys.argv[1]))))
