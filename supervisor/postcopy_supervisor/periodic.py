"""Periodic work of the main thread: four times a second, and the rarer part of it once a second."""

from __future__ import annotations

import time

from postcopy_protocol import counters

from .adopt import PendingWorkers
from .blocks import RamBlock
from .clients.release import ClientRelease
from .entrances import Entrances
from .exports import Exports
from .listener import Listener
from .memory_budget import MemoryBudget, SteadySupply, Supply
from .observe.audit import Auditor
from .parts import Parts
from .remote.programs import SourceProgram
from .remote.sources import Sources
from .runtime import Heartbeat
from .watchdog import Watchdog

RARE_SECONDS = 1.0
SCARCE_SECONDS = 0.01  # between two looks at scarce memory: faults alone fill some MiB in the usual time
HELD_NS = 5_000_000_000  # workers wait no longer for memory when this process has died
PAGE = 4096  # pages of 2 MiB are not charged to a memory cgroup
SUPPLY_TEXTS = {
    Supply.ENOUGH: "enough again",
    Supply.SCARCE: "scarce{}: fault-around and background work stop",
    Supply.TIGHT: "none left{}: missing pages wait; raise its limit, or end what fills it",
}


class PeriodicWork:
    """``fault_around``: bytes of the largest window of workers while memory suffices."""

    def __init__(
        self,
        parts: Parts,
        budget: MemoryBudget,
        fault_around: int,
        sources: Sources,
        program: SourceProgram,
        pending: PendingWorkers,
        release: ClientRelease,
        watchdog: Watchdog,
        auditor: Auditor,
        exports: Exports,
        heartbeat: Heartbeat,
        entrances: Entrances,
        timer: Listener,
    ) -> None:
        self._parts, self._budget, self._fault_around, self._sources = parts, budget, fault_around, sources
        self._pending, self._release, self._watchdog, self._auditor = pending, release, watchdog, auditor
        self._exports, self._heartbeat, self._entrances, self._timer = exports, heartbeat, entrances, timer
        self._program = program
        self._rare_at = 0.0
        self._interrupted = False
        self._supply, self._workers = SteadySupply(), SteadySupply()
        self._placed = 0  # pages, at the last look at the memory

    def worker_ended(self) -> None:
        """A worker may have died between its COPY and its mark: such pages are promoted with the next rare work."""
        self._interrupted = True

    def tick(self, now: float, at: float) -> None:
        """``at``: when the tick was queued."""
        self._parts.pool.tick(now)
        self._check_memory()
        self._timer.tick_at(self._sources.tick(now))
        self._timer.tick_at(self._pending.tick(now))
        self._heartbeat.tick(now)
        self.stream()
        self._auditor.step(now)
        if now - self._rare_at >= RARE_SECONDS:
            self._rare_at = now
            self._rare(now, at)

    def stream(self) -> None:
        """Request pages in the background, as far as rate, links and memory allow."""
        paging = self._parts.paging
        if paging.idle:  # it is called after every remote fault
            return
        in_flight = self._in_flight()
        # The stream of a second fills more than a cgroup has, so what came since the last look counts.
        unasked = self._budget.unasked - (paging.placed - self._placed) * PAGE - in_flight
        self._timer.tick_at(paging.stream(min(unasked, self._budget.left(in_flight))))

    def _in_flight(self) -> int:
        return sum(link.flow.bytes_in_flight for link in self._sources.links.values())

    def _check_memory(self) -> None:
        """Where memory is scarce, only pages with a waiter are placed. Where a cgroup has none left, they wait: the
        kernel would end a process of the cgroup, perhaps this one."""
        parts, now, (found, cgroup) = self._parts, time.monotonic(), self._budget.supply(self._in_flight())
        self._placed = parts.paging.placed
        of_workers = self._budget.supply_of_workers()
        before, supply = self._supply.value, self._supply.see(found, now)
        found, theirs = of_workers or (found, cgroup)
        before_workers, workers = self._workers.value, self._workers.see(found, now)
        if supply or workers:
            self._timer.tick_at(now + SCARCE_SECONDS)
        parts.control_page[counters.HELD_UNTIL_NS] = time.monotonic_ns() + HELD_NS if workers is Supply.TIGHT else 0
        if supply != before:
            parts.paging.roomy = supply is Supply.ENOUGH
            parts.paging.hold(supply is Supply.TIGHT)
            self._report_memory(supply, cgroup)
        if workers != before_workers:
            parts.control_page[counters.WINDOW_LIMIT] = self._fault_around if workers is Supply.ENOUGH else 0
            if of_workers is not None:
                self._report_memory(workers, theirs)

    def _report_memory(self, supply: Supply, cgroup: str) -> None:
        where = f" in cgroup {cgroup}" if cgroup else ""
        self._parts.event_log.record("memory", SUPPLY_TEXTS[supply].format(where))

    def _rare(self, now: float, at: float) -> None:
        self._release.tick(at)
        self._release.wake_resting()
        self._parts.waits.tick(now)
        self._watchdog.tick(now)
        self._program.tick(now)
        self._entrances.tick()
        for block in self._parts.blocks.values():
            if self._interrupted and not block.complete:
                block.promote_interrupted()
            self._complete(block)
        self._interrupted = False
        for export in self._exports.unasked():
            export.cancel()
            self._parts.zero.give_up(export.block)

    def _complete(self, block: RamBlock) -> None:
        """The end phase of a block whose pages are all received."""
        if not block.complete and block.look_complete():
            text = f"block {block.name}: every page is received; its clients are released"
            self._parts.event_log.record("complete", text, block=block.name)
            link = self._parts.paging.links.get(block.number)
            if link is not None:
                link.complete(block.number)
        if block.complete:
            self._release.release_block(block)
