"""Pages of a source that find no memory in the supervisor: their marks, their waiters, and when they are requested
again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from postcopy_kernel.abi import Outcome, Status
from postcopy_kernel.memory import create_memfd
from postcopy_protocol.codec import decode, unpack_offsets
from postcopy_protocol.messages import Wake
from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED
from postcopy_protocol.return_path import RangeKind
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.paging.flow_control import BACKGROUND, LONGEST_PAUSE
from postcopy_supervisor.paging.paging import RemotePaging
from postcopy_supervisor.paging.placer import Placer
from postcopy_supervisor.paging.source_link import AdvisedBlock, Arrived
from postcopy_supervisor.paging.wakers import Wakers

PAGE = 4096
BLOCK = 1
PAGES = 16


@dataclass
class Core:
    """A userfaultfd with ``room`` for so many pages more."""

    room: int = 0

    def fileno(self) -> int:
        return -1

    def copy(self, target: int, source: int, length: int) -> Outcome:
        fits = min(length // PAGE, self.room)
        self.room -= fits
        if not fits:
            return Outcome(Status.EXHAUSTED, 0)
        return Outcome(Status.DONE if fits * PAGE == length else Status.PARTIAL, fits * PAGE)


@dataclass
class Bench:
    """Paging and flow of one block, at a source that is up."""

    now: float = 100.0
    core: Core = field(default_factory=Core)
    events: list[str] = field(default_factory=list)
    woken: list[int] = field(default_factory=list)
    rung: list[float] = field(default_factory=list)
    around: int = PAGE

    def __post_init__(self) -> None:
        self.received = bytearray(PAGES)
        self.memory = create_memfd("shortage", PAGES * PAGE)
        block = SimpleNamespace(name="ram0", number=BLOCK, page_size=PAGE, pages=PAGES, length=PAGES * PAGE)
        block.received, block.memory, block.mapping = self.received, self.memory, SimpleNamespace(address=1 << 20)
        block.lost_pages = lambda: [page for page in range(PAGES) if self.received[page] == LOST]
        self.block = cast(Any, block)
        alarm = SimpleNamespace(tick_at=self.rung.append, call_soon=lambda act: None)
        clients = SimpleNamespace(with_block=lambda number: [])
        workers, own = SimpleNamespace(send=self._told), SimpleNamespace(release=self._own)
        self.paging = RemotePaging(
            {BLOCK: self.block},
            Engine(),
            Placer(cast(Any, self.core), alarm, self._event),
            Wakers({BLOCK: self.block}, workers, own, clients, self._event),
            SimpleNamespace(fetch=lambda ask: None),
            alarm,
            self._event,
            fault_around=self.around,
            background_rate=0,
            poison_on_loss=False,
            clock=lambda: self.now,
        )
        blocks = [AdvisedBlock(BLOCK, "ram0", PAGE, PAGES * PAGE, "right")]
        self.link = self.paging.add_source("ipc:///x", blocks, 5.0, lambda data: None)
        self.flow = self.link.flow

    def _event(self, kind: str, *_: object, **where: object) -> None:
        self.events.append(kind)

    def _own(self, block: object, page: int, lost: bool) -> None:
        self.woken.append(page)

    def _told(self, worker: int, data: bytes) -> None:
        message = decode(data, expect=(Wake,))
        assert isinstance(message, Wake)
        self.woken += [offset // PAGE for offset in unpack_offsets(message.offsets)]

    def come(self, first: int, end: int, kind: int = RangeKind.DATA) -> None:
        self.paging.arrived(Arrived(BLOCK, [(first * PAGE, (end - first) * PAGE, kind, 0)], ""), [1 << 30])
        self.paging.engine.check()

    def deferred(self) -> list[tuple[int, int, int]]:
        """Client, first and end page."""
        return [(one.client, one.offset // PAGE, (one.offset + one.length) // PAGE) for one in self.flow.deferred]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    os.close(bench.memory)


@pytest.mark.parametrize("kind", [RangeKind.DATA, RangeKind.ZERO])
def test_what_fits_is_placed_and_the_rest_is_requested_again(bench: Bench, kind: int) -> None:
    bench.paging.fault(7, bench.block, (2,), window=6)
    bench.paging.fault(0, bench.block, (6,))
    for waiter, page in ((8, 3), (8, 5), (0, 6)):
        bench.paging.fault(waiter, bench.block, (page,))
    bench.flow.queues.clear()  # sent, and answered:
    bench.core.room = 2
    bench.come(2, 8, kind)
    assert bench.woken == [2, 3] and bench.events == ["no-memory"]
    assert bytes(bench.received[2:8]) == bytes((RECEIVED, RECEIVED, MISSING, MISSING, MISSING, MISSING))
    assert bench.deferred() == [(8, 5, 7)], "one request, for the first waiter; client zero counts as any other"
    assert bench.rung == [bench.flow.retry_at]
    assert bench.paging.engine.first_gap(BLOCK, 4, 16) == (4, 5), "it has no waiter: it is requested when it has one"
    bench.core.room = 100
    bench.flow.deferred.clear()
    bench.come(5, 7, kind)
    assert sorted(bench.woken) == [2, 3, 5, 6] and bench.paging.engine.idle


def test_a_shortage_is_one_event_however_long_it_takes(bench: Bench) -> None:
    """Many events of one shortage would push other events out of the history."""
    for seconds in (0.0, 0.01, 0.5, 1.0, 3.0, 30.0):
        bench.now += seconds
        bench.come(3, 4)
    bench.core.room = 1
    bench.come(3, 4)
    bench.come(4, 5)
    assert bench.events == ["no-memory"], "one page is not the end of the shortage"
    bench.core.room = 1
    bench.come(4, 5)
    bench.now += 2 * LONGEST_PAUSE
    bench.come(5, 6)
    assert bench.events == ["no-memory"] * 2, "another one"


def test_marks_of_pages_that_were_not_placed(bench: Bench) -> None:
    """As they were before. PLACING stays only where a predecessor's page is present; MISSING would make it polluted."""
    os.pwrite(bench.memory, b"ours", 5 * PAGE)
    bench.received[4:8] = bytes((PLACING, PLACING, LOST, RECEIVED))
    bench.come(3, 9)
    assert bytes(bench.received[3:9]) == bytes((MISSING, MISSING, PLACING, LOST, RECEIVED, MISSING))


