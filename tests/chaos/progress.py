"""How far every client is: one row of words for each seat, in a file that all map. Clients write, the run reads.

A client that waits stands still in its row, which is what makes a wait visible: ``SINCE`` is when the operation that it
is in began (0: it is in none).
"""

from __future__ import annotations

import mmap
from pathlib import Path

WORDS = 16
PID, OPERATIONS, SINCE, WHAT, WRONG, SLOWEST, CHECKED, FORKS, ATTACHES, COLD = range(10)
LAST_COLD, BEGAN = COLD + 2, COLD + 4
"""``COLD``, ``LAST_COLD`` and ``BEGAN`` are the first of two words, one a block: missing pages touched and served, when
the last of them was served and when its touch began (CLOCK_MONOTONIC, ns). ``SLOWEST`` is the longest such touch in ns,
``CHECKED`` counts bytes."""
PHASE, RUN, FINISH = 0, 0, 1
BEGUN = 1
"""Row 0 is the run's own: its first word is the phase, the second when the chaos began (CLOCK_MONOTONIC, ns; 0: it has
not, because some clients have not attached yet)."""
OPERATION = (
    "nothing",
    "attach",
    "touch",
    "check",
    "write",
    "system call",
    "fork",
    "close",
    "last pass",
    "balloon",
    "race",
)


class Progress:
    """The table; ``seats`` rows behind row 0."""

    def __init__(self, path: Path, seats: int, *, make: bool = False) -> None:
        size = (seats + 1) * WORDS * 8
        if make:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._words = memoryview(self._map).cast("Q")

    def row(self, seat: int) -> memoryview:
        """Seat 1 is the first client's."""
        return self._words[seat * WORDS : (seat + 1) * WORDS]

    @property
    def phase(self) -> int:
        return self._words[PHASE]

    @phase.setter
    def phase(self, phase: int) -> None:
        self._words[PHASE] = phase

    @property
    def begun(self) -> float:
        """When the chaos began, in seconds; 0: not yet."""
        return self._words[BEGUN] / 1e9

    def begin(self, at: float) -> None:
        self._words[BEGUN] = int(at * 1e9)

    def clear(self, seat: int, pid: int) -> None:
        """A new client sits there; what its predecessors did still counts."""
        row = self.row(seat)
        row[SINCE] = row[WHAT] = row[LAST_COLD] = row[LAST_COLD + 1] = 0
        row[PID] = pid

    def close(self) -> None:
        self._words.release()
        self._map.close()


def where(what: int) -> str:
    """``WHAT`` in words."""
    operation, block, page = what & 0xF, what >> 4 & 0xF, what >> 8
    return f"{OPERATION[operation]} at page {page} of block {block}" if block else OPERATION[operation]
