"""The return path with one other host, seen from the program that asks: one block, ranges in, bytes out. Sans-I/O.

::

    connected   --Advise-->   advised   --Listen-->   up   --RequestRanges-->   Pages, until all pages of a range came
    any         what cannot be used                   refused, until it is advised again

The host is not trusted. It can answer with other bytes, which the caller finds by their digest, and with nothing.
Its stream is RESIDENT: it answers at once, also that it does not have a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from postcopy_protocol.errors import BadMessage
from postcopy_protocol.geometry import PAGE_4K, page_count
from postcopy_protocol.message import Message
from postcopy_protocol.return_path import (
    MAX_RANGE_BYTES,
    RESIDENT,
    Advise,
    Advised,
    Listen,
    Pages,
    RangeKind,
    RequestRanges,
    SourceRefused,
    check_pages,
    pack_ranges,
)

PIECE = 64 << 10
"""Bytes of one range: what any source reads at once, in the thread of its loop."""
LARGEST = MAX_RANGE_BYTES
_PHASE_CODES = ("out-of-phase", "bad-message")


@dataclass(slots=True)
class _Open:
    offset: int
    data: bytearray
    missing: set[int]  # pages, from the first of the block on


class PeerConversation:
    """``block`` is its name there, ``size`` the bytes that it must have. ``refused``: why it cannot be used."""

    def __init__(self, block: str, size: int) -> None:
        self.refused = ""
        self._block, self._size = block, size
        self._stream = 0
        self._numbers = count(1)
        self._open: dict[int, _Open] = {}

    @property
    def up(self) -> bool:
        """May ranges be requested?"""
        return self._stream > 0

    def connected(self) -> Message:
        """A connection is there, or the host has forgotten us. Returns what to send."""
        self._stream = 0
        return Advise(self._block, PAGE_4K, ("zero", RESIDENT))

    def refuse(self, why: str) -> None:
        """Request nothing more until the host is advised again."""
        self.refused, self._stream = why, 0

    def lost(self) -> list[int]:
        """Returns and forgets the requests that nothing answers, because it is no longer up."""
        lost = [] if self.up else list(self._open)
        for number in lost:
            self.forget(number)
        return lost

    def request(self, offset: int, length: int) -> tuple[int, Message]:
        """Returns the number of the request, and what to send. Whole pages; the last one may end behind the block."""
        number = next(self._numbers)
        end = page_count(offset + length, PAGE_4K) * PAGE_4K
        ranges = [(start, min(PIECE, end - start)) for start in range(offset, end, PIECE)]
        pages = set(range(offset // PAGE_4K, end // PAGE_4K))
        self._open[number] = _Open(offset, bytearray(end - offset), pages)
        return number, RequestRanges(number, self._stream, True, pack_ranges(ranges))

    def forget(self, number: int) -> None:
        """The answer is no longer wanted."""
        self._open.pop(number, None)

    def heard(self, message: Message, frames: Sequence[memoryview]) -> tuple[Message | None, int, bytearray | None]:
        """Returns what to send; the request that is answered, or 0; and its bytes, or None where a page of it is not
        there. Raises BadMessage for what breaks the protocol."""
        match message:
            case Advised():
                return self._advised(message), 0, None
            case SourceRefused(code) if code in _PHASE_CODES:
                return (self.connected(), 0, None) if self.up else (None, 0, None)
            case SourceRefused():
                self.refuse(f"it refuses ({message.code}): {message.reason}")
            case Pages() if message.stream == self._stream:
                return None, *self._pages(message, frames)
        return None, 0, None

    def _advised(self, message: Advised) -> Message | None:
        if message.size != self._size:
            self.refuse(f"its block {self._block} has {message.size} bytes, the snapshot has {self._size}")
        elif RESIDENT not in message.features:
            self.refuse("it is of an earlier version")
        elif message.stream > 0:
            self._stream, self.refused = message.stream, ""
            return Listen(message.stream, 0)
        return None

    def _pages(self, message: Pages, frames: Sequence[memoryview]) -> tuple[int, bytearray | None]:
        ranges = check_pages(message, [len(frame) for frame in frames], PAGE_4K, self._size)
        request = self._open.get(message.request)
        if request is None:
            return 0, None
        for offset, length, kind, number in ranges:
            pages = range(offset // PAGE_4K, (offset + length) // PAGE_4K)
            if not request.missing.issuperset(pages):
                raise BadMessage(f"{length} bytes at {offset} were not requested")
            if kind == RangeKind.LOST:
                del self._open[message.request]
                return message.request, None
            request.missing.difference_update(pages)
            if kind == RangeKind.DATA:
                start = offset - request.offset
                request.data[start : start + length] = frames[number]
        if request.missing:
            return 0, None
        del self._open[message.request]
        return message.request, request.data
