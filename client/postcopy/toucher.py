"""A client process of the load test: ``python -m postcopy.toucher JOB``, with the job as JSON.

It attaches, says ``{"ready": PID}`` on its stdout, and works through the steps of its job::

    {"do": "wait"}                                             until a line (or the end) comes on stdin
    {"do": "touch", "pattern": P, "touches": N, "pages": [first, end]}
    {"do": "compare"}                                          every byte with the file, in order

At times it says ``{"touches": N}``, at the end ``{"result": {...}}`` or ``{"error": "..."}``. A line is one message.

A touch is a plain read of one byte, timed here. Only the first touch of a page by this client counts as a latency: the
later ones are memory accesses. The histogram has the layout of ``postcopy_protocol.statistics``.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from postcopy_kernel.process import die_with_parent
from postcopy_protocol import statistics
from postcopy_protocol.statistics import bucket

from .block import Block
from .client import attach
from .errors import PostcopyError

_TELL_EVERY_NS = 200_000_000
_PIECE = 1 << 20
_SCATTER = 2654435761  # a large prime: spreads the popular pages of the zipf pattern over the block


class Toucher:
    """What one client does and finds."""

    def __init__(self, block: Block, job: dict[str, Any]) -> None:
        self.block = block
        self.memory = block.buf
        self.index: int = job["index"]
        self.clients: int = job["clients"]
        self.random = random.Random(job["seed"] + self.index)
        self.together = random.Random(job["seed"])  # the same in every client: lockstep
        self.file = os.open(job["file"], os.O_RDONLY) if job.get("file") else None
        self.barrier = Barrier(job["barrier"], self.index, self.clients)
        self.words = [0] * statistics.WORDS
        self.seen = bytearray(block.pages)
        self.touches = self.compared = self.wrong = 0
        self.first_wrong: int | None = None
        self._told = time.monotonic_ns()

    def work(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            match step["do"]:
                case "wait":
                    say({"waiting": self.touches})
                    sys.stdin.readline()
                case "touch":
                    self.touch(step)
                case "compare":
                    self.compare()

    def touch(self, step: dict[str, Any]) -> None:
        memory, size, last = self.memory, self.block.page_size, self.block.size - 1
        first, end = step.get("pages") or (0, self.block.pages)
        clock = time.perf_counter_ns
        for page in self.pages(step["pattern"], step["touches"], first, end):
            offset = min(page * size + self.touches % size, last)
            begun = clock()
            memory[offset]
            taken = clock() - begun
            self.touches += 1
            if not self.seen[page]:
                self.seen[page] = 1
                self.count(taken)
            if self.file is not None:
                self.check(page * size, min(size, self.block.size - page * size))
            if not self.touches & 63:
                self.tell()

    def count(self, taken: int) -> None:
        self.words[statistics.FAULTS] += 1
        self.words[bucket(taken)] += 1
        if taken > self.words[statistics.LONGEST_NS]:
            self.words[statistics.LONGEST_NS] = taken

    def pages(self, pattern: str, touches: int, first: int, end: int) -> Iterator[int]:
        """Page numbers of ``[first, end)`` in the order of the pattern."""
        span = end - first
        if pattern == "sequential":
            # Everybody starts somewhere else, so that together they cover the block early.
            start = span * self.index // self.clients
            yield from (first + (start + n) % span for n in range(touches))
        elif pattern == "zipf":
            yield from (first + (int(span ** self.random.random()) - 1) * _SCATTER % span for _ in range(touches))
        elif pattern == "lockstep":
            for step in range(touches):
                self.barrier.meet(step + 1)
                yield first + self.together.randrange(span)
        else:
            yield from (first + self.random.randrange(span) for _ in range(touches))

    def compare(self) -> None:
        for at in range(0, self.block.size, _PIECE):
            self.check(at, min(_PIECE, self.block.size - at))
            self.tell()

    def check(self, offset: int, length: int) -> None:
        assert self.file is not None
        found, wanted = bytes(self.memory[offset : offset + length]), os.pread(self.file, length, offset)
        self.compared += length
        if found != wanted:
            bad = [n for n in range(length) if found[n : n + 1] != wanted[n : n + 1]]
            self.wrong += len(bad)
            if self.first_wrong is None:
                self.first_wrong = offset + bad[0]

    def tell(self) -> None:
        now = time.monotonic_ns()
        if now - self._told >= _TELL_EVERY_NS:
            self._told = now
            say({"touches": self.touches})

    def result(self) -> dict[str, Any]:
        return {
            "touches": self.touches,
            "first_touches": self.words[statistics.FAULTS],
            "compared": self.compared,
            "wrong": self.wrong,
            "first_wrong": self.first_wrong,
            "words": self.words,
        }


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


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Do the job of ``sys.argv[1]``."""
    job = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the parent to explain
    die_with_parent(job["parent"])
    try:
        with attach(job["name"], job["runtime_dir"], job["mode"], job["timeout"]) as block:
            toucher = Toucher(block, job)
            say({"ready": os.getpid()})
            begun = time.perf_counter()
            toucher.work(job["steps"])
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
