"""Regions, the address space of a client, runs of pages."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.geometry import PAGE_2M, PAGE_4K, AddressSpace, Region, page_count, runs

quick = settings(deadline=None)
pages = st.integers(1, 60)
ranges = st.tuples(pages, st.integers(1, 8))


def region(page: int, count: int, *, block: int = 0, offset: int = 0) -> Region:
    return Region(block, "private", page * PAGE_4K, count * PAGE_4K, offset * PAGE_4K)


def test_the_last_page_may_be_partial() -> None:
    assert [page_count(size, PAGE_4K) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert page_count(PAGE_2M + 1, PAGE_2M) == 2


@quick
@given(st.lists(ranges, max_size=12), st.lists(st.integers(0, 30)))
def test_an_address_space_agrees_with_a_table_of_pages(wanted: list[tuple[int, int]], removed: list[int]) -> None:
    space, table = AddressSpace(), dict[int, Region]()
    for number, (start, count) in enumerate(wanted):
        new = region(start, count, block=number, offset=number)
        covered = range(start, start + count)
        if any(page in table for page in covered):
            with pytest.raises(BadMessage, match="overlaps"):
                space.add(new)
            continue
        space.add(new)
        table.update(dict.fromkeys(covered, new))
    for page in removed:
        known = table.get(page)
        if known is None or known.address != page * PAGE_4K:
            with pytest.raises(BadMessage):
                space.remove(page * PAGE_4K)
            continue
        assert space.remove(page * PAGE_4K) == known
        table = {at: other for at, other in table.items() if other != known}
    assert list(space) == sorted(set(table.values()), key=lambda known: known.address)
    assert len(space) == len(set(table.values()))
    for page in range(80):
        known = table.get(page)
        for address in (page * PAGE_4K, page * PAGE_4K + 7, (page + 1) * PAGE_4K - 1):
            assert space.find(address) == (None if known is None else (known, address - known.address + known.offset))


@pytest.mark.parametrize(
    "wrong",
    [
        Region(0, "private", 4097, 4096, 0),
        Region(0, "private", 4096, 4095, 0),
        Region(0, "private", 4096, 4096, 1),
        Region(0, "private", 4096, 0, 0),
        Region(0, "private", 0, 4096, 0),
        Region(0, "private", -4096, 4096, 0),
        Region(0, "private", 4096, 4096, -4096),
        Region(0, "private", (1 << 64) - 4096, 8192, 0),
    ],
)
def test_impossible_regions_are_refused(wrong: Region) -> None:
    space = AddressSpace()
    with pytest.raises(BadMessage):
        space.add(wrong)
    assert not len(space)


def test_alignment_is_that_of_the_block() -> None:
    with pytest.raises(BadMessage, match="aligned"):
        AddressSpace().add(region(1, 512), PAGE_2M)


@quick
@given(ranges, st.integers(0, 9), st.integers(0, 80))
def test_address_of_is_the_inverse_of_find(where: tuple[int, int], offset: int, page: int) -> None:
    known = region(*where, offset=offset)
    address = known.address_of(page * PAGE_4K)
    if address is None:
        assert not offset <= page < offset + where[1]
    else:
        assert AddressSpace([known]).find(address) == (known, page * PAGE_4K)


@quick
@given(st.lists(st.integers(0, 40), max_size=60))
def test_runs_cover_exactly_the_pages_and_never_touch(wanted: list[int]) -> None:
    merged = list(runs(iter(wanted)))
    assert [page for start, stop in merged for page in range(start, stop)] == sorted(set(wanted))
    assert all(before[1] < after[0] for before, after in pairwise(merged))
