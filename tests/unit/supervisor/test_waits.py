"""Ages of waits: from counters that stand still, from open requests, and from what a worker is busy with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from postcopy_protocol import counters
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.waits import RETRIES, Waits

LOCAL, OTHER, FAR = 1, 2, 3


class Bench:
    """One client with regions of all blocks; the kernel counts ``threads``."""

    def __init__(self) -> None:
        self.threads, self.engine, self.placing = 0, Engine(), {OTHER}
        self.page = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
        blocks = {number: self.block(number) for number in (LOCAL, OTHER, FAR)}
        regions = [SimpleNamespace(block=number) for number in blocks]
        ufd = SimpleNamespace(fileno=lambda: 0)
        client = SimpleNamespace(number=7, counters=self.page, userfaultfd=ufd, regions=regions)
        clients = SimpleNamespace(by_number={7: client})
        self.waits = Waits(cast(Any, blocks), cast(Any, clients), self.engine, lambda fd: (0, self.threads))

    def block(self, number: int) -> Any:
        kind = "remote" if number == FAR else "local"
        return SimpleNamespace(number=number, kind=kind, complete=False, is_placing=lambda: number in self.placing)

    def at(self, now: float) -> tuple[int, float]:
        self.waits.tick(now)
        return self.waits.of_client(7, now)


def test_a_client_whose_pages_arrive_waits_for_none_for_long() -> None:
    bench = Bench()
    assert bench.at(0.0) == (0, 0.0)
    bench.threads = 2
    for now in range(1, 9):
        bench.page[counters.PLAIN] += 1
        assert bench.at(now) == (2, 0.0)
    assert bench.at(20.0) == (2, 12.0)
    assert bench.waits.of_block(OTHER, 20.0) == (2, 12.0), "that worker is placing a page of it"
    assert bench.waits.total(21.0) == (2, 13.0)
    bench.threads = 0
    assert bench.at(22.0) == (0, 0.0) == bench.waits.of_block(OTHER, 22.0)


def test_tries_without_memory_are_no_progress() -> None:
    bench = Bench()
    bench.threads = 1
    bench.at(0.0)
    for now in range(1, 6):
        bench.page[counters.FAULTS] += RETRIES // 2
        assert bench.at(now) == (1, float(now))
    bench.page[counters.FAULTS] += 10 * RETRIES
    assert bench.at(6.0) == (1, 0.0)


def test_a_request_keeps_its_age_while_others_are_answered() -> None:
    bench = Bench()
    bench.threads = 1
    bench.engine.fault(7, FAR, 5, 6)
    bench.at(0.0)
    for now in range(1, 5):
        bench.page[counters.FAULTS] += 1000
        assert bench.at(now) == (1, float(now))
    assert bench.waits.of_block(FAR, 4.0) == (1, 4.0) and bench.waits.of_block(LOCAL, 4.0) == (0, 0.0)
    bench.threads = 3  # two more, at a local block
    assert bench.at(5.0) == (3, 5.0)
    assert bench.waits.of_block(FAR, 5.0)[0] == 1 and bench.waits.of_block(LOCAL, 5.0)[0] == 2
    bench.engine.answered(FAR, 5, 6)
    bench.threads = 0
    assert bench.at(6.0) == (0, 0.0)


def test_what_a_worker_is_busy_with_is_exact() -> None:
    bench = Bench()
    bench.threads, bench.page[counters.BUSY_SINCE_NS], bench.page[counters.BUSY_BLOCK] = 1, 2_500_000_000, LOCAL
    assert bench.at(10.0) == (1, 7.5)
    assert bench.waits.of_block(LOCAL, 10.0) == (1, 7.5)


def test_the_supervisor_itself() -> None:
    bench = Bench()
    bench.engine.fault(0, FAR, 1, 2)
    bench.at(1.0)
    assert bench.waits.of_client(0, 4.0) == (1, 3.0) == bench.waits.total(4.0) == bench.waits.of_block(FAR, 4.0)
