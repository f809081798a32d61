"""The background stream: one token bucket for all blocks, turns, and what is requested next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.received_map import LOST, MISSING, PLACING, RECEIVED
from postcopy_supervisor.paging.background import LOCAL_WINDOW, PIECE, Background, TokenBucket
from postcopy_supervisor.paging.engine import Ask, Effect, Engine
from postcopy_supervisor.paging.link_pace import CALM_LARGEST

PAGE = 4096
MB = 1 << 20
LOCAL, REMOTE = 1, 2


@given(
    rate=st.integers(1, 1 << 32),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 4 * MB)), max_size=40),
)
def test_a_bucket_grants_no_more_than_its_rate(rate: int, steps: list[tuple[float, int]]) -> None:
    bucket, now, taken = TokenBucket(rate, PIECE, 0.0), 0.0, 0
    size = max(PIECE, rate // 4)
    for seconds, amount in steps:
        now += seconds
        wait = bucket.wait(amount, now)
        if wait:
            assert bucket.wait(amount, now + wait * 1.001 + 1e-6) == 0.0, "it says when to come again"
            now += wait * 1.001 + 1e-6
        bucket.take(amount)
        taken += amount
        assert taken <= rate * now * 1.001 + size + amount


def test_a_request_larger_than_the_bucket_leaves_a_debt() -> None:
    bucket = TokenBucket(MB, PIECE, 0.0)
    assert bucket.wait(2 * MB, 10.0) == 0.0
    bucket.take(2 * MB)
    assert bucket.wait(PIECE, 10.0) == pytest.approx(2.0)


def test_a_bucket_without_a_limit() -> None:
    bucket = TokenBucket(-1, PIECE, 0.0)
    bucket.take(1 << 40)
    assert bucket.wait(1 << 40, 0.0) == 0.0


class Bench:
    """A local and a remote block, and a worker zero and a source that answer when ``answer`` is called."""

    def __init__(self, rate: int, pages: int = 4 * MB // PAGE, page: int = PAGE) -> None:
        self.engine, self.asked = Engine(), list[Ask]()
        self.blocks = {
            number: SimpleNamespace(
                number=number, page_size=page, pages=pages, received=bytearray(pages), complete=False
            )
            for number in (LOCAL, REMOTE)
        }
        self.room, self.now = 1 << 40, 0.0
        self.piece, self.probes = MB, 0
        self.pace = SimpleNamespace(resume_at=-1.0)
        flow = SimpleNamespace(room_for_background=lambda now: self.room, piece=lambda now: self.piece, pace=self.pace)
        links: Any = {REMOTE: SimpleNamespace(flow=flow, probe=self.probe)}
        self.background = Background(self.engine, cast(Any, self.blocks), links, rate, 0.0, self)

    def probe(self, now: float) -> None:
        self.probes += 1

    def do(self, effects: list[Effect]) -> None:
        self.asked += [effect for effect in effects if isinstance(effect, Ask)]

    def answer(self) -> dict[int, int]:
        """Everything that is requested has come; bytes by block."""
        bytes_of = {LOCAL: 0, REMOTE: 0}
        for ask in self.asked:
            block = self.blocks[ask.block]
            bytes_of[ask.block] += block.received[ask.first : ask.end].count(MISSING) * block.page_size
            block.received[ask.first : ask.end] = bytes((RECEIVED,)) * (ask.end - ask.first)
            self.engine.answered(ask.block, ask.first, ask.end)
        self.asked.clear()
        return bytes_of

    def run(self, seconds: float, left: int = 1 << 62) -> dict[int, int]:
        """Call it when it wants, answer at once; bytes by block."""
        end, total = self.now + seconds, {LOCAL: 0, REMOTE: 0}
        while self.now < end:
            due = self.background.stream(left, self.now)
            for block, count in self.answer().items():
                total[block] += count
            self.now = min(end, due if due is not None else self.now + 0.25)
        return total


@pytest.mark.parametrize("rate", [MB // 2, 2 * MB])
@pytest.mark.parametrize("page", [PAGE, 2 * MB])
def test_all_blocks_together_keep_the_rate_and_each_has_its_turn(rate: int, page: int) -> None:
    bench = Bench(rate, pages=64 * MB // page, page=page)
    bench.run(1.0)
    total = bench.run(20.0)
    assert 0.8 * 20 * rate <= sum(total.values()) <= 1.05 * 20 * rate + 2 * max(page, PIECE)
    assert abs(total[LOCAL] - total[REMOTE]) <= max(page, PIECE), "the blocks take turns"


def test_auto_streams_remote_blocks_only() -> None:
    bench = Bench(-1)
    assert bench.background.stream(1 << 62, 0.0) is None
    assert {ask.block for ask in bench.asked} == {REMOTE}
    assert {(ask.end - ask.first) * PAGE for ask in bench.asked} == {MB}


def test_the_link_decides_about_pieces_and_pauses() -> None:
    bench = Bench(-1)
    bench.piece, bench.room, bench.pace.resume_at = 16 << 10, 40 << 10, 7.0
    assert bench.background.stream(1 << 62, 1.0) == 7.0, "it wants to be called at the end of the pause"
    assert bench.probes == 1 and {(ask.end - ask.first) * PAGE for ask in bench.asked} == {16 << 10}
    assert bench.background.stream(1 << 62, 8.0) is None


def test_rate_zero_streams_nothing() -> None:
    bench = Bench(0)
    assert bench.run(10.0) == {LOCAL: 0, REMOTE: 0}


def test_a_block_without_room_does_not_hold_up_the_other() -> None:
    bench = Bench(2 * MB, pages=64 * MB // PAGE)
    bench.room = 0
    total = bench.run(10.0)
    assert total[REMOTE] == 0 and total[LOCAL] >= 16 * MB


def test_worker_zero_is_asked_for_a_window() -> None:
    bench = Bench(1 << 30, pages=64 * MB // PAGE)
    bench.room = 0
    due = bench.background.stream(1 << 62, 1.0)
    assert sum((ask.end - ask.first) * PAGE for ask in bench.asked) == LOCAL_WINDOW
    assert due is not None and due < 1.1, "its answers do not call the stream"
    bench.answer()
    assert bench.background.stream(1 << 62, 1.1) is not None and bench.asked


def test_no_more_than_the_memory_that_is_left() -> None:
    bench = Bench(1 << 30)
    bench.background.stream(3 * PIECE, 1.0)
    assert sum((ask.end - ask.first) * PAGE for ask in bench.asked) == 3 * PIECE


def test_pieces_go_on_behind_the_cursor_and_around_the_end_once() -> None:
    bench = Bench(-1, pages=600)
    block, bench.room = bench.blocks[REMOTE], CALM_LARGEST
    block.received[100:110] = bytes((RECEIVED,)) * 10
    bench.background.cursor[REMOTE] = 590
    found = []
    for _ in range(5):
        bench.background.stream(1 << 62, 0.0)
        found += [(ask.first, ask.end) for ask in bench.asked]
        bench.asked.clear()  # in flight: not requested twice
        bench.room += CALM_LARGEST
    assert found[0] == (590, 600) and sorted(found) == sorted({*found})
    pages = [page for first, end in found for page in range(first, end)]
    assert sorted(pages) == [page for page in range(600) if not 100 <= page < 110]


@pytest.mark.parametrize("number", [LOCAL, REMOTE])
def test_pages_that_a_killed_writer_left_placing_are_requested(number: int) -> None:
    bench = Bench(64 * MB)
    for block in bench.blocks.values():
        block.received[:] = bytes((RECEIVED,)) * block.pages
    bench.blocks[number].received[7] = PLACING
    bench.blocks[number].received[9] = LOST
    bench.background.stream(1 << 62, 1.0)
    assert bench.asked == [Ask(number, 7, 8)]


def test_a_fragmented_local_block_is_requested_in_large_pieces() -> None:
    """Worker zero skips what is received; a source would send it again."""
    bench = Bench(64 * MB)
    for block in bench.blocks.values():
        block.received[::2] = bytes((RECEIVED,)) * (block.pages // 2)
    bench.background.stream(1 << 62, 1.0)
    largest = dict.fromkeys(bench.blocks, 0)
    for ask in bench.asked:
        largest[ask.block] = max(largest[ask.block], ask.end - ask.first)
    assert largest == {LOCAL: PIECE // PAGE - 1, REMOTE: 1}
