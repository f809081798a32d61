"""The parser of QEMU's migration stream: any slicing, every refusal by name."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol import qemu_stream
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.qemu_format import PAGE, QemuBlock
from postcopy_protocol.qemu_stream import StreamParser
from tests.unit.protocol import qemu_streams as make

EXPECTED = {
    (place, offset): make.content(place, offset) or bytes(PAGE)
    for place, block in enumerate(make.BLOCKS)
    for offset in range(0, block.size, PAGE)
}


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_snapshot_in_any_slices(sizes: list[int]) -> None:
    kept, events = make.read(make.snapshot(), sizes)
    assert kept.pages == EXPECTED
    assert kept.blocks == make.BLOCKS
    assert events == [qemu_stream.Devices("timer")]


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_a_postcopy_in_any_slices(sizes: list[int]) -> None:
    kept, events = make.read(make.postcopy(3, 0x42), sizes)
    assert kept.pages == EXPECTED
    assert events == [
        qemu_stream.OpenReturnPath(),
        qemu_stream.Ping(1),
        qemu_stream.Advise(PAGE, PAGE),
        qemu_stream.Ping(2),
        qemu_stream.Package((3, 0x42)),
        qemu_stream.EndOfRam(),
        qemu_stream.EndOfStream(),
    ]


def test_neighbours_come_in_one_call() -> None:
    calls: list[tuple[int, int]] = []

    class Counting(make.Kept):
        def place(self, block: int, offset: int, pages: object) -> None:
            calls.append((offset // PAGE, len(pages)))  # type: ignore[arg-type]

    blocks = (QemuBlock("m", 2000 * PAGE),)
    pages = [make.page(0, b"a" * PAGE, "m"), *(make.page(at * PAGE, b"b" * PAGE) for at in range(1, 700))]
    make.read(make.header() + make.start(blocks) + make.part(*pages) + b"\0", [4 << 20], StreamParser(Counting()))
    assert calls == [(0, 1), (1, 512), (513, 187)]


def test_blocks_of_huge_pages() -> None:
    blocks = (QemuBlock("a", 4 << 20, 2 << 20), QemuBlock("b", PAGE), QemuBlock("c", 2 << 20, 2 << 20))
    advise = make.command(3, struct.pack(">QQ", PAGE | 2 << 20, PAGE))
    kept, _ = make.read(make.header() + advise + make.start(blocks) + b"\0", [1])
    assert kept.blocks == blocks


def test_an_interrupted_one_goes_on_without_a_header() -> None:
    kept = make.Kept()
    kept.begin(make.BLOCKS)
    stream = make.command(10, make.name("pc.ram")) + make.command(9) + make.part(*make.records(), kind=3) + b"\0"
    _, events = make.read(stream, [100], StreamParser(kept, make.BLOCKS, 2))
    assert kept.pages == EXPECTED
    assert events[:2] == [qemu_stream.AskBitmap("pc.ram"), qemu_stream.Resume()]


def test_the_preempt_channel_has_pages_only() -> None:
    kept = make.Kept()
    kept.begin(make.BLOCKS)
    parser = StreamParser(kept, make.BLOCKS, 2, preempt=True)
    data = b"".join(make.records()) + struct.pack(">Q", 0x10)
    assert parser.parse(data) == (len(data), [])
    assert kept.pages == EXPECTED


RAM = make.header() + make.start(make.BLOCKS)


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no migration stream of QEMU"),
        (make.header()[:4] + bytes((0, 0, 0, 4)), "version 4"),
        (make.header("virt", make.subsection("configuration/target-page-bits", bytes((0, 0, 0, 16)))) + RAM, "65536"),
        (make.header("pc", make.subsection("configuration/other", b"")) + RAM, "configuration/other"),
        (make.header("pc", make.capabilities("mapped-ram")) + RAM[len(make.header()) :] + bytes(40), "mapped-ram"),
        (make.header() + make.start(make.BLOCKS, called="vfio"), "section vfio"),
        (make.header() + make.start(make.BLOCKS, version=5), "version 5"),
        (make.header() + make.start([QemuBlock("a", PAGE), QemuBlock("a", PAGE)]), "twice"),
        (make.header() + make.start([QemuBlock("a", PAGE + 1)]), "begins with 0x1005"),
        (RAM + make.part(make.page(0, None)), "without the name"),
        (RAM + make.part(make.page(0, None, "b")), "unknown RAM block b"),
        (RAM + make.part(make.page(16 * PAGE, None, "pc.ram")), "which has 65536 bytes"),
        (RAM + make.part(make.page(0, None, "pc.ram"), make.page(15 * PAGE, None), make.page(16 * PAGE, None)), "has"),
        (RAM + make.part(struct.pack(">Q", 0x100 | 0x28)), "compress"),
        (RAM + make.part(struct.pack(">Q", 0x200)), "multifd"),
        (RAM + make.part(make.page(0, None, "pc.ram")[:-1] + b"\1"), "filled with 1"),
        (RAM + make.part()[:-5] + bytes(5), "footer"),
        (RAM + b"\x03" + bytes(4), "section 0"),
        (RAM + b"\x99", "type 0x99"),
        (RAM + make.discard("pc.ram", (0, 17 * PAGE)), "discard"),
        (RAM + make.discard("b", (0, PAGE)), "unknown RAM block b"),
        (RAM + make.command(2, b"\0"), "too short"),
        (RAM + make.command(7, bytes((0, 0, 0, 9))) + bytes(9), "package"),
        (RAM + make.command(3, struct.pack(">QQ", PAGE, 1 << 16)), "65536"),
        (make.snapshot()[:5000], "in the middle"),
        (b"", "in the middle"),
    ],
)
def test_what_is_refused(stream: bytes, why: str) -> None:
    for sizes in ([1 << 20], [1]):
        with pytest.raises(BadMessage, match=why) as raised:
            make.read(stream, sizes)
        assert len(str(raised.value).splitlines()) == 1


def test_streams_that_are_nearly_right() -> None:
    chance = random.Random(4)
    taken = 0
    for _ in range(150):
        try:
            make.judge(make.nearly(chance), chance)
            taken += 1
        except BadMessage:
            pass
    assert 10 < taken < 140
