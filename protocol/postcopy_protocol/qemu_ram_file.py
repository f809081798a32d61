"""A file of QEMU's ``file:`` migration with the capability mapped-ram (QEMU 9.0 and later): where each page lies.

Every block has a bitmap and a place for all its pages, at absolute offsets. A set bit: the page is in the file. A clear
one: it is zeros, whatever lies there. The bitmaps are written last, so an unfinished file has none. Sans-I/O: the
caller reads.
"""

from __future__ import annotations

from collections.abc import Callable

from .errors import BadMessage
from .qemu_format import (
    COMMAND,
    END,
    EOS,
    FOOTER,
    MAPPED_RAM,
    MAX_BLOCKS,
    MAX_PIECE,
    MEM_SIZE,
    PAGE,
    PART,
    RAM_VERSION,
    START,
    Cursor,
    QemuBlock,
    Short,
    read_block,
    read_header,
    read_section_start,
)

PAGES_ALIGN = 1 << 20
BITMAP_PIECE = 1 << 20
MAX_RECORDS = 1 << 20  # between the blocks and the end of RAM: rounds of an iteration, which hold nothing here

Read = Callable[[int, int], bytes]
"""Reads (offset, length) of the file; fewer bytes at its end."""


def bitmap_bytes(size: int) -> int:
    """Length of the bitmap of a block of ``size`` bytes."""
    return -(-size // PAGE // 64) * 8


def read_index(read: Read, size: int) -> tuple[QemuBlock, ...]:
    """The blocks of a file of ``size`` bytes. Raises BadMessage for one that is not a complete mapped-ram file."""
    try:
        return _read_index(read, size)
    except Short:
        raise BadMessage("the file ends in the middle: the migration that wrote it was not complete") from None


def _read_index(read: Read, size: int) -> tuple[QemuBlock, ...]:
    cursor = Cursor(read(0, MAX_PIECE))
    capabilities = read_header(cursor)
    if MAPPED_RAM not in capabilities:
        raise BadMessage("the file was written without the capability mapped-ram: switch it on, and migrate again")
    kind = cursor.number(1)
    number, name, version = read_section_start(cursor)
    if kind != START or name != "ram" or version != RAM_VERSION:
        raise BadMessage(f"the section {name} (version {version}) comes before RAM: it is not understood")
    word = cursor.number(8)
    if word & (PAGE - 1) != MEM_SIZE:
        raise BadMessage(f"the RAM section begins with {word:#x}")
    left, at = word - MEM_SIZE, cursor.at
    blocks: list[QemuBlock] = []
    reached = 0
    while left:
        cursor = Cursor(read(at, 1024))
        block = read_block(cursor, left, capabilities, 0)
        reached = _check(block, at + cursor.at, size)
        if any(block.name == one.name for one in blocks) or len(blocks) >= MAX_BLOCKS:
            raise BadMessage(f"RAM block {block.name} comes twice, or is one too many")
        blocks.append(block)
        left -= block.size
        at = reached
    _find_end(read, at, number)
    if not any(_has_bits(read, block) for block in blocks):
        raise BadMessage(
            "the file has no page of any block: the migration that wrote it was not complete, or was a background "
            "snapshot, which cannot be written so"
        )
    return tuple(blocks)


def _check(block: QemuBlock, header_end: int, size: int) -> int:
    """Where the block's pages end. Raises BadMessage for places that are not where QEMU puts them."""
    assert block.mapped is not None
    bitmap, pages = block.mapped.bitmap, block.mapped.pages
    after = bitmap + bitmap_bytes(block.size)
    if bitmap != header_end or pages % PAGES_ALIGN or not after <= pages < after + PAGES_ALIGN:
        raise BadMessage(f"RAM block {block.name}: bitmap at {bitmap} and pages at {pages} cannot be right")
    if pages + block.size > size:
        raise BadMessage(f"RAM block {block.name} ends at {pages + block.size}, but the file has {size} bytes")
    return pages + block.size


def _find_end(read: Read, at: int, number: int) -> None:
    """Read what follows the last block up to the end of the RAM section. Raises BadMessage, Short."""
    cursor = Cursor(read(at, MAX_PIECE))
    _read_end(cursor, number)
    for _ in range(MAX_RECORDS):
        if cursor.at > MAX_PIECE // 2:
            at += cursor.at
            cursor = Cursor(read(at, MAX_PIECE))
        kind = cursor.number(1)
        if kind == COMMAND:
            cursor.number(2)
            cursor.take(cursor.number(2))
        elif kind in (PART, END) and cursor.number(4) == number:
            _read_end(cursor, number)
            if kind == END:
                return
        else:
            raise BadMessage(f"a record of the type {kind:#x} in place of RAM's end")
    raise BadMessage("the RAM section does not end")


def _read_end(cursor: Cursor, number: int) -> None:
    if cursor.number(8) & (PAGE - 1) != EOS or cursor.number(1) != FOOTER or cursor.number(4) != number:
        raise BadMessage("the RAM section holds what a mapped-ram file does not have")


def _has_bits(read: Read, block: QemuBlock) -> bool:
    assert block.mapped is not None
    length = bitmap_bytes(block.size)
    pieces = range(0, length, BITMAP_PIECE)
    return any(read(block.mapped.bitmap + at, min(BITMAP_PIECE, length - at)).strip(b"\0") for at in pieces)


def runs_of(bitmap: bytes, first: int, count: int) -> list[tuple[int, int, bool]]:
    """Neighbouring pages of one kind, as (first, end, in the file), of ``count`` pages from ``first`` on; ``bitmap``
    begins with the byte of page ``first``, whose bit may be in the middle of it."""
    bits = int.from_bytes(bitmap, "little") >> first % 8
    runs: list[tuple[int, int, bool]] = []
    for number in range(count):
        there = bool(bits >> number & 1)
        if runs and runs[-1][2] == there:
            runs[-1] = (runs[-1][0], first + number + 1, there)
        else:
            runs.append((first + number, first + number + 1, there))
    return runs
