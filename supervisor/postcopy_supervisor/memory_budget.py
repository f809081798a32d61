"""How much memory may be filled: the rest of ``--max-memory``, what the machine has, and what the cgroups leave."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from enum import IntEnum

from .memory_cgroup import UNLIMITED, MemoryCgroup, left_in

SCARCE = (
    128 << 20
)  # bytes left on the machine, or in a cgroup, below which only pages that a client waits for are placed
TIGHT = 24 << 20
"""Bytes left in a cgroup below which no page is requested or placed. What is in flight still fits."""
CALM_SECONDS = 0.25
SCARCE_SHARE, TIGHT_SHARE = 4, 16  # ... but no more than these parts of a cgroup's limit


class Supply(IntEnum):
    """What memory allows."""

    ENOUGH = 0
    SCARCE = 1  # only pages that a client waits for
    TIGHT = 2  # not even those: the kernel would end a process of the cgroup


class SteadySupply:
    """What memory allows, without flapping at a limit: worse counts at once, better when it has lasted."""

    def __init__(self) -> None:
        self.value = Supply.ENOUGH
        self._better_since: float | None = None

    def see(self, found: Supply, now: float) -> Supply:
        """The value after a look (``now`` in seconds)."""
        if found >= self.value:
            self.value, self._better_since = found, None
        elif self._better_since is None:
            self._better_since = now
        elif now - self._better_since >= CALM_SECONDS:
            self.value, self._better_since = found, None
        return self.value


class MemoryBudget:
    """``memories``: descriptors of the blocks' memfds; ``max_memory`` and ``reserve`` in bytes (0: no limit);
    ``cgroups``: those of this process, to which pages of remote blocks are charged; ``workers``: those of workers,
    which pay for pages of local blocks, where they have others."""

    def __init__(
        self,
        memories: Sequence[int],
        max_memory: int,
        reserve: int,
        cgroups: Sequence[MemoryCgroup] = (),
        workers: Sequence[MemoryCgroup] = (),
    ) -> None:
        self._workers = workers
        self._memories, self._max_memory, self._reserve, self._cgroups = memories, max_memory, reserve, cgroups
        self.unasked = UNLIMITED
        """Bytes that could be placed at the last look (``supply``) before a cgroup's memory became scarce."""

    def left(self, in_flight: int) -> int:
        """Bytes that may still be placed unasked, when ``in_flight`` bytes are on their way."""
        if not self._max_memory:
            return UNLIMITED
        placed = sum(os.fstat(memory).st_blocks * 512 for memory in self._memories)
        return self._max_memory - placed - in_flight

    def supply(self, in_flight: int) -> tuple[Supply, str]:
        """What memory allows now, and whose limit says so (empty: the machine's, or ``--max-memory``)."""
        worst, whose, self.unasked = _supply(self._cgroups, in_flight)
        if worst is Supply.ENOUGH and (available_memory() <= SCARCE or self.left(in_flight) < self._reserve):
            return Supply.SCARCE, ""
        return worst, whose

    def supply_of_workers(self) -> tuple[Supply, str] | None:
        """The same for pages of local blocks; None: workers are in our cgroups."""
        return _supply(self._workers, 0)[:2] if self._workers else None


def _supply(cgroups: Sequence[MemoryCgroup], in_flight: int) -> tuple[Supply, str, int]:
    """The worst of these, which it is, and the bytes that are left before one is scarce."""
    worst, whose, unasked = Supply.ENOUGH, "", UNLIMITED
    for cgroup in cgroups:
        left, limit = left_in(cgroup)
        if limit < UNLIMITED:
            found = supply_of(left - in_flight, limit)
            unasked = min(unasked, left - min(SCARCE, limit // SCARCE_SHARE))
            if found > worst:
                worst, whose = found, cgroup.path
    return worst, whose, unasked


def supply_of(left: int, limit: int) -> Supply:
    """What ``left`` bytes below a cgroup's ``limit`` allow."""
    if left <= min(TIGHT, limit // TIGHT_SHARE):
        return Supply.TIGHT
    return Supply.SCARCE if left <= min(SCARCE, limit // SCARCE_SHARE) else Supply.ENOUGH


def available_memory() -> int:
    """Bytes that the machine can still give without swapping (MemAvailable); 1 GiB where that cannot be read, for
    instance because no descriptor is left."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 30
