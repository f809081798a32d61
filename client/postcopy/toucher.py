"""A client process of the load test: ``python -m postcopy.toucher JOB``, with the job as JSON.

It attaches, says ``{"ready": PID}`` on its stdout, and works through the steps of its job::

    {"do": "wait"}                          until a line (the instant of the start, in ns) or the end comes on stdin
    {"do": "touch", "pattern": P, ...}      see ``Touching``
    {"do": "compare"}                       every byte with the truth, in order

SIGINT ends the steps, and the result is of what was done until then.
At times it says ``{"touches": N}``, at the end ``{"result": {...}}`` or ``{"error": "..."}``. A line is one message.

A touch is a plain access of one byte, timed here. One toucher indexes the memory, which is the fastest that Python
can. A page fault in the middle of that keeps the GIL, so where several threads touch the kernel does it for them
(a byte is written to, or read from, a memfd), without the GIL. A compiled touch, where asked for, is better than both.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from postcopy_kernel.compiled import load_touch
from postcopy_kernel.process import die_with_parent
from postcopy_protocol.received_map import RECEIVED

from .block import Block
from .client import attach
from .errors import PostcopyError
from .load import replay
from .load.patterns import Place, order
from .load.recorder import Recorder, together
from .load.truth import Truth, parse

TELL_EVERY_NS = 200_000_000
OVERTIME = 1.0
"""An open loop that cannot keep up is ended this many durations after its time; what was due is counted as missed."""
STOP_SECONDS = 1.0
"""For so long a stopped client waits for those of its threads that stand in a fault or sleep."""
_PIECE = 1 << 20
_FAR = 1 << 62


@dataclass(frozen=True, slots=True)
class Touching:
    """A ``touch`` step. Times in seconds, 0: no limit, no pause. ``rate``: touches a second of this client, whatever
    they take (open loop); 0: the next when the last is over (closed loop). ``writes``: share of touches that write."""

    pattern: str = "random"
    touches: int = 0
    pages: tuple[int, int] | None = None
    seconds: float = 0.0
    rate: float = 0.0
    think: float = 0.0
    ramp: float = 0.0
    threads: int = 1
    writes: float = 0.0
    stride: int = 16
    replay: str = ""
    """A trace: its clients' pages instead of a pattern, at its times (``speed`` times as fast; 0: no pauses)."""
    speed: float = 1.0
    library: str = ""
    """A compiled touch (see ``postcopy_kernel.compiled``) instead of Python's."""


class Stopped(BaseException):
    """SIGINT: what is measured by now is the result."""


