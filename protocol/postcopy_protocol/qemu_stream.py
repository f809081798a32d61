"""QEMU's migration stream as the reader of a VM's memory sees it: RAM is understood, device state is skipped. Sans-I/O.

``StreamParser.parse`` takes bytes in any slices. Pages go to a PageSink at once; everything else comes back as events.
The stream of a background snapshot ends its RAM without a mark: the first device section does (``Devices``). A section
that comes before and is not RAM has no length, so it stops the parser with its name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import BadMessage
from .qemu_format import (
    COMMAND,
    CONTINUE,
    DATA,
    END,
    EOF,
    EOS,
    FLAGS,
    FOOTER,
    FULL,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MEM_SIZE,
    PAGE,
    PART,
    RAM_VERSION,
    START,
    ZERO,
    Buffer,
    Cursor,
    QemuBlock,
    Short,
    read_block,
    read_header,
    read_section_start,
)

UNKNOWN_SECTION = -1  # of a migration that another reader began: it is the first one that goes on
MAX_RUN = 512  # pages that a sink gets at once; fewer than IOV_MAX
NEXT_DATA, NEXT_ZERO = DATA | CONTINUE, ZERO | CONTINUE
REFUSED_FLAGS = {0x40: "xbzrle", 0x80: "rdma", 0x100: "compress", 0x200: "multifd"}
RECORD = 8 + PAGE  # bytes of a page with its contents
LOOK = 32  # records that are looked at together; a divisor of MAX_RUN
_U64 = struct.Struct(">Q").unpack_from
_WORDS = struct.Struct(f">Q{PAGE}x").iter_unpack
_RANGE = struct.Struct(">QQ")
_RUN = b"\x08\x00\x05\x00\x00"
_PING = b"\x08\x00\x02\x00\x04"
_PING_BYTES = len(_PING) + 4
_TAIL = len(_RUN) + 4 * _PING_BYTES


class PageSink(Protocol):
    """Takes pages. ``block`` is a place in the list of blocks; offsets and lengths are bytes, whole pages of 4096."""

    def begin(self, blocks: tuple[QemuBlock, ...]) -> object:
        """The list of blocks is known; pages follow."""

    def place(self, block: int, offset: int, pages: Sequence[memoryview]) -> object:
        """Neighbouring pages with their contents. The views are invalid when it returns."""

    def zero(self, block: int, offset: int, length: int) -> object:
        """Pages of zeros."""

    def discard(self, block: int, offset: int, length: int) -> object:
        """What was sent of these pages is no longer right, and comes again."""


@dataclass(frozen=True, slots=True)
class OpenReturnPath:
    """Answers are allowed from now on."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with the same ``value``."""

    value: int


@dataclass(frozen=True, slots=True)
class Advise:
    """Post-copy will be used. ``page_sizes``: all host page sizes, or-ed; ``target``: QEMU's own."""

    page_sizes: int
    target: int


@dataclass(frozen=True, slots=True)
class Package:
    """The VM is stopped and post-copy runs: every page that is not here yet can be requested. ``pings`` came inside."""

    pings: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AskBitmap:
    """Answer which pages of this block are received."""

    block: str


@dataclass(frozen=True, slots=True)
class Resume:
    """The end of a recovery: requests may be sent again."""


@dataclass(frozen=True, slots=True)
class EndOfRam:
    """The RAM section has ended."""


@dataclass(frozen=True, slots=True)
class Devices:
    """The first section of device state, by name: from here on everything is skipped."""

    name: str


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """The stream has ended in order. What follows is skipped."""


Event = OpenReturnPath | Ping | Advise | Package | AskBitmap | Resume | EndOfRam | Devices | EndOfStream


