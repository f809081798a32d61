"""The return path: messages between a supervisor and a page source, and the checks of their figures. Sans-I/O.

The source binds a ZeroMQ ROUTER, supervisors connect to it. Frame 0 is one message of this module, the raw frames
behind it are the bytes of pages. Nothing is delivered twice, and delivery is not certain: a supervisor without an
answer asks again. ``stream`` numbers one supervisor's use of one block between two advises. A source never reuses a
number, so a late answer from before a recovery names an unknown stream.

Neither side trusts the other: ``SourceConversation`` (source_conversation.py) checks the messages of a supervisor,
``check_pages``, ``check_staging`` and ``check_staged`` those of a source.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .errors import BadInput, BadMessage
from .geometry import page_count
from .messages import Message

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

MAX_WORD = 60
"""Characters of a word of Progress."""

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


FEATURES = ("zero", "push", "staging", "held", "progress")
"""What a supervisor may support: ranges of zeros without bytes, pages that it has not requested, pages in memory that
both sides map (on one machine only, so not over tcp), to be informed that a request waits, and of the Progress."""
RESIDENT = "resident"
"""Feature of a stream that only asks for what the source has at once: pages that it would have to wait for come back as
lost. Hosts that help each other use it, so that none fetches for another, and two never wait for one another."""

STAGING_NAME = "postcopy.staging"
"""Name of the memfd of a staging memory. Those of blocks begin with ``postcopy-``."""
STAGING_HEADER = 4096
"""Bytes before the first slot: the nonce, then one byte for each slot."""
NONCE = 16
"""Length of the nonce, and where the bytes of the slots begin."""
SLOT_FREE, SLOT_FULL = 0, 1
"""A slot's byte. Only the source fills a slot, and only a free one; only the supervisor frees it."""


def features_at(endpoint: str) -> tuple[str, ...]:
    """The features that an endpoint can have: memory is shared on one machine only."""
    return FEATURES if endpoint.startswith("ipc://") else tuple(word for word in FEATURES if word != "staging")


# supervisor -> source
class Advise(Message, tag=110):
    """Ask for the block ``name`` in pages of ``page_size``; ``features`` are those that the supervisor supports."""

    name: str
    page_size: int
    features: tuple[str, ...]


class Listen(Message, tag=111):
    """Open the stream. At most ``window`` bytes may be pushed before the next Listen."""

    stream: int
    window: int


class RequestRanges(Message, tag=112):
    """Request pages (packed u64 pairs of offset and length). ``urgent``: a client waits for them. ``request`` is the
    supervisor's own number, not 0. Taken by ``Loop.on_message`` of the source."""

    request: int
    stream: int
    urgent: bool
    ranges: bytes


class Complete(Message, tag=113):
    """Everything is received: forget the stream."""

    stream: int


class Ping(Message, tag=114):
    """Ask for a Pong."""

    nonce: int


class UseStaging(Message, tag=115):
    """The supervisor has opened the staging memory ``number``: background pages may come in it."""

    number: int


# source -> supervisor
class Advised(Message, tag=120):
    """Answer to Advise. ``size`` is exact; ``identity`` is equal if and only if the contents are; ``features`` are
    those of the Advise that the source has too."""

    name: str
    stream: int
    size: int
    identity: str
    features: tuple[str, ...]


class Pages(Message, tag=121):
    """Pages of ``ranges`` (packed u64 pairs), in answer to ``request`` (0: pushed). ``kinds`` has one byte for each
    range, a RangeKind. Each range of data has a raw frame of exactly its length, in order. Taken by
    ``MainLoop.on_source_message``."""

    stream: int
    request: int
    ranges: bytes
    kinds: bytes
    reason: str


class SourceRefused(Message, tag=122):
    """A message is refused. ``code`` is one of ``SOURCE_REFUSALS``; ``name`` is the block, if it is known."""

    code: str
    name: str
    reason: str


class Pong(Message, tag=123):
    """Answer to Ping."""

    nonce: int


class Staging(Message, tag=124):
    """Offer a memfd to this supervisor alone: ``descriptor`` of process ``pid``. It has a header that begins with
    ``nonce``, then ``slots`` slots of ``slot_bytes``. It replaces the one before."""

    number: int
    pid: int
    descriptor: int
    nonce: bytes
    slots: int
    slot_bytes: int


