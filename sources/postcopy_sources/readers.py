"""The threads behind the loop: reads that may wait, each with a deadline, urgent ones first.

A read that does not return in time is given up: its pages are lost. Its thread goes on, because nothing can end a
Python thread, and another one takes its place, up to MAX_STUCK of them. When every thread hangs, reads that wait are
given up too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

from .answers import Answer

MAX_STUCK = 16  # threads that may hang before no more are started in their place

log = logging.getLogger(__name__)


class Job(Protocol):
    """One read. ``begun`` and ``over`` belong to Readers."""

    begun: float
    over: bool

    def read(self) -> Answer:
        """Read; raises nothing."""

    def done(self, answer: Answer) -> None:
        """Take the answer. Called once, in the reading thread, or in the one that checks when the read is given up."""

    def give_up(self, reason: str) -> Answer:
        """The answer for a read that is given up."""


class Readers:
    """``count`` threads, started when they are first needed."""

    def __init__(self, count: int, timeout: float) -> None:
        self._count = count
        self._timeout = timeout
        self._changed = threading.Condition()
        self._urgent: deque[Job] = deque()
        self._background: deque[Job] = deque()
        self._running: set[Job] = set()
        self._idle = 0
        self._threads = 0
        self._stuck = 0

    def put(self, job: Job, *, urgent: bool) -> None:
        """Read in a thread, urgent jobs first."""
        with self._changed:
            (self._urgent if urgent else self._background).append(job)
            if self._idle < len(self._urgent) + len(self._background) and self._threads < self._count:
                self._start()
            self._changed.notify()

    @property
    def busy(self) -> bool:
        """Is anything being read, or waiting to be?"""
        return bool(self._running or self._urgent or self._background)

    def check(self) -> None:
        """Give up reads that take too long. The loop calls it in every tick."""
        if not self.busy:
            return
        with self._changed:
            late = time.monotonic() - self._timeout
            lost = [job for job in self._running if job.begun < late]
            for job in lost:
                self._abandon(job)
            if self._threads == 0:
                lost += [*self._urgent, *self._background]
                self._urgent.clear()
                self._background.clear()
        for job in lost:
            job.done(job.give_up(f"the source did not answer within {self._timeout:g} s"))

    def _abandon(self, job: Job) -> None:
        job.over = True
        self._running.discard(job)
        self._threads -= 1
        self._stuck += 1
        log.error("a read of the source does not return: %d threads hang", self._stuck)
        if self._urgent or self._background:
            self._start()

    def _start(self) -> None:
        if self._stuck < MAX_STUCK:
            threading.Thread(target=self._run, name="reader", daemon=True).start()
            self._threads += 1

    def _run(self) -> None:
        while True:
            job = self._take()
            answer = job.read()
            with self._changed:
                if job.over:  # given up meanwhile, and this thread with it
                    self._stuck -= 1
                    return
                self._running.discard(job)
            job.done(answer)

    def _take(self) -> Job:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._urgent or self._background)
            self._idle -= 1
            job = (self._urgent or self._background).popleft()
            job.begun = time.monotonic()
            self._running.add(job)
            return job
