"""The return path: what a supervisor and a page source say to each other, and the law of it. Sans-I/O.

The source binds a ZeroMQ ROUTER, supervisors connect to it. Frame 0 is one message of this module, the raw frames
behind it are the bytes of pages. Nothing is delivered twice and nothing is certain to be delivered at all: who wants an
answer asks anew. ``stream`` numbers one supervisor's use of one block between two advises, and is never given out twice
by a source, so an answer that comes late, from before a recover, names a stream that nobody knows any more.

Neither side believes the other: ``SourceConversation`` (source_conversation.py) judges what a supervisor says,
``check_pages`` what a source says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .errors import BadInput, BadMessage
from .geometry import page_count
from .messages import Message, wire

MAX_RANGES = 256
"""Ranges of one RequestRanges or Pages."""
MAX_RANGE_BYTES = 4 << 20
"""Bytes of all ranges of one message together; a page of 2 MiB fits twice."""
MAX_OPEN_REQUESTS = 1024
"""Requests of one supervisor that may wait in a source."""
MAX_OPEN_BYTES = 64 << 20
"""Bytes of all requests of one supervisor that may wait in a source."""
MAX_STREAMS = 1024
"""Streams that one supervisor may have open at a source."""

MAX_SLOTS = 64
"""Slots of one staging memory."""
MAX_STAGING_BYTES = 64 << 20
"""Bytes of all its slots together."""


class RangeKind:
    """What Pages say of a range. Plain integers: one look-up of an IntEnum's member costs five times as much."""

    DATA: Final = 0
    """A raw frame has its bytes."""
    ZERO: Final = 1
    """It is zeros; no frame."""
    LOST: Final = 2
    """The source cannot supply it; no frame."""


FEATURES = ("zero", "push", "staging")
"""What a supervisor may say that it takes: ranges of zeros without bytes, pages that it has not asked for, pages that
lie in memory which both can see (on one machine only: neither side says it over tcp)."""

STAGING_NAME = "postcopy.staging"
"""The memfd of a staging memory. No block's is called so: they begin with ``postcopy-``."""
STAGING_HEADER = 4096
"""Bytes before the first slot: the nonce, then one byte a slot."""
NONCE = 16
"""Bytes of the nonce, and where the bytes of the slots begin."""
SLOT_FREE, SLOT_FULL = 0, 1
"""A slot's byte. Only the source fills a slot, and only a free one; only the supervisor frees it."""


def features_at(endpoint: str) -> tuple[str, ...]:
    """Those that make sense at an endpoint: memory is shared on one machine only."""
    return FEATURES if endpoint.startswith("ipc://") else tuple(word for word in FEATURES if word != "staging")


# --- supervisor -> source ---------------------------------------------------------------------------------------------


@wire
class Advise(Message):
    """I want the block ``name`` in pages of ``page_size``; ``features`` is what I can take (unknown ones are
    ignored)."""

    TAG = 110
    name: str
    page_size: int
    features: tuple[str, ...]


@wire
class Listen(Message):
    """Ready for pages of this stream; at most ``window`` bytes that I have not asked for, until I say Listen again."""

    TAG = 111
    stream: int
    window: int


@wire
class RequestRanges(Message):
    """Send these pages (packed u64 pairs of offset and length). ``urgent``: somebody sleeps until they come.
    ``request`` is the supervisor's own number for it, not 0."""

    TAG = 112
    request: int
    stream: int
    urgent: bool
    ranges: bytes


@wire
class Complete(Message):
    """Everything is received, nothing more will be asked of this stream."""

    TAG = 113
    stream: int


@wire
class Ping(Message):
    """Are you there?"""

    TAG = 114
    nonce: int


@wire
class UseStaging(Message):
    """The staging memory ``number`` is open here: background pages may come in it from now on."""

    TAG = 115
    number: int


# --- source -> supervisor ---------------------------------------------------------------------------------------------


@wire
class Advised(Message):
    """Answer to Advise. ``size`` is exact; ``identity`` is equal if and only if the content is; ``features`` are those
    of the Advise that this source has too."""

    TAG = 120
    name: str
    stream: int
    size: int
    identity: str
    features: tuple[str, ...]


@wire
class Pages(Message):
    """Pages of ``ranges`` (packed u64 pairs), in answer to ``request`` (0: pushed unasked). ``kinds`` is one byte a
    range: 0 data (a raw frame of exactly its length, in order), 1 zero (no frame), 2 lost (no frame; ``reason``)."""

    TAG = 121
    stream: int
    request: int
    ranges: bytes
    kinds: bytes
    reason: str


@wire
class SourceRefused(Message):
    """What was said is refused. ``code`` is one of ``SOURCE_REFUSALS``; ``name`` is the block, where it is known."""

    TAG = 122
    code: str
    name: str
    reason: str


@wire
class Pong(Message):
    """Answer to Ping."""

    TAG = 123
    nonce: int


@wire
class Staging(Message):
    """A memfd for you alone, descriptor ``descriptor`` of process ``pid``: a header that begins with ``nonce``, then
    ``slots`` slots of ``slot_bytes``. It takes the place of the one before."""

    TAG = 124
    number: int
    pid: int
    descriptor: int
    nonce: bytes
    slots: int
    slot_bytes: int


@wire
class Staged(Message):
    """Pages from ``offset`` in answer to ``request``: their ``length`` bytes lie in ``slot`` of the staging memory
    ``number``, which is yours until you have set it free."""

    TAG = 125
    stream: int
    request: int
    offset: int
    length: int
    number: int
    slot: int


