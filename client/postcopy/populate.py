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
from typing import Protocol

from .deadline import Deadline
from .errors import PageTimeout

log = logging.getLogger("postcopy")

STEP = 4 << 20
"""Bytes of one populate: this much may still arrive after an abandoned wait."""

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
        self.abandoned = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._steps()
        except Exception as error:
            self.error = error
        finally:
            self.finished.set()

    def _steps(self) -> None:
        for offset in range(self.start, self.stop, STEP):
            if self.abandoned:
                return
            length = min(STEP, self.stop - offset)
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
        raise PageTimeout(
            f"block {job.block.name}: bytes {job.start} to {job.stop} did not all arrive within {deadline.seconds} s"
        )
    thread.join()  # so that a fork after this call finds one thread less (Python 3.12 warns of threads)
    if job.error is not None:
        raise job.error


class Prefetcher:
    """One daemon thread in a process that runs the jobs of prefetch() in order. It ends when no job is left: a fork
    beside a thread is a warning from Python 3.12 on."""

    def __init__(self) -> None:
        self._jobs: deque[PopulateJob] = deque()
        self._changing = threading.RLock()  # a signal handler may call prefetch() in the middle of a prefetch()
        self._thread: threading.Thread | None = None

    def submit(self, job: PopulateJob) -> None:
        with self._changing:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="postcopy-prefetch", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while job := self._take():
            job.run()
            if job.error is not None:  # a read of the page reports the error; prefetch() promises nothing
                log.debug("prefetch: %s", job.error)
            del job  # otherwise this thread would keep the last block alive

    def _take(self) -> PopulateJob | None:
        with self._changing:
            if self._jobs:
                return self._jobs.popleft()
            self._thread = None
            return None


prefetcher = Prefetcher()


def forget_threads() -> None:
    """In a forked child: the helper threads do not exist there."""
    global prefetcher
    prefetcher = Prefetcher()
