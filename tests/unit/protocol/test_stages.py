"""Stages of faults: the layout that workers and supervisor share, and what is told of it."""

from __future__ import annotations

from postcopy_protocol import counters, stages
from postcopy_protocol.counters import bucket


def filled(**latencies: list[int]) -> memoryview:
    words = stages.scratch()
    starts = dict(zip(stages.NAMES, (stages.ASKED, stages.ARRIVED, stages.PLACED, stages.WOKEN), strict=True))
    for name, found in latencies.items():
        for ns in found:
            words[bucket(ns) + starts[name]] += 1
    return words


def test_each_stage_has_words_of_its_own() -> None:
    shortest, longest = 1, 1 << 60
    words = filled(**{name: [shortest, longest] for name in stages.NAMES})
    assert sum(words) == 2 * len(stages.NAMES) == sum(count == 1 for count in words)
    for name in stages.NAMES:
        assert counters.count(stages.histogram(words, name)) == 2


def test_rooms_of_blocks_lie_behind_the_statistics_page_and_do_not_overlap() -> None:
    places = [stages.position(block) for block in range(1, stages.MOST_BLOCKS + 1)]
    assert places == list(range(counters.PAGE_BYTES, stages.END, stages.BYTES))
    assert stages.position(0) is None and stages.position(stages.MOST_BLOCKS + 1) is None


def test_what_is_told_is_what_the_histogram_says() -> None:
    words = filled(placed=[5_000] * 98 + [900_000] * 2, woken=[7_000])
    told = stages.summaries(stages.snapshot(words))
    assert list(told) == ["placed", "woken"]
    assert told["placed"]["count"] == 100
    assert told["placed"]["p50"] == round(counters.percentile(stages.histogram(words, "placed"), 50), 1)
    assert 800 < told["placed"]["p99"] <= told["placed"]["max"] < 1000
    assert stages.summaries(stages.snapshot(None)) == stages.summaries(stages.snapshot(stages.scratch())) == {}


def test_many_clients_add_up_and_a_spoilt_word_harms_nobody() -> None:
    one, other = filled(asked=[300], woken=[1 << 30]), filled(asked=[300], arrived=[4_000])
    total = stages.merged([one, other])
    assert total.tolist() == [left + right for left, right in zip(one, other, strict=True)]
    joined = [0] * stages.WORDS
    for words in (one, other):
        stages.join(joined, stages.snapshot(words))
    assert joined == total.tolist()
    one[stages.WORDS - 1] = other[stages.WORDS - 1] = (1 << 64) - 1
    assert len(stages.merged([one, other])) == stages.WORDS