FROM_SUPERVISOR = (Advise, Listen, RequestRanges, Complete, Ping, UseStaging)
FROM_SOURCE = (Advised, Pages, SourceRefused, Pong, Staging, Staged)

SOURCE_REFUSALS = (
    "no-such-block",
    "bad-page-size",
    "bad-version",
    "bad-message",
    "out-of-phase",
    "bad-range",
    "denied",
    "limit",
    "failed",
)


# --- ranges -----------------------------------------------------------------------------------------------------------

Range = tuple[int, int]
"""Offset and length, bytes."""

_PAIR = struct.Struct("<QQ")
pack_range: Callable[[int, int], bytes] = _PAIR.pack
"""One range; raises struct.error for what is no u64."""


unpack_range: Callable[[bytes, int], Range] = _PAIR.unpack_from
"""One range at a place; raises struct.error where there are not bytes enough."""


def pack_ranges(ranges: Iterable[Range]) -> bytes:
    """Ranges as little-endian u64 pairs. Raises BadInput on a number that is no u64."""
    try:
        return b"".join([_PAIR.pack(offset, length) for offset, length in ranges])
    except struct.error as error:
        raise BadInput(f"a range is no pair of unsigned integers of 64 bits: {error}") from error


def unpack_ranges(data: bytes | memoryview) -> list[Range]:
    """Ranges of a packed batch. Raises BadMessage when it is no whole number of them, none, or too many."""
    count, rest = divmod(len(data), _PAIR.size)
    if rest or not 0 < count <= MAX_RANGES:
        raise BadMessage(f"{len(data)} bytes are no list of 1 to {MAX_RANGES} ranges")
    if count == 1:
        return [_PAIR.unpack(data)]
    return list(_PAIR.iter_unpack(data))


def check_ranges(ranges: Sequence[Range], page_size: int, size: int) -> int:
    """Bytes of all ranges. Raises BadMessage unless they are whole pages of a block of ``size`` bytes, in it, none
    twice, and not too many."""
    end = page_count(size, page_size) * page_size
    total = 0
    for offset, length in ranges:
        if (offset | length) & (page_size - 1):
            raise BadMessage(f"the range of {length} bytes at {offset} is not aligned to pages of {page_size}")
        if not length or offset + length > end:
            raise BadMessage(f"the range of {length} bytes at {offset} is no part of a block of {size} bytes")
        total += length
    if total > MAX_RANGE_BYTES:
        raise BadMessage(f"ranges of {total} bytes together, {MAX_RANGE_BYTES} may be in one message")
    if len(ranges) > 1:
        _refuse_overlap(sorted(ranges))
    return total


def _refuse_overlap(ascending: Sequence[Range]) -> None:
    reached = 0
    for offset, length in ascending:
        if offset < reached:
            raise BadMessage(f"the range of {length} bytes at {offset} overlaps another")
        reached = offset + length


def check_pages(
    message: Pages, frame_lengths: Sequence[int], page_size: int, size: int
) -> list[tuple[int, int, int, int]]:
    """``(offset, length, kind, frame)`` of every range of Pages, ``frame`` counting the raw frames (-1: has none).

    ``frame_lengths`` are the lengths of the raw frames in order. Raises BadMessage on ranges that are not whole pages
    of the block, overlap or are too many, on unknown kinds, and on frames too many, too few or of a wrong length.
    """
    ranges = unpack_ranges(message.ranges)
    check_ranges(ranges, page_size, size)
    kinds = message.kinds
    if len(kinds) != len(ranges):
        raise BadMessage(f"{len(kinds)} kinds for {len(ranges)} ranges")
    checked, frame = [], 0
    for (offset, length), kind in zip(ranges, kinds, strict=True):
        if kind > RangeKind.LOST:
            raise BadMessage(f"{kind} is no kind of a range")
        if kind != RangeKind.DATA:
            checked.append((offset, length, kind, -1))
            continue
        if frame >= len(frame_lengths) or frame_lengths[frame] != length:
            came = f"{frame_lengths[frame]} bytes" if frame < len(frame_lengths) else "nothing"
            raise BadMessage(f"{came} came for the range of {length} bytes at {offset}")
        checked.append((offset, length, RangeKind.DATA, frame))
        frame += 1
    if frame != len(frame_lengths):
        raise BadMessage(f"{len(frame_lengths)} frames for {frame} ranges with data")
    return checked


def check_staging(message: Staging) -> int:
    """Bytes of the whole memfd. Raises BadMessage for what is no staging memory, or too large a one."""
    slots, slot_bytes = message.slots, message.slot_bytes
    if len(message.nonce) != NONCE:
        raise BadMessage(f"the nonce of a staging memory has {len(message.nonce)} bytes, not {NONCE}")
    if not 0 < slots <= MAX_SLOTS or not slot_bytes or slot_bytes % STAGING_HEADER:
        raise BadMessage(f"{slots} slots of {slot_bytes} bytes are no staging memory")
    if slots * slot_bytes > MAX_STAGING_BYTES:
        raise BadMessage(f"a staging memory of {slots * slot_bytes} bytes, {MAX_STAGING_BYTES} may be")
    return STAGING_HEADER + slots * slot_bytes


def check_staged(message: Staged, slot_bytes: int, page_size: int, size: int) -> None:
    """Raises BadMessage unless these are whole pages of a block of ``size`` bytes that one slot can hold."""
    check_ranges(((message.offset, message.length),), page_size, size)
    if message.length > slot_bytes:
        raise BadMessage(f"{message.length} bytes in a slot of {slot_bytes}")
