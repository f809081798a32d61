"""The histogram against sorted lists, and the layout that several programs share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol import counters
from postcopy_protocol.counters import HISTOGRAM, LAST_BUCKET, LONGEST_NS, WORDS, bounds, bucket

quick = settings(deadline=None)
latencies = st.integers(256, (1 << 38) - 1) | st.integers(256, 1 << 20)


def filled(values: list[int], *, longest: bool = True) -> list[int]:
    words = [0] * WORDS
    for ns in values:
        words[bucket(ns)] += 1
    words[LONGEST_NS] = max(values, default=0) if longest else 0
    return words


@quick
@given(latencies)
def test_a_latency_lies_in_its_bucket(ns: int) -> None:
    low, high = bounds(bucket(ns))
    assert low <= ns < high and high - low <= ns // 8


def test_buckets_are_all_used_and_next_to_each_other() -> None:
    for word in range(HISTOGRAM + 1, LAST_BUCKET + 1):
        low, high = bounds(word)
        assert bounds(word - 1)[1] == low
        assert bucket(low) == bucket(high - 1) == word and bucket(low - 1) == word - 1
    assert bounds(HISTOGRAM) == (256, 288) and bounds(LAST_BUCKET)[1] == 1 << 38


@pytest.mark.parametrize("ns", [-1, 0, 1, 255])
def test_what_is_too_short_falls_into_the_first(ns: int) -> None:
    assert bucket(ns) == HISTOGRAM


@pytest.mark.parametrize("ns", [1 << 38, (1 << 64) - 1])
def test_what_is_too_long_falls_into_the_last(ns: int) -> None:
    assert bucket(ns) == LAST_BUCKET < WORDS


@quick
@given(st.lists(latencies, min_size=1, max_size=60), st.sampled_from((1, 50, 90, 99, 99.9, 100)))
def test_a_percentile_is_within_a_sixteenth_of_the_sorted_list(values: list[int], percent: float) -> None:
    rank = max(1, -int(-len(values) * percent // 100))
    exact = sorted(values)[rank - 1]
    assert counters.percentile(filled(values), percent) * 1000 == pytest.approx(exact, rel=0.0626)


def test_an_empty_page_is_all_zeros() -> None:
    assert counters.summary(filled([])) == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    assert counters.count(filled([])) == 0


def test_the_longest_is_exact_where_it_was_noted() -> None:
    assert counters.longest(filled([10_000, 123_456])) == 123.456
    assert counters.longest(filled([123_456], longest=False)) == bounds(bucket(123_456))[1] / 1000
    assert counters.summary(filled([1000] * 98 + [123_456] * 2))["p99"] == pytest.approx(123.5, rel=0.07)


@quick
@given(st.lists(st.lists(latencies, max_size=20), max_size=4))
def test_merging_is_like_one_worker_that_saw_it_all(several: list[list[int]]) -> None:
    together = [ns for values in several for ns in values]
    assert list(counters.merge(filled(values) for values in several)) == filled(together)


def test_merging_adds_counters_and_forgets_what_belongs_to_one_worker() -> None:
    one = list(range(1, WORDS + 1))
    merged = counters.merge([one, one])
    assert merged[counters.FAULTS] == 2 and merged[counters.PLAIN] == 2 * (counters.PLAIN + 1)
    assert merged[counters.WORKER_PID] == merged[counters.BUSY_SINCE_NS] == merged[counters.INCARNATION] == 0
    assert merged[LONGEST_NS] == one[LONGEST_NS]


def test_no_two_words_share_a_place() -> None:
    names = ("FAULTS PLACED WAKES REQUESTS DEDUPLICATED AROUND LOST FAILURES PLAIN LONGEST_NS BUSY_SINCE_NS "
             "WORKER_PID INCARNATION").split()  # fmt: skip
    places = [getattr(counters, name) for name in names]
    assert len(set(places)) == len(places) and max(places) < HISTOGRAM
    assert counters.WINDOW_LIMIT != counters.ENDING


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1000), st.integers(0, (1 << 40) - 1)), max_size=60))
def test_pages_that_are_denied_are_noted_once_and_forgotten_again(steps: list[tuple[bool, int, int]]) -> None:
    words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
    noted: list[tuple[int, int]] = []
    for deny, block, page in steps:
        block, page = block % 3 + 1, page % 5 + (1 << 39)
        if deny:
            counters.deny(words, block, page)
            noted += [] if (block, page) in noted else [(block, page)]
        else:
            counters.allow(words, block, page)
            noted = [note for note in noted if note != (block, page)]
        assert sorted(counters.denied(words)) == sorted(noted)
    assert not any(words[: counters.DENIED])


def test_more_pages_than_fit_are_counted() -> None:
    words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
    for page in range(counters.MOST_DENIED + 3):
        counters.deny(words, 1, page)
    assert len(counters.denied(words)) == counters.MOST_DENIED and words[counters.UNNOTED] == 3


@quick
@given(st.lists(latencies, max_size=60))
def test_sum_and_cumulative_buckets(values: list[int]) -> None:
    words = filled(values)
    assert counters.sum_ns(words) == pytest.approx(sum(values), rel=0.0626)
    steps = counters.cumulative(words)
    for bound, count in steps:
        assert count == sum(ns < bound for ns in values)
    assert steps[-1][1] == len(values)


@pytest.mark.parametrize("text", ["", "ValueError: no", "é" * 1000, "\udce9 \x1b", "x" * counters.MOST_REASON])
def test_a_reason_is_kept_as_far_as_there_is_room(text: str) -> None:
    words = memoryview(bytearray(counters.PAGE_BYTES)).cast("Q")
    counters.note_reason(words, "an older and much longer reason" * 20, 7, 7)
    counters.note_reason(words, text, 3, 1 << 39)
    kept = counters.reason(words)
    assert kept.rstrip("\ufffd") == text.encode("utf-8", "replace")[: counters.MOST_REASON].decode("utf-8", "ignore")
    assert counters.place_of(words[counters.EXPLAINED]) == (3, 1 << 39)
    words[counters.EXPLAINED] = 0
    assert not any(words[: counters.REASON]) and not any(words[HISTOGRAM:])