class StreamParser:
    """One connection of a migration. ``blocks``: those of the earlier connection, when this one recovers it, or when
    it is the preempt channel (``preempt``), which carries pages only."""

    def __init__(self, sink: PageSink, blocks: Sequence[QemuBlock] = (), section: int = 0, *, preempt: bool = False):
        self.blocks: tuple[QemuBlock, ...] = tuple(blocks)
        self.section = section  # number of the RAM section
        self.ended = False
        self._sink = sink
        self._preempt = preempt
        self._by_name = {block.name: place for place, block in enumerate(self.blocks)}
        self._step: Callable[[Cursor], None] = self._header
        if preempt:
            self._step = self._ram
        elif blocks:
            self._step = self._record
        self._capabilities: frozenset[str] = frozenset()
        self._advised_pages = 0
        self._left = 0  # bytes of memory whose blocks are still to be listed, or bytes of a package to be skipped
        self._listed: list[QemuBlock] = []
        self._ending = False
        self._block = -1
        self._tail = b""
        self._events: list[Event] = []
        self._taken = 0

    def parse(self, data: Buffer) -> tuple[int, list[Event]]:
        """Take what is complete; returns how many bytes that was, and what happened. The rest, less than MAX_PIECE,
        is to come again with more behind it. Raises BadMessage."""
        cursor = Cursor(memoryview(data))
        self._events = []
        try:
            while True:
                self._taken = cursor.at
                self._step(cursor)
        except Short:
            return self._taken, self._events

    def finish(self) -> None:
        """The connection has ended. Raises BadMessage if the stream has not."""
        if not self.ended:
            raise BadMessage(f"the migration stream ends in the middle ({self._step.__name__.strip('_')})")

    def _header(self, cursor: Cursor) -> None:
        self._capabilities = read_header(cursor)
        self._step = self._record

    def _record(self, cursor: Cursor) -> None:
        kind = cursor.number(1)
        if kind == COMMAND:
            self._command(cursor)
        elif kind in (PART, END):
            number = cursor.number(4)
            if self.section == UNKNOWN_SECTION:
                self.section = number
            if number != self.section or not self.blocks:
                raise BadMessage(f"section {number} goes on, which has not begun")
            self._ending, self._step = kind == END, self._ram
        elif kind in (START, FULL):
            number, name, version = read_section_start(cursor)
            if kind == FULL:
                self._events.append(Devices(name))
                self.ended, self._step = True, self._skip_all
            elif name != "ram" or version != RAM_VERSION:
                raise BadMessage(
                    f"section {name} (version {version}) is not understood, and without it no RAM can be found: "
                    "switch off what makes it (a capability of the migration, or a device)"
                )
            else:
                self.section, self._step = number, self._memory_size
        elif kind == EOF:
            self._events.append(EndOfStream())
            self.ended, self._step = True, self._skip_all
        else:
            raise BadMessage(f"a record of the unknown type {kind:#x}")

    def _memory_size(self, cursor: Cursor) -> None:
        word = cursor.number(8)
        if word & FLAGS != MEM_SIZE or not word & ~FLAGS or self.blocks:
            raise BadMessage(f"the RAM section begins with {word:#x}")
        self._left, self._step = word & ~FLAGS, self._block_list

    def _block_list(self, cursor: Cursor) -> None:
        block = read_block(cursor, self._left, self._capabilities, self._advised_pages)
        if block.name in self._by_name or len(self._listed) >= MAX_BLOCKS or block.size > MAX_BLOCK_BYTES:
            raise BadMessage(f"RAM block {block.name} comes twice, or is one too many, or too large")
        if block.mapped is not None:
            raise BadMessage("the capability mapped-ram is for files: migrate to file:PATH, and serve qemu-ram:PATH")
        self._by_name[block.name] = len(self._listed)
        self._listed.append(block)
        self._left -= block.size
        if not self._left:
            self.blocks = tuple(self._listed)
            self._sink.begin(self.blocks)
            self._step = self._ram

    def _ram(self, cursor: Cursor) -> None:
        """Records of pages: neighbours of one kind go to the sink together. Raises Short at the end of the data."""
        data, at, end = cursor.data, cursor.at, len(cursor.data)
        start = past = 0  # the bytes of the block that the run covers
        kind = 0
        pages: list[memoryview] = []
        try:
            while True:
                if end - at < 8:
                    raise Short
                word = _U64(data, at)[0]
                flags = word & FLAGS
                if flags == NEXT_DATA:
                    if end - at < RECORD:
                        raise Short
                    run = _neighbours(data, at, word, min((end - at) // RECORD, LOOK))
                elif flags == NEXT_ZERO:
                    if end - at < 9:
                        raise Short
                    if data[at + 8]:
                        raise BadMessage(f"a page that is filled with {data[at + 8]}")
                    run = 1
                else:
                    break
                offset = word - flags
                if offset != past or flags != kind or past - start + run * PAGE > MAX_RUN * PAGE:
                    self._flush(kind, start, past, pages)
                    start, kind, pages = offset, flags, []
                past = offset + run * PAGE
                if flags == NEXT_DATA:
                    after = at + run * RECORD
                    pages += [data[place : place + PAGE] for place in range(at + 8, after, RECORD)]  # type: ignore[misc]
                    at = after
                else:
                    at += 9
        finally:
            self._flush(kind, start, past, pages)
            self._taken = cursor.at = at
        self._other_record(cursor)

    def _flush(self, kind: int, start: int, past: int, pages: list[memoryview]) -> None:
        if not kind:
            return
        if self._block < 0:
            raise BadMessage("a page without the name of its block")
        block = self.blocks[self._block]
        if past > block.size:
            raise BadMessage(f"a page at {past - PAGE} of RAM block {block.name}, which has {block.size} bytes")
        if kind == NEXT_DATA:
            self._sink.place(self._block, start, pages)
        else:
            self._sink.zero(self._block, start, past - start)

    def _other_record(self, cursor: Cursor) -> None:
        """A page that names its block, or the end of the section."""
        word = cursor.number(8)
        flags = word & FLAGS
        if flags == EOS:
            self._step = self._ram if self._preempt else self._footer
        elif flags in (DATA, ZERO):
            name = cursor.name()
            if name not in self._by_name:
                raise BadMessage(f"a page of the unknown RAM block {name}")
            content = cursor.take(PAGE if flags == DATA else 1)
            if flags == ZERO and content[0]:
                raise BadMessage(f"a page that is filled with {content[0]}")
            self._block = self._by_name[name]
            self._flush(flags | CONTINUE, word - flags, word - flags + PAGE, [memoryview(content)])
        else:
            names = [name for flag, name in REFUSED_FLAGS.items() if flags & flag]
            what = f"the capability {names[0]}: switch it off" if names else f"flags {flags:#x}"
            raise BadMessage(f"a RAM record with {what}")

    def _footer(self, cursor: Cursor) -> None:
        if cursor.number(1) != FOOTER or cursor.number(4) != self.section:
            raise BadMessage("the RAM section has no footer")
        if self._ending:
            self._events.append(EndOfRam())
        self._step = self._record

    def _command(self, cursor: Cursor) -> None:
        command, length = cursor.number(2), cursor.number(2)
        if command == 7:
            if length != 4:
                raise BadMessage(f"a package with a command of {length} bytes")
            self._left, self._tail, self._step = cursor.number(4), b"", self._package
            return
        inner = Cursor(cursor.take(length))
        try:
            if command == 6:
                self._discard(inner)
            elif (event := _event_of(command, length, inner)) is not None:
                if isinstance(event, Advise):
                    self._advised_pages = event.page_sizes
                self._events.append(event)
        except Short:
            raise BadMessage(f"command {command} of {length} bytes is too short") from None

    def _discard(self, inner: Cursor) -> None:
        if version := inner.number(1):
            raise BadMessage(f"a discard of version {version}")
        name = inner.name()
        inner.number(1)
        place = self._by_name.get(name)
        if place is None:
            raise BadMessage(f"a discard in the unknown RAM block {name}")
        while inner.at < len(inner.data):
            start, length = _RANGE.unpack(inner.take(_RANGE.size))
            if start % PAGE or length % PAGE or start + length > self.blocks[place].size:
                raise BadMessage(f"a discard of {length} bytes at {start} in RAM block {name}")
            self._sink.discard(place, start, length)

    def _package(self, cursor: Cursor) -> None:
        """Skip the package, but for its tail: pings, and the command to run."""
        length = min(self._left, len(cursor.data) - cursor.at)
        if not length:
            raise Short
        self._tail = (self._tail + cursor.take(length))[-_TAIL:]
        self._left -= length
        self._taken = cursor.at
        if self._left:
            raise Short
        self._events.append(Package(_pings_of(self._tail)))
        self._step = self._record

    def _skip_all(self, cursor: Cursor) -> None:
        self._taken = cursor.at = len(cursor.data)
        raise Short


def _neighbours(data: Buffer, at: int, word: int, most: int) -> int:
    """How many records from ``at`` on, where ``word`` stands, are data of neighbouring pages. At most ``most``."""
    words = [found for (found,) in _WORDS(data[at : at + most * RECORD])]
    if words == list(range(word, word + most * PAGE, PAGE)):
        return most
    return next(count for count, found in enumerate(words) if found != word + count * PAGE)


def _event_of(command: int, length: int, inner: Cursor) -> Event | None:
    match command:
        case 1:
            return OpenReturnPath()
        case 2:
            return Ping(inner.number(4))
        case 3 if length:
            advise = Advise(inner.number(8), inner.number(8))
            if advise.target != PAGE:
                raise BadMessage(f"the VM has pages of {advise.target} bytes; only 4096 are understood")
            return advise
        case 9:
            return Resume()
        case 10:
            return AskBitmap(inner.name())
        case 8:
            raise BadMessage("the capability x-colo: switch it off")
    return None  # every command says its length, so what is not understood can be left out


def _pings_of(tail: bytes) -> tuple[int, ...]:
    if not tail.endswith(_RUN):
        raise BadMessage("the package of devices does not end with the command to run")
    pings: list[int] = []
    rest = tail[: -len(_RUN)]
    while rest[-_PING_BYTES:-4] == _PING:
        pings.insert(0, int.from_bytes(rest[-4:], "big"))
        rest = rest[:-_PING_BYTES]
    return tuple(pings)
