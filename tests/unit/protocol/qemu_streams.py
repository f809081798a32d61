"""Migration streams as QEMU writes them, made by hand: what the tests and the fuzzer of the parser read."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from functools import cache

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.qemu_format import MAX_PIECE, PAGE, QemuBlock
from postcopy_protocol.qemu_stream import Event, StreamParser

FOOTER = b"\x7e" + bytes((0, 0, 0, 2))


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def header(machine: str = "pc-i440fx-7.2", *subsections: bytes) -> bytes:
    return b"QEVM" + struct.pack(">IBI", 3, 7, len(machine)) + machine.encode() + b"".join(subsections)


def subsection(called: str, body: bytes) -> bytes:
    return b"\x05" + name(called) + struct.pack(">I", 1) + body


def capabilities(*names: str) -> bytes:
    return subsection("configuration/capabilities", struct.pack(">I", len(names)) + b"".join(map(name, names)))


def start(blocks: Sequence[QemuBlock], version: int = 4, called: str = "ram") -> bytes:
    total = sum(block.size for block in blocks)
    listed = b"".join(
        name(block.name) + struct.pack(">Q", block.size)
        + (struct.pack(">Q", block.page_size) if block.page_size != PAGE else b"")
        for block in blocks
    )  # fmt: skip
    begun = b"\x01" + struct.pack(">I", 2) + name(called) + struct.pack(">II", 0, version)
    return begun + struct.pack(">Q", total | 4) + listed + end_of_body()


def end_of_body() -> bytes:
    return struct.pack(">Q", 0x10) + FOOTER


def page(offset: int, data: bytes | None, block: str = "") -> bytes:
    """A record of a page; None: of zeros; without ``block`` it continues the last one."""
    flags = (2 if data is None else 8) | (0 if block else 0x20)
    return struct.pack(">Q", offset | flags) + (name(block) if block else b"") + (b"\0" if data is None else data)


def part(*records: bytes, kind: int = 2) -> bytes:
    return bytes([kind]) + struct.pack(">I", 2) + b"".join(records) + end_of_body()


def command(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BHH", 8, number, len(payload)) + payload


def discard(block: str, *ranges: tuple[int, int]) -> bytes:
    return command(6, b"\0" + name(block) + b"\0" + b"".join(struct.pack(">QQ", *one) for one in ranges))


def package(*pings: int, devices: bytes = b"d" * 3000) -> bytes:
    inside = command(4) + devices + b"".join(command(2, struct.pack(">I", ping)) for ping in pings) + command(5)
    return command(7, struct.pack(">I", len(inside))) + inside


def full(called: str = "timer") -> bytes:
    return b"\x04" + struct.pack(">I", 0) + name(called) + struct.pack(">II", 0, 2) + b"state" * 20


BLOCKS = (QemuBlock("pc.ram", 16 * PAGE), QemuBlock("/rom@etc/acpi/tables", 2 * PAGE))


def content(place: int, offset: int) -> bytes | None:
    """What stands in a page of BLOCKS: every third one is zeros."""
    number = offset // PAGE
    return None if number % 3 == 2 else bytes([place + 1, number]) * (PAGE // 2)


def records(blocks: Sequence[QemuBlock] = BLOCKS) -> list[bytes]:
    """Every page of the blocks once, in order."""
    made = []
    for place, block in enumerate(blocks):
        for offset in range(0, block.size, PAGE):
            made.append(page(offset, content(place, offset), "" if offset else block.name))
    return made


@cache
def snapshot() -> bytes:
    """A background snapshot."""
    pages = records()
    return header() + start(BLOCKS) + part(*pages[:7]) + part() + part(*pages[7:]) + full() + b"anything"


@cache
def postcopy(*pings: int) -> bytes:
    """A post-copy: a first round with wrong pages, discards, the package, all pages."""
    first = part(page(0, b"x" * PAGE, "pc.ram"), page(PAGE, None), page(5 * PAGE, b"y" * PAGE))
    said = command(1) + command(2, struct.pack(">I", 1)) + command(3, struct.pack(">QQ", PAGE, PAGE))
    drop = discard("pc.ram", (0, 2 * PAGE), (3 * PAGE, 13 * PAGE)) + discard("pc.ram", (2 * PAGE, PAGE))
    pages = records()
    begun = header() + said + start(BLOCKS) + first + command(11) + drop + command(2, struct.pack(">I", 2))
    return begun + package(*pings) + part(*pages[:9]) + part(*pages[9:], kind=3) + b"\0"


@cache
def image() -> bytes:
    """A mapped-ram file of BLOCKS. Pages of zeros have no bit, and other bytes in their place."""
    total = sum(block.size for block in BLOCKS)
    data = bytearray(header("pc-q35-11.1", capabilities("mapped-ram")))
    data += b"\x01" + struct.pack(">I", 2) + name("ram") + struct.pack(">II", 0, 4) + struct.pack(">Q", total | 4)
    for place, block in enumerate(BLOCKS):
        data += name(block.name) + struct.pack(">Q", block.size)
        bitmap = len(data) + 28
        pages = -(-(bitmap + 8) // (1 << 20)) << 20
        contents = [content(place, offset) for offset in range(0, block.size, PAGE)]
        bits = sum(1 << number for number, one in enumerate(contents) if one is not None)
        data += struct.pack(">IQQQ", 1, PAGE, bitmap, pages) + bits.to_bytes(8, "little")
        data += bytes(pages - len(data)) + b"".join(one or b"old!" * (PAGE // 4) for one in contents)
    return bytes(data) + end_of_body() + part() + command(11) + part(kind=3) + full()


class Kept:
    """A sink that keeps everything, with what is wrong about the calls."""

    def __init__(self) -> None:
        self.blocks: tuple[QemuBlock, ...] = ()
        self.pages: dict[tuple[int, int], bytes] = {}
        self.came = 0

    def begin(self, blocks: tuple[QemuBlock, ...]) -> None:
        assert not self.blocks
        self.blocks = blocks

    def place(self, block: int, offset: int, pages: Sequence[memoryview]) -> None:
        for number, data in enumerate(pages):
            assert len(data) == PAGE
            self._keep(block, offset + number * PAGE, bytes(data))

    def zero(self, block: int, offset: int, length: int) -> None:
        assert length > 0
        for at in range(offset, offset + length, PAGE):
            self._keep(block, at, bytes(PAGE))

    def discard(self, block: int, offset: int, length: int) -> None:
        for at in range(offset, offset + length, PAGE):
            self.pages.pop((block, at), None)

    def _keep(self, block: int, offset: int, data: bytes) -> None:
        assert offset % PAGE == 0 and 0 <= offset < self.blocks[block].size
        self.pages[block, offset] = data
        self.came += 1


def read(
    data: bytes, sizes: Sequence[int] = (1 << 20,), parser: StreamParser | None = None
) -> tuple[Kept, list[Event]]:
    """Give a stream to a parser in slices of these sizes, in turn. Raises BadMessage, also for what is not whole."""
    kept = Kept()
    parser = parser or StreamParser(kept)
    events: list[Event] = []
    waiting, at, turn = b"", 0, 0
    while at < len(data):
        size = max(1, sizes[turn % len(sizes)])
        waiting += data[at : at + size]
        at, turn = at + size, turn + 1
        taken, more = parser.parse(waiting)
        assert 0 <= taken <= len(waiting)
        waiting = waiting[taken:]
        assert len(waiting) < MAX_PIECE
        events += more
    parser.finish()
    return kept, events


def nearly(chance: random.Random) -> bytes:
    """A stream with something wrong about it, perhaps."""
    data = bytearray(chance.choice((snapshot(), postcopy(3), postcopy(3, 0x42), image()[:4000])))
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        if not data:
            break
        at = chance.randrange(min(len(data), chance.choice((40, 300, 4000, 1 << 20))))
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + chance.choice((1, 8, 4096))]
            case 2:
                data[at:at] = chance.randbytes(chance.choice((1, 8, 20)))
            case _:
                data[at : at + 8] = struct.pack(">Q", chance.choice((0, 0x10, 0x28, 0x22, PAGE | 0x28, 1 << 63, 64)))
    return bytes(data)


def judge(data: bytes, chance: random.Random) -> None:
    """The same in one slice and in many: both are taken, or both are refused. Raises BadMessage for what is refused."""
    refusal: BadMessage | None = None
    whole: tuple[Kept, list[Event]] | None = None
    try:
        whole = read(data)
    except BadMessage as error:
        refusal = error
    try:
        sliced = read(data, [chance.choice((1, 7, 64, 4096, 5000)) for _ in range(9)])
    except BadMessage:
        assert refusal is not None
        raise refusal from None
    assert whole is not None, refusal
    assert sliced[0].pages == whole[0].pages and sliced[1] == whole[1]