class Toucher:
    """What one client does and finds."""

    def __init__(self, block: Block, job: dict[str, Any]) -> None:
        self.block = block
        self.memory = block.buf
        self.index: int = job["index"]
        self.clients: int = job["clients"]
        self.seed: int = job["seed"]
        self.truth: Truth | None = parse(job["verify"]) if job.get("verify") else None
        self.barrier = Barrier(job["barrier"], self.index, self.clients)
        self.seen = bytearray(block.pages)
        self.compared = self.wrong = 0
        self.first_wrong: int | None = None
        self.origin = time.monotonic_ns()
        self.recorders: list[Recorder] = []
        self._told = time.monotonic_ns()
        self._lock = threading.Lock()
        self.recorded: list[tuple[int, int, bool]] = []
        self.stopped = False

    def stop(self, *_: object) -> None:
        """The handler of SIGINT."""
        if not self.stopped:
            self.stopped = True
            raise Stopped

    def work(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if step.get("replay"):  # before anybody begins: what a long trace takes to read is not the memory's doing
                self.recorded = replay.share(step["replay"], self.block.name, self.index)
        for step in steps:
            match step["do"]:
                case "wait":
                    say({"waiting": self.touches})
                    self.origin = int(sys.stdin.readline() or time.monotonic_ns())
                case "touch":
                    self.touch(Touching(**{key: value for key, value in step.items() if key != "do"}))
                case "compare":
                    self.compare()

    @property
    def touches(self) -> int:
        return sum(recorder.touches for recorder in self.recorders)

    def touch(self, step: Touching) -> None:
        """All threads of a step, from its begin to its end."""
        sleep_until(self.origin + int(step.ramp * 1e9 * self.index / self.clients))
        strands = [Strand(self, step, thread) for thread in range(step.threads)]
        self.recorders += [strand.recorder for strand in strands]
        if step.threads == 1:
            strands[0].run()
        else:
            threads = [threading.Thread(target=strand.guarded, daemon=True) for strand in strands]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except Stopped:
                for thread in threads:
                    thread.join(STOP_SECONDS / len(threads))
                raise
        self.barrier.leave()
        if failed := [strand.failure for strand in strands if strand.failure]:
            raise failed[0]

    def compare(self) -> None:
        for at in range(0, self.block.size, _PIECE):
            self.check(at, min(_PIECE, self.block.size - at))
            self.tell()

    def check(self, offset: int, length: int) -> None:
        assert self.truth is not None
        found, wanted = bytes(self.memory[offset : offset + length]), self.truth(offset, length)
        with self._lock:
            self.compared += length
            if found != wanted:
                bad = [n for n in range(length) if found[n : n + 1] != wanted[n : n + 1]]
                self.wrong += len(bad)
                if self.first_wrong is None:
                    self.first_wrong = offset + bad[0]

    def tell(self) -> None:
        now = time.monotonic_ns()
        if now - self._told >= TELL_EVERY_NS:
            with self._lock:
                self._told = now
                say({"touches": self.touches})

    def result(self) -> dict[str, Any]:
        record = together([recorder.told() for recorder in self.recorders])
        found = {"compared": self.compared, "wrong": self.wrong, "first_wrong": self.first_wrong}
        return {**record, "first_touches": sum(record["words"][64:]), **found}


class Strand:
    """One touching thread."""

    def __init__(self, toucher: Toucher, step: Touching, thread: int) -> None:
        self._toucher = toucher
        self._step = step
        self._thread = thread
        self.recorder = Recorder(toucher.origin, open_loop=step.rate > 0 or bool(step.replay and step.speed))
        self.failure: Exception | None = None
        if step.library:
            self._access = compiled(toucher.block.mapping.address, step.library)
        else:
            self._access = direct(toucher.memory) if step.threads == 1 else by_kernel(toucher.memory)

    def guarded(self) -> None:
        """``run`` in a thread: what goes wrong is kept for the main one."""
        try:
            self.run()
        except Exception as error:
            self.failure = error

    def run(self) -> None:
        toucher, recorder, access, seen = self._toucher, self.recorder, self._access, self._toucher.seen
        size, last = toucher.block.page_size, toucher.block.size - 1
        clock, writes, truth = time.monotonic_ns, self._step.writes, toucher.truth
        received = toucher.block.received
        for number, (page, due, wrote) in enumerate(self._replayed() if self._step.replay else self._due(), 1):
            offset = min(page * size + number % size, last)
            # Spread evenly: of 100 touches with a share of 0.3 the 4th, 7th, 10th, 14th ... write.
            value = -1
            if wrote or (writes and int(number * writes) != int((number - 1) * writes)):
                value = truth(offset, 1)[0] if truth is not None else number & 0xFF
            missing = received[page] != RECEIVED
            begun = clock()
            taken = access(offset, value)
            ended = begun + taken if taken else clock()
            recorder.touch(begun, ended, due or begun, first=not seen[page], missing=missing)
            seen[page] = 1
            if truth is not None:
                toucher.check(page * size, min(size, toucher.block.size - page * size))
            if not number & 63:
                toucher.tell()
            if toucher.stopped:
                return

    def _replayed(self) -> Iterator[tuple[int, int, bool]]:
        """As ``_due``, from a trace. It may have been written by another block of the same name."""
        step, toucher, begin = self._step, self._toucher, time.monotonic_ns()
        mine = toucher.recorded[self._thread :: step.threads]
        writable = toucher.truth is not None or toucher.block.mode == "private"
        end = begin + int(step.seconds * 1e9) if step.seconds else _FAR
        for at, page, write in mine[: step.touches or None]:
            due = begin + int(at / step.speed) if step.speed else 0
            if max(due, time.monotonic_ns()) >= end:
                return
            if page < toucher.block.pages:
                yield page, (sleep_until(due) or due) if due else 0, write and writable

    def _due(self) -> Iterator[tuple[int, int, bool]]:
        """Pages, each when its time has come, with the instant at which it was due (0: at once, whenever that is), and
        whether it must be written (here: as the share of writes says)."""
        step, begin = self._step, time.monotonic_ns()
        end = begin + int(step.seconds * 1e9) if step.seconds else _FAR
        pages = self._pages()
        share, rest = divmod(step.touches, step.threads)
        mine = share + (self._thread < rest) if step.touches else 1 << 60
        if not step.rate:
            for number in range(mine):
                if step.think and number:
                    sleep_until(min(end, time.monotonic_ns() + int(step.think * 1e9)))
                if time.monotonic_ns() >= end:
                    return
                yield next(pages), 0, False
            return
        interval = 1e9 * step.threads / step.rate
        begin += int(interval * self._thread / step.threads)
        limit = end + int(OVERTIME * step.seconds * 1e9)
        for number in range(mine):
            due = begin + round(number * interval)
            if due >= end:
                return
            if time.monotonic_ns() >= limit:
                self.recorder.missed = min(mine, ceil((end - begin) / interval)) - number
                return
            # Our own alarm clock may be late; that is not the memory's doing. Late for another touch is.
            yield next(pages), sleep_until(due) or due, False

    def _pages(self) -> Iterator[int]:
        step, toucher = self._step, self._toucher
        first, end = step.pages or (0, toucher.block.pages)
        index = toucher.index * step.threads + self._thread
        place = Place(index, toucher.clients * step.threads, first, end, toucher.seed, step.stride)
        return order(step.pattern, place, toucher.barrier.meet)


Access = Callable[[int, int], int | None]
"""(offset, value): read the byte, or write ``value`` (0 to 255) where it is not -1. Nanoseconds that it took, where it
knows them better than its caller."""


def direct(memory: memoryview) -> Access:
    """By Python itself, with the GIL."""

    def access(offset: int, value: int) -> None:
        if value < 0:
            memory[offset]
        else:
            memory[offset] = value

    return access


def by_kernel(memory: memoryview) -> Access:
    """By system calls that sleep in the fault without the GIL."""
    sink = os.memfd_create("postcopy-sink", os.MFD_CLOEXEC)
    well = os.memfd_create("postcopy-well", os.MFD_CLOEXEC)
    os.pwrite(well, bytes(range(256)), 0)

    def access(offset: int, value: int) -> None:
        byte = memory[offset : offset + 1]
        if value < 0:
            os.pwrite(sink, byte, 0)
        else:
            os.preadv(well, [byte], value)

    return access


def compiled(address: int, library: str) -> Access:
    """By C, without the GIL, timed there."""
    touch = load_touch(library)
    return lambda offset, value: touch(address + offset, value)


def sleep_until(instant: int) -> int:
    """Sleep until an instant (CLOCK_MONOTONIC, ns) that is ahead; the instant of waking up, or 0 when there was
    nothing to sleep for."""
    ahead = instant - time.monotonic_ns()
    if ahead <= 0:
        return 0
    time.sleep(ahead / 1e9)
    return time.monotonic_ns()


class Barrier:
    """Clients meet before each step: everybody writes how far it is into a shared page and yields until all are.

    The parent writes a huge number for a client that died, so the others do not wait for it.
    """

    def __init__(self, fd: int, index: int, clients: int) -> None:
        self._index = index
        self._steps = memoryview(mmap.mmap(fd, 8 * clients)).cast("Q")

    def meet(self, step: int) -> None:
        self._steps[self._index] = step
        while any(other < step for other in self._steps):
            os.sched_yield()

    def leave(self) -> None:
        """Nobody needs to wait for us any more."""
        self._steps[self._index] = _FAR


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Do the job of ``sys.argv[1]``."""
    job = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there is anything to tell; Ctrl-C is the parent's to explain
    die_with_parent(job["parent"])
    try:
        with attach(job["name"], job["runtime_dir"], job["mode"], job["timeout"]) as block:
            toucher = Toucher(block, job)
            say({"ready": os.getpid()})
            begun = time.perf_counter()
            try:
                signal.signal(signal.SIGINT, toucher.stop)
                toucher.work(job["steps"])
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done that can be
            except Stopped:
                toucher.barrier.leave()
            say({"result": {**toucher.result(), "seconds": time.perf_counter() - begun}})
            toucher.memory.release()
            sys.stdin.readline()  # stay attached until everybody is done: the status still shows this client
    except PostcopyError as error:
        say({"error": str(error)})
        return 1
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
