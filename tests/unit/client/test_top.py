"""``postcopy top``: what it makes of two statuses, and its screen and keys by textual's own pilot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.containers import VerticalScroll
from textual.pilot import Pilot
from textual.widgets import Input, Static

from postcopy.errors import NoSupervisor
from postcopy.top import view
from postcopy.top.app import HELP, Top


def client(number: int, **more: Any) -> dict[str, Any]:
    made = {"id": number, "name": f"python-{number}", "pid": 1000 + number, "worker_pid": 2000 + number}
    made |= {"state": "running", "blocks": [{"name": "ram0", "mode": ("private", "shared")[number % 2]}]}
    made |= {"faults": 100 * number, "placed": 90 * number, "placed_around": 40, "around_used": 20, "restarts": 0}
    made |= {"latency_us": {"p50": 10.0 + number, "p99": 900.0, "max": 1500.0}, "blocked_s": 0.5, "released": []}
    return made | more


def status(clients: int, received: int = 300, uptime: float = 10.0, **more: Any) -> dict[str, Any]:
    cells = [10 if cell * 10 < received else 0 for cell in range(100)]
    block = {"name": "ram0", "size": 1000 * 4096, "page_size": 4096, "pages": 1000, "received": received, "lost": 0}
    block |= {"map": {"pages": 10, "received": cells, "lost": []}}
    source = {"endpoint": "tcp://there:7000", "state": "up", "bytes": int(uptime * 1e6), "in_flight": 3}
    source["latency_us"] = {"p50": 200.0, "p99": 900.0, "max": 1000.0}
    events = [{"number": n, "at": 1e9 + n, "kind": "restart", "detail": f"worker {n} ended unasked"} for n in range(30)]
    made = {"pid": 77, "uptime_s": uptime, "state": "running", "blocks": [block], "sources": [source], "events": events}
    made |= {"clients": [client(n) for n in range(1, clients + 1)], "totals": {"restarts": 4, "lost": 0, "polluted": 0}}
    return made | more


# --- the view ---------------------------------------------------------------------------------------------------------


def test_rates_are_of_the_time_between_two_looks() -> None:
    before, now = status(2, uptime=10.0), status(2, uptime=12.0)
    now["clients"][0] |= {"faults": 100 + 500, "blocked_s": 1.5}
    found = view.rows(now, before)
    assert [row.fault_rate for row in found] == [250.0, 0.0]
    assert found[0].blocked == 0.5
    assert view.rows(now, None)[0].fault_rate == 0.0
    assert view.rows({**now, "pid": 78}, before)[0].fault_rate == 0.0  # another supervisor
    assert "1.0M/s" in view.sources(now, before)[0] or "976.6K/s" in view.sources(now, before)[0]


def test_how_far_a_source_is() -> None:
    now = status(1)
    assert view.progress(now["sources"][0]) == ""
    found = {"phase": "post-copy", "origin": "VM stopped", "received": 3 << 20, "left": 1 << 20, "bytes_per_s": 2 << 20}
    now["sources"][0]["progress"] = found
    assert view.sources(now, None)[0].endswith("  post-copy 75%  1M left  2M/s  VM stopped")
    now["sources"][0]["progress"] = found | {"phase": "complete", "left": 0}
    assert view.sources(now, None)[0].endswith("  complete 100%  VM stopped")


def test_sorted_and_filtered() -> None:
    found = view.rows(status(12), None)
    assert [row.number for row in view.arranged(found, "p50")][:2] == [12, 11]
    assert [row.number for row in view.arranged(found, "p50", turned=True)][:2] == [1, 2]
    assert [row.number for row in view.arranged(found, "name")][:2] == [1, 10]
    assert [row.number for row in view.arranged(found, "number", wanted="PYTHON-1")] == [1, 10, 11, 12]
    assert len(view.KEYS) == len(view.COLUMNS) == len(found[0].cells())


def test_the_map_shows_what_has_come_what_is_hot_and_what_is_lost() -> None:
    before, now = status(0, received=300), status(0, received=400)
    now["blocks"][0]["map"]["lost"] = [0] * 99 + [1]
    cells = view.residency(now["blocks"][0], before["blocks"][0], 100)
    kinds = [kind for _, kind in cells]
    assert kinds == [view.RECEIVED] * 30 + [view.HOT] * 10 + [view.MISSING] * 59 + [view.LOST]
    assert cells[0][0] == "█" and cells[50][0] == "·"
    assert [kind for _, kind in view.residency(now["blocks"][0], before["blocks"][0], 10)].count(view.HOT) == 1


@given(pages=st.integers(1, 5000), share=st.floats(0, 1), width=st.integers(1, 200))
def test_a_map_of_any_size_fits_into_any_width(pages: int, share: float, width: int) -> None:
    stretch = -(-pages // 128)
    rooms = [min(stretch, pages - at) for at in range(0, pages, stretch)]
    received = [int(room * share) for room in rooms]
    block = {"pages": pages, "map": {"pages": stretch, "received": received, "lost": []}}
    cells = view.residency(block, None, width)
    assert len(cells) == min(width, len(rooms))
    full = all(shade == "█" for shade, _ in cells)
    assert full == (sum(received) == pages)
    assert all(shade == "·" for shade, _ in cells) == (sum(received) == 0)


def test_names_cannot_draw() -> None:
    row = view.rows({"clients": [client(1, name="a\x1b[2Jb\n")]}, None)[0]
    assert row.name == "a?[2Jb?"


# --- the screen -------------------------------------------------------------------------------------------------------


def on_screen(
    act: Callable[[Top, Pilot[None]], Awaitable[None]], ask: Any = None, size: tuple[int, int] = (80, 24)
) -> None:
    """Run ``act`` on a screen of ``size`` that has looked once."""
    looked = iter(range(10, 10**6))

    async def run() -> None:
        app = Top(ask or (lambda: status(64, uptime=float(next(looked)))), interval=3600)
        async with app.run_test(size=size) as pilot:
            for _ in range(200):
                await pilot.pause(0.02)
                if app.looks or ask is not None:
                    break
            await act(app, pilot)

    asyncio.run(run())


def line(app: Top, name: str) -> str:
    return str(app.query_one(name, Static).render())


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (40, 12)])
def test_everything_is_there_whatever_the_size(size: tuple[int, int]) -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        assert "64 clients" in line(app, "#head") and "restarts 4" in line(app, "#head")
        assert "ram0" in line(app, "#map") and "30.0%" in line(app, "#map")
        assert "tcp://there:7000" in line(app, "#sources")
        assert line(app, "#events").index("worker 29") < line(app, "#events").index("worker 28")
        assert len(app.client_list.rows) == 64
        assert max(len(row) for row in line(app, "#map").splitlines()) <= size[0]

    on_screen(act, size=size)


def test_keys_sort_turn_and_filter() -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        def first() -> str:
            return str(app.client_list.rows[0].number)

        await pilot.press("s", "s")  # from faults a second over pages a second to p50
        assert first() == "64"
        await pilot.press("r")
        assert first() == "1"
        await pilot.press("slash", *"python-33", "enter")
        assert len(app.client_list.rows) == 1 and first() == "33"
        await pilot.press("escape")
        assert len(app.client_list.rows) == 64
        assert not app.query_one("#filter", Input).has_class("shown")

    on_screen(act)


def test_a_client_is_looked_into_and_what_is_chosen_stays_chosen() -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        chosen = app.client_list.chosen
        await app.look()
        assert app.client_list.chosen == chosen
        await pilot.press("r")
        assert app.client_list.chosen == chosen
        await pilot.press("enter")
        told = str(app.screen.query_one("#told", Static).render())
        assert f"python-{chosen}" in told and "worker_pid" in told
        await pilot.press("escape")
        await pilot.press("question_mark")
        assert "look into the client" in str(app.screen.query_one("#told", Static).render())

    on_screen(act)


def test_control_c_leaves() -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        await pilot.press("slash", "ctrl+c")  # also while somebody writes
        await pilot.pause()
        assert app.return_code == 0 and not app.is_running

    on_screen(act)


def test_the_smallest_usual_terminal_shows_all_columns_and_all_of_the_help() -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        assert app.client_list.show_vertical_scrollbar and not app.client_list.show_horizontal_scrollbar
        assert app.client_list.render_line(0).text.rstrip().endswith("oldest")
        await pilot.press("question_mark")
        await pilot.pause()
        box = app.screen.query_one(VerticalScroll)
        assert not box.show_vertical_scrollbar
        assert app.screen.query_one("#told", Static).size.height == len(HELP.splitlines())
        await pilot.resize_terminal(200, 60)
        await pilot.press("escape")
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert not app.client_list.show_horizontal_scrollbar

    on_screen(act)


def test_paused_nothing_moves() -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        await pilot.press("p")
        looks = app.looks
        await app.look()
        assert app.looks == looks
        await pilot.press("p")
        await app.look()
        assert app.looks == looks + 1

    on_screen(act)


def test_a_supervisor_that_is_not_there_is_said_and_waited_for() -> None:
    there = False

    def ask() -> dict[str, Any]:
        if not there:
            raise NoSupervisor("no supervisor in /run/postcopy")
        return status(1)

    async def act(app: Top, pilot: Pilot[None]) -> None:
        nonlocal there
        await app.look()
        assert "no supervisor" in line(app, "#head")
        there = True
        await app.look()
        assert "1 clients" in line(app, "#head")

    on_screen(act, ask)
