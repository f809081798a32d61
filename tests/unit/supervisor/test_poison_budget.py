"""The orderly end poisons missing pages within a budget of memory and time. Beyond it pages wait. Waiters of present
pages are always woken."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from postcopy_kernel.userfaultfd import Outcome, Status
from postcopy_protocol.messages import RegionGrant
from postcopy_supervisor import shutdown

GIB = 1 << 30


@dataclass
class FakeUserfaultfd:
    poisoned: int = 0
    woken: list[tuple[int, int]] = field(default_factory=list)

    def poison(self, start: int, length: int) -> Outcome:
        self.poisoned += length
        return Outcome(Status.DONE, length)

    def wake(self, start: int, length: int) -> None:
        self.woken.append((start, length))


@dataclass
class FakeBlock:
    name: str = "ram0"
    page_size: int = 4096

    def hole_runs(self) -> list[tuple[int, int]]:
        return [(0, GIB), (2 * GIB, GIB)]


@dataclass
class FakeClient:
    number: int
    pidfd: int
    userfaultfd: FakeUserfaultfd
    regions: list[RegionGrant]


@dataclass
class FakeClients:
    by_number: dict[int, FakeClient]


def poison(monkeypatch: pytest.MonkeyPatch, *, available: int, seconds: float) -> list[FakeUserfaultfd]:
    monkeypatch.setattr(shutdown, "available_memory", lambda: available)
    monkeypatch.setattr(shutdown, "POISON_SECONDS", seconds)
    pidfd = os.pidfd_open(os.getpid())
    region = RegionGrant(1, "private", 4 * GIB, 4 * GIB, 0)
    clients = {number: FakeClient(number, pidfd, FakeUserfaultfd(), [region]) for number in (1, 2)}
    try:
        shutdown.poison_holes(cast(Any, FakeClients(clients)), cast(Any, {1: FakeBlock()}))
    finally:
        os.close(pidfd)
    return [client.userfaultfd for client in clients.values()]


@pytest.mark.parametrize(
    ("available", "seconds", "bytes_each"),
    [
        (1 << 40, 60.0, [2 * GIB, 2 * GIB]),
        (1 << 40, -1.0, [0, 0]),
        (0, 60.0, [0, 0]),
        (4 * 3 * 2 << 20, 60.0, [2 * GIB, GIB]),  # a quarter of it: the page tables of three GiB
    ],
)
def test_what_fits_is_poisoned_and_every_waiter_is_woken(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    available: int,
    seconds: float,
    bytes_each: list[int],
) -> None:
    clients = poison(monkeypatch, available=available, seconds=seconds)
    assert [client.poisoned for client in clients] == bytes_each
    assert all(client.woken == [(4 * GIB, 4 * GIB)] for client in clients)
    told = [record for record in caplog.records if "the others wait" in record.getMessage()]
    assert len(told) == sum(done < 2 * GIB for done in bytes_each), "waiting pages are logged"
