"""Faults that come again after they were answered: which count, and how their client is slowed down."""

from __future__ import annotations

import time
from itertools import chain, repeat

import pytest

from postcopy_workers.repeats import LONGEST_PAUSE, MOST_AGAIN, Repeats

PAGE = 4096


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time: one element, to be changed."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def no_pause(seconds: float) -> None:
    pytest.fail(f"a pause of {seconds} s")


def test_pages_in_sequence_never_count(clock: list[float]) -> None:
    seen = Repeats(no_pause)
    assert not any(seen.seen(page * PAGE, 12) for page in range(100_000))


def test_a_page_that_repeats_slowly_is_answered_at_once(clock: list[float]) -> None:
    seen = Repeats(no_pause)
    for _ in range(20 * MOST_AGAIN):
        clock[0] += 1.01 / MOST_AGAIN
        assert not seen.seen(PAGE, 12)


@pytest.mark.parametrize("pages", [1, 2, 1000])
def test_pages_that_repeat_fast_are_slowed_down_ever_more(clock: list[float], pages: int) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    seen = Repeats(pause)
    for page in chain.from_iterable(repeat(range(pages), 20 * MOST_AGAIN // pages + 2)):
        clock[0] += 20e-6
        seen.seen(page * PAGE, 12)
    assert pauses[:3] == [0.01, 0.02, 0.04] and pauses[-1] == LONGEST_PAUSE
    clock[0] += 2
    assert not any(seen.seen(0, 12) for _ in range(MOST_AGAIN)), "after a rest it begins again"
