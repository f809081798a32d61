"""A client process of the load test, forked by ``starter`` with a job.

It attaches, writes ``{"ready": PID}`` to its output, and works through the steps of its job::

    {"do": "wait"}                          until a line (the instant of the start, in ns) or the end of the input
    {"do": "touch", "pattern": P, ...}      see ``Touching``
    {"do": "compare"}                       compare every byte with the expected contents, in order

SIGINT ends the steps; the result then covers what was done before. During the steps it writes ``{"touches": N}``, at
the end ``{"result": {...}}`` or ``{"error": "..."}``. A line is one message.

A touch is a plain access of one byte, timed here. A single thread indexes the memory, the fastest access in Python. A
page fault in that access keeps the GIL, so several threads let the kernel touch the memory (a byte is written to, or
read from, a memfd) without the GIL. A compiled touch is better than both."""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from postcopy_kernel.compiled import load_touch
from postcopy_protocol.received_map import RECEIVED

from ..block import Block
from ..client import attach
from ..errors import PostcopyError
from . import replay
from .expected import ExpectedBytes, parse
from .patterns import Place, order
from .recorder import Recorder, together

REPORT_EVERY_NS = 200_000_000
OVERTIME = 1.0
"""An open loop that cannot keep up ends this many durations after its time; touches that were due are missed."""
STOP_SECONDS = 1.0
"""A stopped client waits this long for threads that are in a fault or sleep."""
_PIECE = 1 << 20
_FAR = 1 << 62


@dataclass(frozen=True, slots=True)
class Touching:
    """A ``touch`` step. Times in seconds, 0: no limit, no pause. ``rate``: touches a second of this client, however
    long they take (open loop); 0: each touch follows the previous one (closed loop). ``writes``: share of writes."""

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
    """A trace: the pages of its clients at its times, ``speed`` times as fast (0: no pauses), instead of a pattern."""
    speed: float = 1.0
    library: str = ""
    """A compiled touch (see ``postcopy_kernel.compiled``) instead of Python's."""
    together: bool = False
    """In order, all clients begin at the first page."""


class Stopped(BaseException):
    """SIGINT has arrived: the result is what was measured until now."""


class Toucher:
    """Runs the steps of one client and collects its result."""

    def __init__(self, block: Block, job: dict[str, Any], slots: int) -> None:
        self.block = block
        self.memory = block.buf
        self.index: int = job["index"]
        self.clients: int = job["clients"]
        self.seed: int = job["seed"]
        self.expected: ExpectedBytes | None = parse(job["verify"]) if job.get("verify") else None
        self.barrier = Barrier(slots, self.index, self.clients)
        self.seen = bytearray(block.pages)
        self.compared = self.wrong = 0
        self.first_wrong: int | None = None
        self.origin = time.monotonic_ns()
        self.recorders: list[Recorder] = []
        self._reported = time.monotonic_ns()
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
            if step.get("replay"):  # before the start: the time to read a long trace is not part of the test
                self.recorded = replay.share(step["replay"], self.block.name, self.index)
        for step in steps:
            match step["do"]:
                case "wait":
                    write_message({"waiting": self.touches})
                    self.origin = int(sys.stdin.readline() or time.monotonic_ns())
                case "touch":
                    self.touch(Touching(**{key: value for key, value in step.items() if key != "do"}))
                case "compare":
                    self.compare()

    @property
    def touches(self) -> int:
        return sum(recorder.touches for recorder in self.recorders)

    def touch(self, step: Touching) -> None:
        """Run all threads of a step."""
        sleep_until(self.origin + int(step.ramp * 1e9 * self.index / self.clients))
        touchers = [TouchThread(self, step, number) for number in range(step.threads)]
        self.recorders += [toucher.recorder for toucher in touchers]
        if step.threads == 1:
            touchers[0].run()
        else:
            threads = [threading.Thread(target=toucher.guarded, daemon=True) for toucher in touchers]
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
        if failed := [toucher.failure for toucher in touchers if toucher.failure]:
            raise failed[0]

    def compare(self) -> None:
        for at in range(0, self.block.size, _PIECE):
            self.check(at, min(_PIECE, self.block.size - at))
            self.report()

    def check(self, offset: int, length: int) -> None:
        assert self.expected is not None
        found, wanted = bytes(self.memory[offset : offset + length]), self.expected(offset, length)
        with self._lock:
            self.compared += length
            if found != wanted:
                bad = [n for n in range(length) if found[n : n + 1] != wanted[n : n + 1]]
                self.wrong += len(bad)
                if self.first_wrong is None:
                    self.first_wrong = offset + bad[0]

    def report(self) -> None:
        now = time.monotonic_ns()
        if now - self._reported >= REPORT_EVERY_NS:
            with self._lock:
                self._reported = now
                write_message({"touches": self.touches})

    def result(self) -> dict[str, Any]:
        record = together([recorder.document() for recorder in self.recorders])
        found = {"compared": self.compared, "wrong": self.wrong, "first_wrong": self.first_wrong}
        return {**record, "first_touches": sum(record["latency"][64:]), **found}


