"""Fault-around: streams double, strangers are placed alone, memory is bounded."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.received_map import MISSING, RECEIVED
from postcopy_protocol.window import STREAMS, FaultAround, placed_until

quick = settings(deadline=None)
page_numbers = st.integers(0, 1 << 40)
largest_windows = st.integers(1, 1024)


def widths(around: FaultAround, start: int, count: int) -> list[int]:
    """A reader in order: each fault comes where the window before has ended."""
    found, page = [], start
    for _ in range(count):
        found.append(around.window(page))
        page += found[-1]
    return found


@quick
@given(page_numbers, largest_windows)
def test_a_stream_doubles_from_one_to_the_largest(start: int, largest: int) -> None:
    assert widths(FaultAround(largest, True), start, 14) == [min(1 << step, largest) for step in range(14)]


@quick
@given(st.lists(page_numbers, max_size=200), largest_windows)
def test_a_window_is_never_empty_and_never_too_large(faults: list[int], largest: int) -> None:
    around = FaultAround(largest)
    assert all(1 <= around.window(page) <= largest for page in faults)


@quick
@given(st.lists(st.integers(0, 1 << 20).map(lambda page: page * 3), unique=True, max_size=50))
def test_faults_at_random_are_placed_alone(faults: list[int]) -> None:
    around = FaultAround(256)
    assert all(around.window(page) == 1 for page in faults)


@quick
@given(st.integers(1, STREAMS), st.integers(2, 9))
def test_streams_side_by_side_do_not_disturb_each_other(streams: int, steps: int) -> None:
    around = FaultAround(64)
    positions = [stream << 30 for stream in range(streams)]
    for step in range(steps):
        for stream, page in enumerate(positions):
            width = around.window(page)
            assert width == min(1 << step, 64)
            positions[stream] = page + width


def test_one_stream_too_many_forgets_the_least_recently_continued() -> None:
    around = FaultAround(64)
    for stream in range(STREAMS):
        around.window(stream << 30)
    assert around.window(1) == 2, "the first stream goes on and is the youngest now"
    around.window(99 << 30)
    assert around.window((1 << 30) + 1) == 1, "the second was the least recently continued"
    assert around.window(3) == 4, "the first is still remembered"


@quick
@given(st.lists(st.integers(0, 30), max_size=300))
def test_what_is_remembered_is_bounded(faults: list[int]) -> None:
    around = FaultAround(8)
    for page in faults:
        around.window(page)
        assert len(around._expected) <= STREAMS


@quick
@given(st.lists(page_numbers, max_size=30), largest_windows)
def test_a_fixed_window_is_fixed(faults: list[int], largest: int) -> None:
    around = FaultAround(largest, adaptive=False)
    assert all(around.window(page) == largest for page in faults)


def test_the_largest_may_shrink_at_any_time_but_one_page_is_always_placed() -> None:
    around = FaultAround(256)
    page = sum(widths(around, 0, 9))
    around.largest_pages = 4
    assert around.window(page) == 4
    around.largest_pages = 0
    assert around.window(page + 4) == 1
    around.largest_pages = 256
    assert around.window(page + 5) == 2, "it grows again from what it had"
    assert FaultAround(0, adaptive=False).window(5) == 1


def test_what_a_stream_went_through_counts_as_used() -> None:
    around = FaultAround(8)
    page = 0
    for _ in range(6):  # windows of 1, 2, 4, 8, 8, 8: beyond their first pages 0, 1, 3, 7, 7 were gone through
        page += around.window(page)
    assert around.used == 0 + 1 + 3 + 7 + 7
    around.window(1000)
    assert around.used == 18


def walk_together(walkers: int, pages: int, largest: int, order: random.Random) -> int:
    """Clients walk through one block, in steps of any order; returns how many faults they have."""
    states = bytearray([MISSING] * pages)

    def place(first: int, count: int) -> None:
        end = min(pages, first + count)
        states[first:end] = bytes([RECEIVED] * (end - first))

    around, at, faults = [FaultAround(largest, True, states) for _ in range(walkers)], [0] * walkers, 0
    while walking := [number for number in range(walkers) if at[number] < pages]:
        number = order.choice(walking)
        page = at[number]
        if states[page] == MISSING:
            faults += 1
            # Others that touch the same page meanwhile find that it is being placed.
            rivals = [other for other in walking if other != number and at[other] == page and order.random() < 0.7]
            place(page, around[number].window(page))
            for rival in rivals:
                faults += 1
                end = placed_until(page, bytes(states[page : page + largest]))
                place(end, around[rival].follow(page, end))
        at[number] = page + 1
    return faults


@quick
@given(st.integers(2, 8), st.integers(0, 1 << 30))
def test_clients_that_walk_together_have_few_more_faults_than_one_alone(walkers: int, seed: int) -> None:
    pages, largest = 4096, 64
    alone = walk_together(1, pages, largest, random.Random(seed))
    assert walk_together(walkers, pages, largest, random.Random(seed)) <= 2 * alone + 8 * walkers


def test_a_window_does_not_shrink_because_others_have_placed_its_pages() -> None:
    states = bytearray(1000)
    around, page = FaultAround(64, True, states), 0
    for _ in range(5):
        page += around.window(page)
    states[:200] = bytes([RECEIVED]) * 200
    assert around.window(200) == 32, "all pages from the end of its last window on are placed"
    assert around.window(400) == 1, "between them is a hole"


@quick
@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 64))
def test_a_fixed_window_stays_fixed_where_others_place(faults: list[int], largest: int) -> None:
    around = FaultAround(largest, False, bytearray([RECEIVED]) * 400)
    assert all(around.follow(page, page + 1) == 0 and around.window(page) == largest for page in faults)


def test_of_a_shared_stream_each_follower_gets_a_window_of_its_own() -> None:
    around, page = FaultAround(64, True, bytearray(1000), streams=64), 0
    for _ in range(4):
        page += around.window(page)
    assert [around.extend(page - 3, end) for end in (page, page + 16, page + 48)] == [16, 32, 64]
    assert around.extend(500, 510) == 0, "that is no stream"
    assert around.window(page + 112) == 64, "the next fault is behind all of them"


def test_a_fault_inside_the_clients_own_window_does_not_make_the_next_one_smaller() -> None:
    around = FaultAround(64)
    page = 0
    for _ in range(4):
        page += around.window(page)
    around.follow(page - 2, page)
    assert around.window(page) == 16


@quick
@given(st.lists(st.integers(0, 1 << 20).map(lambda page: page * 100), unique=True, max_size=50), st.integers(1, 64))
def test_random_faults_on_pages_of_others_stay_alone(faults: list[int], placed: int) -> None:
    around = FaultAround(64)
    for number, page in enumerate(faults):
        if number % 2:
            around.follow(page, page + placed)
        else:
            assert around.window(page) == 1
    assert len(around._expected) <= STREAMS
