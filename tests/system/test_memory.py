"""What the service costs, and what it stops doing before memory runs out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from postcopy_kernel.process import memory_figures
from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, called, end_by_pidfd, until, word

MB = 1 << 20


def test_max_memory_stops_fault_around(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(8 * MB)
    with Service(runtime_dir, f"ram0={path}", max_memory="2M", fault_around="256K") as service:
        client = service.client()
        limit = 2 * MB // PAGE
        for page in range(0, limit, 64):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        until(lambda: service.events("memory"), "the service says that memory is scarce")
        # A worker answers a fault when it is through with the window of the one before: no page is on its way then.
        assert client.do(f"words(b, [{limit + 100}])") == [word((limit + 100) * PAGE)]
        before = service.block()["received"]
        assert before - 1 <= limit
        pages = list(range(1000, 1040, 2))
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages], "what is waited for comes"
        service.await_received(before + len(pages))
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_max_memory_stops_background_work(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(16 * MB)
    with Service(runtime_dir, f"ram0={path}", max_memory="6M", background_rate="64M") as service:
        until(lambda: service.events("memory"), "the service says that memory is scarce")
        started = service.status()["uptime_s"]
        until(lambda: service.status()["uptime_s"] > started + 1, "a second passes")
        assert 0 < service.block()["received"] <= 10 * MB // PAGE
        assert service.client().do(f"check(b, {str(path)!r})") == -1


@pytest.mark.parametrize("attached", [False, True])
def test_a_background_rate_fills_the_block(runtime_dir: Path, source_file: SourceFile, attached: bool) -> None:
    path = source_file(16 * MB + 5)
    with Service(runtime_dir, f"ram0={path}", background_rate="32M") as service:
        client = service.client() if attached else None
        until(lambda: service.block()["complete"], "everything has come by itself", 15)
        assert service.status()["uptime_s"] > 0.3, "not faster than the rate"
        client = client or service.client("ram0", "shared")
        assert client.do("b.resident()") == 1.0
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_no_background_without_a_rate(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(8 * MB)}") as service:
        until(lambda: service.status()["uptime_s"] > 1.5, "time passes")
        assert service.block()["received"] == 0


def test_background_heals_nothing_and_survives_worker_zero(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(24 * MB)
    with Service(runtime_dir, f"ram0={path}", background_rate="16M") as service:

        def zero() -> list[int]:
            return [pid for pid in service.people() if called(pid) == "postcopy-w0"]

        for _ in range(2):
            before = until(zero, "worker zero works")
            end_by_pidfd(before[0], signal.SIGKILL, "postcopy-w0")
            until(lambda before=before: zero() and zero() != before, "another takes over")  # type: ignore[misc]
        until(lambda: service.block()["complete"], "everything has come by itself", 15)
        assert service.client().do(f"check(b, {str(path)!r})") == -1


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_stays_small_whatever_it_has_placed(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(96 * MB)
    with Service(runtime_dir, f"ram0={path}", "hold=zero:1M") as service:
        client = service.client("ram0", mode)
        client.attach("hold", mode, "hold")  # keeps the worker, also when ram0 is released
        fresh = memory_figures(service.worker(client))
        assert client.do(f"check(b, {str(path)!r})") == -1
        figures = memory_figures(service.worker(client))
        assert (fresh["private"] < 5 * MB, figures["private"] < 6.5 * MB) == (True, True), (fresh, figures)
        assert memory_figures(service.pid)["private"] < 64 * MB
