"""How much memory may be filled before it is asked for: the rest of ``--max-memory``, and what the machine has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

SCARCE = 128 << 20  # bytes available on the machine below which only pages that a client waits for are placed
UNLIMITED = 1 << 62


class MemoryBudget:
    """``memories``: descriptors of the blocks' memfds; ``max_memory`` and ``reserve`` in bytes (0: no limit)."""

    def __init__(self, memories: Sequence[int], max_memory: int, reserve: int) -> None:
        self._memories, self._max_memory, self._reserve = memories, max_memory, reserve

    def left(self, in_flight: int) -> int:
        """Bytes that may still be placed unasked, when ``in_flight`` bytes are on their way."""
        if not self._max_memory:
            return UNLIMITED
        placed = sum(os.fstat(memory).st_blocks * 512 for memory in self._memories)
        return self._max_memory - placed - in_flight

    def enough(self, in_flight: int) -> bool:
        """False: only pages that a client waits for may be placed."""
        return available_memory() > SCARCE and self.left(in_flight) >= self._reserve


def available_memory() -> int:
    """Bytes that the machine can still give without swapping (MemAvailable); 1 GiB where that cannot be read, for
    instance because no descriptor is left."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 30
