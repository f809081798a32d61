"""Firecracker's list of regions: every version, any slicing, and whatever a hostile machine sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.firecracker import LARGEST_BODY, GuestRegion, RegionsReader, check_regions

MIB = 1 << 20
PLAIN = {"base_host_virt_addr": 0x7F0000000000, "size": 2 * MIB, "offset": 0}


def read(body: Any) -> tuple[GuestRegion, ...] | None:
    return RegionsReader().feed(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("more", "page_size"),
    [
        ({}, 4096),
        ({"page_size_kib": 4096}, 4096),
        ({"page_size_kib": 2 * MIB}, 2 * MIB),
        ({"page_size": 2 * MIB, "page_size_kib": 4096}, 2 * MIB),
        ({"page_size": 4096, "gpa_start": 0, "is_guest_memfd": False}, 4096),
    ],
)
def test_every_version(more: dict[str, Any], page_size: int) -> None:
    assert read([{**PLAIN, **more}]) == (GuestRegion(0x7F0000000000, 2 * MIB, 0, page_size),)


@given(st.data())
def test_any_slicing(data: st.DataObject) -> None:
    body = json.dumps([PLAIN, {**PLAIN, "base_host_virt_addr": 1 << 40, "offset": 2 * MIB}], indent=1).encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=20)))
    reader, found = RegionsReader(), None
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        assert found is None
        found = reader.feed(body[start:end])
    assert found is not None and [region.offset for region in found] == [0, 2 * MIB]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PLAIN, "page_size"]), inner),
        max_leaves=12,
    ).map(lambda body: json.dumps([body]).encode())
)
def test_anything_else_is_bad_message_or_not_complete(data: bytes) -> None:
    try:
        found = RegionsReader().feed(data)
    except BadMessage:
        return
    assert found is None or all(type(region.size) is int for region in found)


def test_a_body_without_end_is_refused() -> None:
    reader = RegionsReader()
    with pytest.raises(BadMessage, match="does not end"):
        for _ in range(300):
            reader.feed(b"[ ]]"[:2])
    with pytest.raises(BadMessage, match="does not end"):
        RegionsReader().feed(b"[" * (LARGEST_BODY + 1))
    with pytest.raises(BadMessage, match="nested"):
        RegionsReader().feed(b"[" * 100_000 + b"]")


def regions(*sizes: int, **more: int) -> list[GuestRegion]:
    """Neighbours in the file, apart in memory."""
    found, offset = [], 0
    for number, size in enumerate(sizes, 1):
        found.append(GuestRegion(number << 40, size, offset, more.get("page_size", 4096)))
        offset += size
    return found


def test_regions_that_fit() -> None:
    check_regions(regions(3 * MIB, MIB), 4 * MIB, 4096)
    check_regions(list(reversed(regions(3 * MIB, MIB))), 4 * MIB, 4096)
    check_regions(regions(4 * MIB, page_size=2 * MIB), 4 * MIB, 2 * MIB)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (regions(3 * MIB), "3145728 bytes, the block 4194304"),
        (regions(4 * MIB, MIB), "another snapshot"),
        (regions(4 * MIB, page_size=2 * MIB), "pages have 2097152"),
        ([GuestRegion(1 << 40, 4 * MIB, 4096, 4096)], "bytes of the memory file from 0 are missing"),
        ([*regions(2 * MIB), GuestRegion(2 << 40, 2 * MIB, MIB, 4096)], "from 1048576 come twice"),
        ([*regions(2 * MIB), GuestRegion((1 << 40) + MIB, 2 * MIB, 2 * MIB, 4096)], "overlaps"),
        ([GuestRegion(0, 4 * MIB, 0, 4096)], "no range of addresses"),
        ([GuestRegion((1 << 64) - 4096, 4 * MIB, 0, 4096)], "no range of addresses"),
        ([GuestRegion(100, 4 * MIB, 0, 4096)], "no whole number of pages"),
        ([GuestRegion(1 << 40, 0, 0, 4096)], "no whole number of pages"),
    ],
)
def test_regions_that_do_not(wrong: list[GuestRegion], reason: str) -> None:
    with pytest.raises(BadMessage, match=reason):
        check_regions(wrong, 4 * MIB, 4096)