class TouchThread:
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
        """``run`` in a thread; an error is kept for the main thread."""
        try:
            self.run()
        except Exception as error:
            self.failure = error

    def run(self) -> None:
        toucher, recorder, access, seen = self._toucher, self.recorder, self._access, self._toucher.seen
        size, last = toucher.block.page_size, toucher.block.size - 1
        clock, writes, expected = time.monotonic_ns, self._step.writes, toucher.expected
        received = toucher.block.received
        for number, (page, due, wrote) in enumerate(self._replayed() if self._step.replay else self._due(), 1):
            offset = min(page * size + number % size, last)
            # Writes are spread evenly: with a share of 0.3 the 4th, 7th, 10th, 14th ... touch writes.
            value = -1
            if wrote or (writes and int(number * writes) != int((number - 1) * writes)):
                value = expected(offset, 1)[0] if expected is not None else number & 0xFF
            missing = received[page] != RECEIVED
            begun = clock()
            taken = access(offset, value)
            ended = begun + taken if taken else clock()
            recorder.touch(begun, ended, due or begun, first=not seen[page], missing=missing)
            seen[page] = 1
            if expected is not None:
                toucher.check(page * size, min(size, toucher.block.size - page * size))
            if not number & 63:
                toucher.report()
            if toucher.stopped:
                return

    def _replayed(self) -> Iterator[tuple[int, int, bool]]:
        """As ``_due``, from a trace. It may be a trace of another block of that name."""
        step, toucher, begin = self._step, self._toucher, time.monotonic_ns()
        mine = toucher.recorded[self._thread :: step.threads]
        writable = toucher.expected is not None or toucher.block.mode == "private"
        end = begin + int(step.seconds * 1e9) if step.seconds else _FAR
        for at, page, write in mine[: step.touches or None]:
            due = begin + int(at / step.speed) if step.speed else 0
            if max(due, time.monotonic_ns()) >= end:
                return
            if page < toucher.block.pages:
                yield page, (sleep_until(due) or due) if due else 0, write and writable

    def _due(self) -> Iterator[tuple[int, int, bool]]:
        """Pages, each at its time, with the instant at which it was due (0: immediately) and whether to write it
        (here: decided by the share of writes)."""
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
            # A late wake-up of our sleep does not count as latency; a delay by the previous touch does.
            yield next(pages), sleep_until(due) or due, False

    def _pages(self) -> Iterator[int]:
        step, toucher = self._step, self._toucher
        first, end = step.pages or (0, toucher.block.pages)
        index = toucher.index * step.threads + self._thread
        place = Place(index, toucher.clients * step.threads, first, end, toucher.seed, step.stride)
        return order("together" if step.together else step.pattern, place, toucher.barrier.meet)


class Access(Protocol):
    """Touches one byte: reads it, or writes ``value`` (0 to 255) unless that is -1. Returns the nanoseconds that it
    took, if it measured them itself."""

    def __call__(self, offset: int, value: int, /) -> int | None: ...


def direct(memory: memoryview) -> Access:
    """Touch in Python, with the GIL."""

    def access(offset: int, value: int) -> None:
        if value < 0:
            memory[offset]
        else:
            memory[offset] = value

    return access


def by_kernel(memory: memoryview) -> Access:
    """Touch by system calls, which sleep in the fault without the GIL."""
    sink = os.memfd_create("postcopy-sink", os.MFD_CLOEXEC)
    data = os.memfd_create("postcopy-data", os.MFD_CLOEXEC)
    os.pwrite(data, bytes(range(256)), 0)

    def access(offset: int, value: int) -> None:
        byte = memory[offset : offset + 1]
        if value < 0:
            os.pwrite(sink, byte, 0)
        else:
            os.preadv(data, [byte], value)

    return access


def compiled(address: int, library: str) -> Access:
    """Touch and time in C, without the GIL."""
    touch = load_touch(library)
    return lambda offset, value: touch(address + offset, value)


def sleep_until(instant: int) -> int:
    """Sleep until an instant (CLOCK_MONOTONIC, ns). Returns the instant of waking up; 0 if the instant had passed."""
    ahead = instant - time.monotonic_ns()
    if ahead <= 0:
        return 0
    time.sleep(ahead / 1e9)
    return time.monotonic_ns()


class Barrier:
    """Clients meet before each step: each writes its step into a shared page, and yields until all have written it.

    The group's process writes a huge number for a client that died, so the others do not wait for it."""

    def __init__(self, fd: int, index: int, clients: int) -> None:
        self._index = index
        self._steps = memoryview(mmap.mmap(fd, 8 * clients)).cast("Q")

    def meet(self, step: int) -> None:
        self._steps[self._index] = step
        while any(other < step for other in self._steps):
            os.sched_yield()

    def leave(self) -> None:
        """The other clients no longer wait for this one."""
        self._steps[self._index] = _FAR


def write_message(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def run(job: dict[str, Any], slots: int) -> int:
    """Do a job in this process, with ``slots`` as the shared page of the barrier. Returns the exit status."""
    try:
        with attach(job["name"], job["runtime_dir"], job["mode"], job["timeout"]) as block:
            toucher = Toucher(block, job, slots)
            write_message({"ready": os.getpid()})
            begun = time.perf_counter()
            try:
                signal.signal(signal.SIGINT, toucher.stop)
                toucher.work(job["steps"])
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is complete
            except Stopped:
                toucher.barrier.leave()
            write_message({"result": {**toucher.result(), "seconds": time.perf_counter() - begun}})
            toucher.memory.release()
            sys.stdin.readline()  # stay attached until all clients are done, so that the status still shows this one
    except PostcopyError as error:
        write_message({"error": str(error)})
        return 1
    except Exception as error:
        write_message({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0
