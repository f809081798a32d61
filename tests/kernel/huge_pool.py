"""Huge pages for a test: reserved, counted on exactly, given back."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from postcopy_kernel.memory import huge_pages

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
PATIENCE = 60.0  # seconds that others may keep the pool
BACK_WITHIN = 5.0  # seconds that the memory of a process that has just ended may take to come back


@contextmanager
def reserved(pages: int) -> Iterator[None]:
    """Exactly ``pages`` available huge pages of 2 MiB, for this block alone on the whole machine.

    The pool is the machine's: xdist groups keep the workers of one run apart, the lock all runs (and the workers too,
    where a version of xdist does not know the groups of its pytest).
    """
    with POOL.open("rb") as lock:
        _take(lock)
        before = huge_pages()
        try:
            POOL.write_text(str(before.total - before.available + pages))
            assert huge_pages().available == pages, f"the kernel cannot make {pages} huge pages"
            yield
        finally:
            POOL.write_text(str(before.total))
        limit = time.monotonic() + BACK_WITHIN
        while huge_pages() != before and time.monotonic() < limit:
            time.sleep(0.02)
        assert huge_pages() == before, "the pool of huge pages is not as it was"


def _take(lock: BinaryIO) -> None:
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert time.monotonic() < limit, "somebody else keeps the pool of huge pages"
            time.sleep(0.02)
