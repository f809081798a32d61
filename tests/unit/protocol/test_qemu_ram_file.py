"""The index of a mapped-ram file: places are checked, an unfinished file is refused."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.qemu_format import PAGE, QemuBlock
from postcopy_protocol.qemu_ram_file import bitmap_bytes, read_index, runs_of
from tests.unit.protocol import qemu_streams as make

IMAGE = make.image()


def index(data: bytes) -> tuple[QemuBlock, ...]:
    return read_index(lambda offset, length: data[offset : offset + length], len(data))


def test_every_page_is_where_the_index_says() -> None:
    blocks = index(IMAGE)
    assert [(block.name, block.size) for block in blocks] == [(block.name, block.size) for block in make.BLOCKS]
    for place, block in enumerate(blocks):
        assert block.mapped is not None
        bitmap = IMAGE[block.mapped.bitmap :][: bitmap_bytes(block.size)]
        for first, end, there in runs_of(bitmap, 0, block.size // PAGE):
            for offset in range(first * PAGE, end * PAGE, PAGE):
                data = IMAGE[block.mapped.pages + offset :][:PAGE] if there else None
                assert data == make.content(place, offset)


@given(st.binary(min_size=9, max_size=9), st.integers(0, 60), st.integers(1, 12))
def test_runs_of_a_bitmap(bitmap: bytes, first: int, count: int) -> None:
    runs = runs_of(bitmap[first // 8 :], first, count)
    bits = int.from_bytes(bitmap, "little")
    assert [(page, there) for start, end, there in runs for page in range(start, end)] == [
        (page, bool(bits >> page & 1)) for page in range(first, first + count)
    ]
    assert all(one[2] != other[2] for one, other in pairwise(runs))


def changed(old: bytes, new: bytes) -> bytes:
    assert old in IMAGE
    return IMAGE.replace(old, new, 1)


FIRST = index(IMAGE)[0].mapped
assert FIRST is not None
PLACES = struct.pack(">QQ", FIRST.bitmap, FIRST.pages)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"not a stream of QEMU" * 9, "no migration stream"),
        (make.header() + make.start(make.BLOCKS), "without the capability mapped-ram"),
        (IMAGE[:300], "cannot be right|has 300 bytes"),
        (IMAGE[:-400], "ends in the middle|has"),
        (changed(PLACES, struct.pack(">QQ", FIRST.bitmap + 1, FIRST.pages)), "cannot be right"),
        (changed(PLACES, struct.pack(">QQ", FIRST.bitmap, FIRST.pages + 4096)), "cannot be right"),
        (changed(PLACES, struct.pack(">QQ", FIRST.bitmap, FIRST.pages << 20)), "cannot be right"),
        (changed(struct.pack(">IQ", 1, PAGE), struct.pack(">IQ", 2, PAGE)), "version 2"),
        (changed(struct.pack(">IQ", 1, PAGE), struct.pack(">IQ", 1, 1 << 16)), "65536"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadMessage, match=why) as raised:
        index(data)
    assert len(str(raised.value).splitlines()) == 1


def test_an_unfinished_file_has_no_bits() -> None:
    data = bytearray(IMAGE)
    for block in index(IMAGE):
        assert block.mapped is not None
        data[block.mapped.bitmap : block.mapped.bitmap + 8] = bytes(8)
    with pytest.raises(BadMessage, match="not complete"):
        index(bytes(data))
