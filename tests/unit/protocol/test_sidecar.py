"""The sidecar of a snapshot: there and back, damage, and working sets that outlive a changed snapshot."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.caibx import Index, index_of
from postcopy_protocol.errors import BadInput
from postcopy_protocol.sidecar import (
    NeededPage,
    Sidecar,
    WorkingSet,
    bitmap,
    format_sidecar,
    parse_sidecar,
    runs_of,
)

PAGE, CHUNK = 4096, 4 * 4096


def index(*names: int) -> Index:
    """Chunks of four pages, whose ids are these numbers."""
    return index_of(((name.to_bytes(32, "big"), CHUNK) for name in names), CHUNK)


needed = st.builds(
    NeededPage,
    st.binary(min_size=32, max_size=32),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 99),
)


@given(st.integers(1, 300), st.data())
def test_there_and_back(pages: int, data: st.DataObject) -> None:
    zero = data.draw(st.sets(st.integers(0, pages - 1)))
    working_set = WorkingSet(data.draw(st.integers(0, 9)), data.draw(st.lists(needed, max_size=20)))
    sidecar = Sidecar(bytes(range(32)), pages * PAGE, bitmap(pages, zero), working_set)
    again = parse_sidecar(format_sidecar(sidecar))
    assert again == sidecar and again.zero_pages == len(zero)
    first = data.draw(st.integers(0, pages - 1))
    count = data.draw(st.integers(1, pages - first))
    assert again.is_zero(first, count) == (set(range(first, first + count)) <= zero)


@given(st.data())
def test_damage_is_seen(data: st.DataObject) -> None:
    """Zeros are taken from it, so not one bit may differ."""
    good = format_sidecar(Sidecar(bytes(32), 80 * PAGE, bitmap(80, [3, 4])))
    bad = bytearray(good)
    if data.draw(st.booleans()):
        bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        bad = bad[: data.draw(st.integers(0, len(good) - 1))]
    with pytest.raises(BadInput):
        parse_sidecar(bytes(bad))


def bomb(size: int, zeros: bytes, needed: object) -> bytes:
    body: bytes = msgpack.packb([bytes(32), size, zlib.compress(zeros), 1, bytes(32), needed])
    return b"postcopy-sidecar-1\n\n" + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    ("size", "zeros", "needed"),
    [
        ((65 << 20) * 8 * PAGE, bytes(65 << 20), zlib.compress(b"")),  # the size fits the bitmap
        (8 * PAGE, bytes(65 << 20), zlib.compress(b"")),
        (8 * PAGE, b"\0", zlib.compress(bytes(65 << 20))),
        (8 * PAGE, b"\0", [[]] * (1 << 18)),
    ],
)
def test_a_small_file_takes_no_large_memory(size: int, zeros: bytes, needed: object) -> None:
    data = bomb(size, zeros, needed)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput):
            parse_sidecar(data)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


def test_a_working_set_grows_by_runs() -> None:
    first = WorkingSet().merged(index(1, 2, 3), [9, 0, 9, 4])
    second = first.merged(index(1, 2, 3), [4, 1])
    assert second.runs == 2
    assert [(page.page, page.inside, page.count) for page in second.pages] == [
        (9, 1, 1), (0, 0, 1), (4, 0, 2), (1, 1, 1),
    ]  # fmt: skip
    assert second.pages_in(index(1, 2, 3)) == [9, 0, 4, 1]


def test_a_working_set_follows_its_chunks() -> None:
    found = WorkingSet().merged(index(1, 2, 3), [9, 0, 4])
    assert found.pages_in(index(7, 3, 1, 2)) == [5, 8, 12]  # all moved
    assert found.pages_in(index(1, 7, 3)) == [9, 0, 4]  # one changed: it is still needed
    assert found.pages_in(index(7, 8, 3)) == [9]  # another image
    assert found.pages_in(index(3)) == [1]


def test_ranges() -> None:
    assert list(runs_of([1, 2, 3, 7, 8, 30], 0, 99)) == [(1, 3), (7, 2), (30, 1)]
    assert list(runs_of([1, 2, 3, 7, 8, 30], 4, 99)) == [(1, 8), (30, 1)]
    assert list(runs_of(range(5), 0, 2)) == [(0, 2), (2, 2), (4, 1)]
    assert list(runs_of([], 0, 2)) == []
