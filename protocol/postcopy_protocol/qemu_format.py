"""The parts of QEMU's migration format that a stream and a mapped-ram file have in common. Sans-I/O.

Source: QEMU's ``migration/`` (savevm.c, ram.c, vmstate.c), versions 7.2 to 11.1. Integers are big endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import BadMessage

MAGIC, VERSION = 0x5145564D, 3
MAGIC_BYTES = MAGIC.to_bytes(4, "big")
PAGE = 4096  # the only target page size that is understood
MAX_BLOCKS = 4096
MAX_BLOCK_BYTES = 16 << 40
MAX_PIECE = 66 << 10  # bytes: more than the longest that must be there at once, a command

EOF, START, PART, END, FULL, SUBSECTION, CONFIGURATION, COMMAND, FOOTER = 0, 1, 2, 3, 4, 5, 7, 8, 0x7E
ZERO, MEM_SIZE, DATA, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
FLAGS = PAGE - 1
RAM_VERSION = 4
MAPPED_RAM, IGNORE_SHARED = "mapped-ram", "x-ignore-shared"

_MAPPED = struct.Struct(">IQQQ")

Buffer = bytes | bytearray | memoryview


class Short(Exception):
    """More bytes are needed."""


class Cursor:
    """Reads fields of ``data`` from ``at`` on. Raises Short at its end."""

    def __init__(self, data: Buffer, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.data):
            raise Short
        taken = bytes(self.data[self.at : end])
        self.at = end
        return taken

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def name(self, length: int = 1) -> str:
        """A name behind its length. Raises BadMessage for what is no text."""
        size = self.number(length)
        if size > 255:
            raise BadMessage(f"a name of {size} bytes")
        taken = self.take(size)
        if not size or not taken.isascii() or not taken.decode().isprintable():
            raise BadMessage(f"{taken[:40]!r} is no name")
        return taken.decode()


@dataclass(frozen=True, slots=True)
class MappedRam:
    """Where a mapped-ram file has the pages of a block, absolute offsets in bytes."""

    bitmap: int
    pages: int


@dataclass(frozen=True, slots=True)
class QemuBlock:
    """A RAM block of QEMU: ``page_size`` is that of the host memory behind it. ``mapped``: in a mapped-ram file."""

    name: str
    size: int
    page_size: int = PAGE
    mapped: MappedRam | None = None


def offered_names(blocks: Iterable[QemuBlock]) -> list[str]:
    """The names under which blocks are offered: QEMU's own, with ``_`` for what no block name may have."""
    names: list[str] = []
    for block in blocks:
        name = plain = re.sub(r"[^A-Za-z0-9._-]", "_", block.name.lstrip("/_.-"))[:40] or "ram"
        number = 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def read_header(cursor: Cursor) -> frozenset[str]:
    """Read magic, version and configuration with all its subsections; returns the capabilities that it names. One byte
    behind it must be there. Raises Short, BadMessage."""
    if (magic := cursor.number(4)) != MAGIC:
        raise BadMessage(f"this is no migration stream of QEMU: it begins with {magic:#010x}")
    if (version := cursor.number(4)) != VERSION:
        raise BadMessage(f"the migration stream has version {version}; {VERSION} is understood")
    capabilities: frozenset[str] = frozenset()
    if cursor.number(1) != CONFIGURATION:
        raise BadMessage("the migration stream has no configuration: the machine type is older than QEMU 2.4")
    machine = cursor.name(4)
    while cursor.number(1) == SUBSECTION:
        name, version = cursor.name(), cursor.number(4)
        if name == "configuration/target-page-bits":
            if (bits := cursor.number(4)) != 12:
                raise BadMessage(f"{machine} has pages of {1 << min(bits, 63)} bytes; only 4096 are understood")
        elif name == "configuration/capabilities":
            count = cursor.number(4)
            if count > 64:
                raise BadMessage(f"{count} capabilities")
            capabilities = frozenset(cursor.name() for _ in range(count))
        elif name == "configuration/uuid":
            cursor.take(16)
        else:
            raise BadMessage(f"the configuration has {name} (version {version}), which is not understood")
    cursor.at -= 1
    return capabilities


def read_section_start(cursor: Cursor) -> tuple[int, str, int]:
    """Number, name and version of a section, behind its type."""
    number, name = cursor.number(4), cursor.name()
    cursor.number(4)  # instance
    return number, name, cursor.number(4)


def read_block(cursor: Cursor, left: int, capabilities: frozenset[str], advised_page: int) -> QemuBlock:
    """One entry of the list of RAM blocks, of which ``left`` bytes of memory are to come. ``advised_page``: the or of
    all page sizes that post-copy advised, 0 without post-copy. Raises Short, BadMessage."""
    name, size = cursor.name(), cursor.number(8)
    if not 0 < size <= left or size % PAGE:
        raise BadMessage(f"RAM block {name} has {size} bytes, where {left} are left")
    # Only a block whose page size differs from the host's says it, and then the advice has a bit above 4096.
    page_size = PAGE
    if advised_page & ~PAGE:
        ahead = Cursor(cursor.data, cursor.at)
        said = ahead.number(8)
        if said & advised_page and not said & (said - 1) and said != PAGE:
            page_size, cursor.at = said, ahead.at
            if size % page_size:
                raise BadMessage(f"RAM block {name} of {size} bytes has pages of {page_size}")
    if IGNORE_SHARED in capabilities:
        cursor.number(8)
    mapped = None
    if MAPPED_RAM in capabilities:
        version, page, bitmap, pages = _MAPPED.unpack(cursor.take(_MAPPED.size))
        if version != 1 or page != PAGE:
            raise BadMessage(f"RAM block {name}: mapped-ram of version {version} with pages of {page} bytes")
        mapped = MappedRam(bitmap, pages)
    return QemuBlock(name, size, page_size, mapped)
