"""Who waits for a page, and for how long: of each client, once a second.

Workers and paging write nothing for it, so it costs a fault nothing. The kernel counts the threads that wait on each
userfaultfd. How long they wait follows from what is written anyway: when a worker began with the page that it is busy
with, which requests the engine has open, and whether a client's counters have changed since the last look. So an age
may be a second too short, and a wait shorter than a second may be missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from postcopy_kernel.userfaultfd import stuck_faults
from postcopy_protocol import counters

from .blocks import RamBlock
from .clients.client import Client, Clients
from .clients.worker_zero import NUMBER as ZERO
from .paging.engine import Engine

RETRIES = 8
"""Faults that a worker may answer between two looks without a page placed, while its client still counts as waiting:
where memory is short it tries again, ever more rarely."""
KEEPS_FAULTING = frozenset((counters.DEDUPLICATED, counters.LOST, counters.FAILURES))

Key = tuple[int, int, int]
"""Waiter, block and page."""
Look = Callable[[int], tuple[int, int]]
"""Unread faults and waiting threads of a userfaultfd."""


@dataclass(frozen=True, slots=True)
class BlockWait:
    """``since``: when the oldest of these faults began, or was first seen (monotonic seconds)."""

    block: int
    faults: int
    since: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Waiting faults of one client. ``unread``: those that its worker has not read."""

    faults: int
    unread: int
    since: float
    blocks: tuple[BlockWait, ...]


@dataclass(slots=True)
class Stall:
    """A client that waits, since its figures changed last."""

    done: int
    faults: int
    since: float
    block: int = 0  # where it waits; 0: not looked for yet


class Waits:
    """Looked at by the main thread; ``by_client`` is replaced and never changed, so any thread may read it."""

    def __init__(
        self, blocks: Mapping[int, RamBlock], clients: Clients, engine: Engine, look: Look = stuck_faults
    ) -> None:
        self.by_client: Mapping[int, Wait] = {}
        """Clients that wait; ZERO is the supervisor itself."""
        self._blocks, self._clients, self._engine, self._look = blocks, clients, engine, look
        self._requested: dict[Key, float] = {}  # when each request of a waiter was seen first
        self._stalls: dict[int, Stall] = {}

    def tick(self, now: float) -> None:
        """Look at every client."""
        requested = self._open_requests(now)
        found = {}
        for number, client in self._clients.by_number.items():
            wait = self._of_client(client, requested.get(number, []), now)
            if wait is not None:
                found[number] = wait
            else:
                self._stalls.pop(number, None)
        if ours := requested.get(ZERO):
            found[ZERO] = _together(ours, sum(wait.faults for wait in ours), 0)
        self._stalls = {number: stall for number, stall in self._stalls.items() if number in found}
        self.by_client = found

    def of_client(self, number: int, now: float) -> tuple[int, float]:
        """Waiting faults of a client, and the age of the oldest in seconds."""
        wait = self.by_client.get(number)
        return (wait.faults, max(0.0, now - wait.since)) if wait is not None else (0, 0.0)

    def of_block(self, number: int, now: float) -> tuple[int, float]:
        """The same for a block."""
        return _summed((one for wait in self.by_client.values() for one in wait.blocks if one.block == number), now)

    def total(self, now: float) -> tuple[int, float]:
        """The same for all clients and the supervisor itself."""
        return _summed(self.by_client.values(), now)

    def _open_requests(self, now: float) -> dict[int, list[BlockWait]]:
        """What each waiter has asked the supervisor for, by block."""
        seen = self._requested
        self._requested = {
            (waiter, block, page): seen.get((waiter, block, page), now)
            for (block, page), waiters in self._engine.waiting.items()
            for waiter in waiters
        }
        sums: dict[tuple[int, int], tuple[int, float]] = {}
        for (waiter, block, _), since in self._requested.items():
            count, oldest = sums.get((waiter, block), (0, since))
            sums[waiter, block] = count + 1, min(oldest, since)
        found: dict[int, list[BlockWait]] = {}
        for (waiter, block), (count, oldest) in sums.items():
            found.setdefault(waiter, []).append(BlockWait(block, count, oldest))
        return found

    def _of_client(self, client: Client, requested: list[BlockWait], now: float) -> Wait | None:
        page = client.counters
        if client.userfaultfd is None or page is None:
            return None
        try:
            unread, faults = self._look(client.userfaultfd.fileno())
        except OSError:
            return None  # no descriptor is left to look with
        if not faults:
            return None
        rest = faults - sum(wait.faults for wait in requested)
        if rest <= 0:  # a worker may have asked for pages whose threads were woken meanwhile
            return _together(requested, faults, unread)
        stall = self._stall(client.number, page, now)
        busy = page[counters.BUSY_SINCE_NS] / 1e9
        since = min(stall.since, busy) if busy else stall.since
        known = page[counters.BUSY_BLOCK] if busy else 0
        block = known if known in self._blocks else self._stalled_at(client, stall, requested, now)
        waits = [*requested, BlockWait(block, rest, since)] if block else requested
        return Wait(faults, unread, min(since, *(wait.since for wait in waits)) if waits else since, _by_block(waits))

    def _stall(self, number: int, page: memoryview, now: float) -> Stall:
        """Since when nothing was done for this client. A worker answers one fault after the other: a client whose pages
        arrive has no fault that is old."""
        done = counters.placed(page) + sum(page[counter] for counter in KEEPS_FAULTING)
        faults, stall = counters.faults(page), self._stalls.get(number)
        if stall is None or stall.done != done or faults - stall.faults > RETRIES:
            stall = self._stalls[number] = Stall(done, faults, now)
        stall.faults = faults
        return stall

    def _stalled_at(self, client: Client, stall: Stall, requested: list[BlockWait], now: float) -> int:
        """Which block the other threads of a client wait for: its only one that is not complete; else one whose worker
        is placing a page, which is looked for only when the wait is no short one."""
        blocks = [self._blocks[number] for number in sorted({region.block for region in client.regions})]
        local = [block for block in blocks if block.kind == "local" and not block.complete]
        if not local:
            return requested[0].block if requested else blocks[0].number if blocks else 0
        if len(local) > 1 and not stall.block and now > stall.since:
            stall.block = next((block.number for block in local if block.is_placing()), 0)
        return stall.block or local[0].number


def _together(waits: list[BlockWait], faults: int, unread: int) -> Wait:
    """Requests of one waiter: at most ``faults`` threads wait for them."""
    kept, left = [], faults
    for wait in sorted(waits, key=lambda wait: wait.since):
        if left > 0:
            kept.append(BlockWait(wait.block, min(wait.faults, left), wait.since))
            left -= wait.faults
    return Wait(faults, unread, kept[0].since, tuple(kept))


def _by_block(waits: Iterable[BlockWait]) -> tuple[BlockWait, ...]:
    found: dict[int, BlockWait] = {}
    for wait in waits:
        old = found.get(wait.block, BlockWait(wait.block, 0, wait.since))
        found[wait.block] = BlockWait(wait.block, old.faults + wait.faults, min(old.since, wait.since))
    return tuple(found.values())


def _summed(waits: Iterable[Wait | BlockWait], now: float) -> tuple[int, float]:
    faults, oldest = 0, now
    for wait in waits:
        faults, oldest = faults + wait.faults, min(oldest, wait.since)
    return faults, max(0.0, now - oldest)