def test_lost_pages_that_find_no_memory_are_requested_again(bench: Bench) -> None:
    """They have no waiter, and no client will fault there: clients that got SIGBUS need the wake."""
    bench.received[4:6] = bytes((LOST, LOST))
    bench.paging.source_back([BLOCK])
    bench.flow.queues.clear()
    bench.come(4, 6)
    assert bench.deferred() == [(BACKGROUND, 4, 6)]
    bench.flow.deferred.clear()
    bench.core.room = 2
    bench.come(4, 6)
    assert bench.events == ["no-memory", "healed"]


def test_pages_that_another_request_brings_are_not_deferred(bench: Bench) -> None:
    """A page is pushed while it is requested. It is requested again only if the answer finds no memory either."""
    bench.paging.fault(7, bench.block, (2,), window=2)
    for _ in range(3):
        bench.come(2, 4)
    assert bench.deferred() == [] and bench.flow.waiting == 1
    bench.flow.queues.clear()
    for _ in range(3):
        bench.come(2, 4)
    assert bench.deferred() == [(7, 2, 3)]


def test_the_background_waits_during_a_shortage(bench: Bench) -> None:
    bench.flow.up = True
    bench.come(2, 4)
    assert bench.deferred() == [] and bench.paging.engine.idle
    assert bench.flow.room_for_background(bench.now) == 0 < bench.flow.room_for_background(bench.flow.retry_at)