class Staged(Message, tag=125):
    """Pages from ``offset`` in answer to ``request``: their ``length`` bytes lie in ``slot`` of the staging memory
    ``number``, until the supervisor frees the slot."""

    stream: int
    request: int
    offset: int
    length: int
    number: int
    slot: int


class Held(Message, tag=126):
    """``request`` waits here for pages that are still to come to the source: it is not to be given up. Sent again every
    few seconds."""

    stream: int
    request: int


class Progress(Message, tag=127):
    """How far a source is that pages are still coming to: ``received`` of ``size`` bytes are there, ``rate`` come a
    second. ``phase`` and ``origin`` are words for people: what it does, and the state of what it reads, such as a
    virtual machine (empty: not known)."""

    phase: str
    origin: str
    received: int
    size: int
    rate: int


FROM_SUPERVISOR: tuple[type[Message], ...] = (Advise, Listen, RequestRanges, Complete, Ping, UseStaging)
FROM_SOURCE: tuple[type[Message], ...] = (Advised, Pages, SourceRefused, Pong, Staging, Staged, Held, Progress)

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


Range = tuple[int, int]
"""Offset and length, bytes."""

_PAIR = struct.Struct("<QQ")
pack_range: Callable[[int, int], bytes] = _PAIR.pack
"""One range; raises struct.error for what is no u64."""

unpack_range: Callable[[bytes, int], Range] = _PAIR.unpack_from
"""One range at a position; raises struct.error if there are too few bytes."""


def pack_ranges(ranges: Iterable[Range]) -> bytes:
    """Ranges as little-endian u64 pairs. Raises BadInput on a number that is no u64."""
    try:
        return b"".join([_PAIR.pack(offset, length) for offset, length in ranges])
    except struct.error as error:
        raise BadInput(f"a range is no pair of unsigned integers of 64 bits: {error}") from error


def unpack_ranges(data: bytes | memoryview) -> list[Range]:
    """The ranges of a packed batch. Raises BadMessage for a partial range, none, or too many."""
    count, rest = divmod(len(data), _PAIR.size)
    if rest or not 0 < count <= MAX_RANGES:
        raise BadMessage(f"{len(data)} bytes are no list of 1 to {MAX_RANGES} ranges")
    if count == 1:
        return [_PAIR.unpack(data)]
    return list(_PAIR.iter_unpack(data))


def check_ranges(ranges: Sequence[Range], page_size: int, size: int) -> int:
    """The bytes of all ranges together. Raises BadMessage unless they are whole pages of a block of ``size`` bytes,
    none twice, at most MAX_RANGE_BYTES."""
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
    """``(offset, length, kind, frame)`` of every range of Pages; ``frame`` is the index of its raw frame (-1: none).

    ``frame_lengths`` are the lengths of the raw frames in order. Raises BadMessage for ranges that are not whole pages
    of the block, overlap or are too many, for unknown kinds, and for too many, too few or wrong frames.
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
    """Bytes of the whole memfd. Raises BadMessage for impossible or too large figures."""
    slots, slot_bytes = message.slots, message.slot_bytes
    if len(message.nonce) != NONCE:
        raise BadMessage(f"the nonce of a staging memory has {len(message.nonce)} bytes, not {NONCE}")
    if not 0 < slots <= MAX_SLOTS or not slot_bytes or slot_bytes % STAGING_HEADER:
        raise BadMessage(f"{slots} slots of {slot_bytes} bytes are no staging memory")
    if slots * slot_bytes > MAX_STAGING_BYTES:
        raise BadMessage(f"a staging memory of {slots * slot_bytes} bytes, {MAX_STAGING_BYTES} may be")
    return STAGING_HEADER + slots * slot_bytes


def check_progress(message: Progress) -> None:
    """Raises BadMessage for words that are none, or more bytes than there are."""
    for word in (message.phase, message.origin):
        if len(word) > MAX_WORD or not word.isprintable():
            raise BadMessage("the progress of a source in words that are none")
    if message.received > message.size:
        raise BadMessage(f"{message.received} bytes of {message.size} have come to a source")


def check_staged(message: Staged, slot_bytes: int, page_size: int, size: int) -> None:
    """Raises BadMessage unless these are whole pages of a block of ``size`` bytes that one slot can hold."""
    check_ranges(((message.offset, message.length),), page_size, size)
    if message.length > slot_bytes:
        raise BadMessage(f"{message.length} bytes in a slot of {slot_bytes}")
