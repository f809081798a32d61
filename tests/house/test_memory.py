"""What the house costs, and what it stops doing before memory runs out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from postcopy_kernel.process import memory_figures
from tests.conftest import SourceFile
from tests.house.house import PAGE, House, called, end_by_pidfd, until, word

MB = 1 << 20


def test_max_memory_stops_fault_around(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(8 * MB)
    with House(runtime_dir, f"ram0={path}", max_memory="2M", fault_around="256K") as house:
        client = house.client()
        limit = 2 * MB // PAGE
        for page in range(0, limit, 64):
            assert client.do(f"words(b, [{page}])") == [word(page * PAGE)]
        until(lambda: house.events("memory"), "the house says that memory is scarce")
        # A worker answers a fault when it is through with the window of the one before: no page is on its way then.
        assert client.do(f"words(b, [{limit + 100}])") == [word((limit + 100) * PAGE)]
        before = house.block()["received"]
        assert before - 1 <= limit
        pages = list(range(1000, 1040, 2))
        assert client.do(f"words(b, {pages})") == [word(page * PAGE) for page in pages], "what is waited for comes"
        house.await_received(before + len(pages))
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_max_memory_stops_background_work(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(16 * MB)
    with House(runtime_dir, f"ram0={path}", max_memory="6M", background_rate="64M") as house:
        until(lambda: house.events("memory"), "the house says that memory is scarce")
        started = house.status()["uptime_s"]
        until(lambda: house.status()["uptime_s"] > started + 1, "a second passes")
        assert 0 < house.block()["received"] <= 10 * MB // PAGE
        assert house.client().do(f"check(b, {str(path)!r})") == -1


@pytest.mark.parametrize("attached", [False, True])
def test_a_background_rate_fills_the_block(runtime_dir: Path, source_file: SourceFile, attached: bool) -> None:
    path = source_file(16 * MB + 5)
    with House(runtime_dir, f"ram0={path}", background_rate="32M") as house:
        client = house.client() if attached else None
        until(lambda: house.block()["complete"], "everything has come by itself", 15)
        assert house.status()["uptime_s"] > 0.3, "not faster than the rate"
        client = client or house.client("ram0", "shared")
        assert client.do("b.resident()") == 1.0
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_no_background_without_a_rate(runtime_dir: Path, source_file: SourceFile) -> None:
    with House(runtime_dir, f"ram0={source_file(8 * MB)}") as house:
        until(lambda: house.status()["uptime_s"] > 1.5, "time passes")
        assert house.block()["received"] == 0


def test_background_heals_nothing_and_survives_worker_zero(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(24 * MB)
    with House(runtime_dir, f"ram0={path}", background_rate="16M") as house:

        def zero() -> list[int]:
            return [pid for pid in house.people() if called(pid) == "postcopy-w0"]

        for _ in range(2):
            before = until(zero, "worker zero works")
            end_by_pidfd(before[0], signal.SIGKILL, "postcopy-w0")
            until(lambda before=before: zero() and zero() != before, "another takes over")  # type: ignore[misc]
        until(lambda: house.block()["complete"], "everything has come by itself", 15)
        assert house.client().do(f"check(b, {str(path)!r})") == -1


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_worker_stays_small_whatever_it_has_placed(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(96 * MB)
    with House(runtime_dir, f"ram0={path}", "hold=zero:1M") as house:
        client = house.client("ram0", mode)
        client.attach("hold", mode, "hold")  # keeps the worker, also when ram0 is released
        assert client.do(f"check(b, {str(path)!r})") == -1
        figures = memory_figures(house.worker(client))
        assert figures["private"] < 12 * MB, figures
        assert memory_figures(house.pid)["private"] < 64 * MB
