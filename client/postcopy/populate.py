"""Waiting for pages without blocking the process: MADV_POPULATE_READ in a helper thread, a few MiB at a time.

Signals do not interrupt a populate, and it touches memory like any reader. So it runs in its own thread without the
GIL, and the caller waits on an event, where timeouts and Ctrl-C work. It reports EHWPOISON where a plain read would
raise SIGBUS."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from .deadline import Deadline
from .errors import PageTimeout

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("postcopy")

STEP = 4 << 20
"""Bytes of one populate: this much may still arrive after an abandoned wait."""

WAITERS = 16
"""Threads that wait for the pages of all calls of ensure_async."""

_EHWPOISON = 133  # no constant in Python

POISONED = (_EHWPOISON, errno.EFAULT)
"""The kernel reports EHWPOISON for a poisoned page, and EFAULT for a page that raises SIGBUS for another reason."""


class Memory(Protocol):
    """What a job needs of a block."""

    name: str
    page_size: int

    def populate(self, offset: int, length: int) -> int | None:
        """Populate whole pages. Returns 0, an errno, or None when the block is closed."""

    def lost(self, offset: int) -> Exception:
        """The exception for a lost page."""


class PopulateJob:
    """Populate the pages of ``[start, stop)``; both are multiples of the page size."""

    def __init__(self, block: Memory, start: int, stop: int) -> None:
        self.block = block
        self.start, self.stop = start, stop
        self.finished = threading.Event()
        self.on_finished: Callable[[], object] = self.finished.set
        self.abandoned = False
        self.error: Exception | None = None
        self._next = start

    def run(self) -> None:
        while not self.step():
            pass

    def step(self) -> bool:
        """Populate the next STEP bytes. True: the job is finished."""
        more = False
        try:
            if not self.abandoned and self._next < self.stop:
                self._populate(self._next, min(STEP, self.stop - self._next))
                self._next += STEP
                more = self._next < self.stop
        except Exception as error:
            self.error = error
        if not more:
            self.on_finished()
        return not more

    def _populate(self, offset: int, length: int) -> None:
        code = self.block.populate(offset, length)
        if code:
            raise self._failure(code, offset, length)
        if code is None:
            raise ValueError(f"block {self.block.name} was closed during the wait")

    def _failure(self, code: int, offset: int, length: int) -> Exception:
        if code not in POISONED:
            return OSError(code, f"block {self.block.name} at offset {offset}: {os.strerror(code)}")
        for page in range(offset, offset + length, self.block.page_size):
            if self.block.populate(page, self.block.page_size) in POISONED:
                return self.block.lost(page)
        return self.block.lost(offset)


def wait_for(job: PopulateJob, deadline: Deadline) -> None:
    """Run ``job`` in a helper thread and wait for it. Raises the job's error, or PageTimeout."""
    thread = threading.Thread(target=job.run, name="postcopy-ensure", daemon=True)
    thread.start()
    try:
        done = job.finished.wait(deadline.remaining())
    except BaseException:
        job.abandoned = True
        raise
    if not done:
        job.abandoned = True
        raise _late(job, deadline)
    thread.join()  # so that a fork after this call finds one thread less (Python 3.12 warns of threads)
    if job.error is not None:
        raise job.error


def _late(job: PopulateJob, deadline: Deadline) -> PageTimeout:
    text = f"bytes {job.start} to {job.stop} did not all arrive within {deadline.seconds} s"
    return PageTimeout(f"block {job.block.name}: {text}")


async def wait_async(job: PopulateJob, deadline: Deadline, *, present: bool) -> None:
    """Wait for ``job`` in an event loop. Raises the job's error, or PageTimeout. ``present``: its pages need no wait,
    so they do not queue behind those that do."""
    import asyncio

    loop = asyncio.get_running_loop()
    finished: asyncio.Future[None] = loop.create_future()
    job.on_finished = lambda: _finish_soon(loop, finished)
    populator = present_pages if present else waiters
    populator.submit(job)
    try:
        async with asyncio.timeout(deadline.remaining()):
            await finished
    except TimeoutError:
        raise _late(job, deadline) from None
    finally:
        populator.withdraw(job)
    if job.error is not None:
        raise job.error


def _finish_soon(loop: asyncio.AbstractEventLoop, finished: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and no task waits
        loop.call_soon_threadsafe(_finish, finished)


def _finish(finished: asyncio.Future[None]) -> None:
    if not finished.done():
        finished.set_result(None)


class Populator:
    """At most ``most`` daemon threads that run jobs. They end when no job is left: a fork beside a thread is a warning
    from Python 3.12 on. ``in_turn``: one step of each job after the other, instead of one job after the other."""

    def __init__(self, name: str, most: int = 1, *, in_turn: bool = False) -> None:
        self._name, self._most, self._in_turn = name, most, in_turn
        self._jobs: deque[PopulateJob] = deque()
        self._changing = threading.RLock()  # a signal handler may call prefetch() in the middle of a prefetch()
        self._threads = 0

    def submit(self, job: PopulateJob) -> None:
        with self._changing:
            self._jobs.append(job)
            if self._threads < self._most:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._threads += 1

    def withdraw(self, job: PopulateJob) -> None:
        """The job is no longer wanted: a step that runs is its last."""
        job.abandoned = True
        with self._changing, suppress(ValueError):
            self._jobs.remove(job)

    def _work(self) -> None:
        while job := self._take():
            if not job.step():
                with self._changing:
                    (self._jobs.append if self._in_turn else self._jobs.appendleft)(job)
            elif job.error is not None:  # prefetch() promises nothing: a read of the page reports the error
                log.debug("%s: %s", self._name, job.error)
            del job  # otherwise this thread would keep the last block alive

    def _take(self) -> PopulateJob | None:
        with self._changing:
            if self._jobs:
                return self._jobs.popleft()
            self._threads -= 1
            return None


def _populators() -> tuple[Populator, Populator, Populator]:
    """For prefetch(), for ensure_async(), and for ensure_async() of pages that are present."""
    name = "postcopy-prefetch"
    return Populator(name), Populator("postcopy-async", WAITERS, in_turn=True), Populator("postcopy-present")


prefetcher, waiters, present_pages = _populators()


def forget_threads() -> None:
    """In a forked child: the helper threads do not exist there."""
    global prefetcher, waiters, present_pages
    prefetcher, waiters, present_pages = _populators()
