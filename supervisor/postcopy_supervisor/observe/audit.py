"""The audit: finds pages that are present though this service did not place them, in rounds and on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..blocks import RamBlock
from ..event_log import RecordEvent

SECONDS = 5.0  # between two rounds through all blocks


class Auditor:
    """Goes through the blocks in turn; results are in their ``polluted``, and a new one is an event."""

    def __init__(self, blocks: Sequence[RamBlock], event: RecordEvent) -> None:
        self._blocks, self._event = blocks, event
        self._turn = 0
        self._due = 0.0

    def now(self) -> Iterator[None]:
        """A whole round, in steps of some milliseconds."""
        for block in self._blocks:
            before = block.polluted
            for _ in block.audit():
                yield
            self._report(block, before)

    def step(self, now: float) -> None:
        """Some milliseconds of a round, when one is due."""
        if now < self._due:
            return
        block = self._blocks[self._turn]
        before = block.polluted
        if not block.audit_step():
            return
        self._report(block, before)
        self._turn = (self._turn + 1) % len(self._blocks)
        if self._turn == 0:
            self._due = now + SECONDS

    def _report(self, block: RamBlock, before: tuple[tuple[int, int], ...]) -> None:
        if not block.polluted or block.polluted == before:
            return
        found, size = sum(last - first for first, last in block.polluted), block.page_size
        first, length = block.polluted[0][0] * size, (block.polluted[-1][1] - block.polluted[0][0]) * size
        self._event(
            "polluted",
            f"block {block.name}: {found} pages that this service did not place, from offset {first}",
            block=block.name,
            offset=first,
            length=length,
            cause="a mapping that is not registered made them",
        )
