"""Traces: which client touched which missing page when, and how long it waited. Pure: bytes in, records out.

**File.** All integers are little-endian. ``PCTRACE1``, then u32 length of a JSON object in UTF-8, the object, and
records of 24 bytes to the end; a part of a record at the end (the writer was killed) is left out::

    u64  bits 0-55 nanoseconds since ``started``, bits 56-63 kind | 0x40 the page had been announced | 0x80 a write
    u64  bits 0-47 page, bits 48-63 block
    u32  client    u32  nanoseconds from the fault's message to its release, at most 2**32 - 1

The object has ``started`` (seconds since the epoch), ``monotonic`` (nanoseconds of CLOCK_MONOTONIC then) and
``blocks``: ``[number, name, bytes, page size]`` each. Records of one client are in order. Those of several
clients are not quite: sort them if you need the order.

**Ring.** In a client's file, behind the statistics page and the stages: one page whose first u64 are RING_WRITTEN,
RING_TAKEN and RING_LOST, then the records. The client's worker writes, the supervisor reads. If the ring is full, a
record is counted as lost, and the worker does not wait.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import stages
from .counters import PAGE_BYTES
from .display import printable
from .errors import BadInput

MAGIC = b"PCTRACE1"
RECORD = struct.Struct("<QQII")
PLACED, PRESENT, LOST, ARRIVED = range(4)
"""Kinds of records: the worker placed the page; it was present; it cannot be had; it came over a return path."""
KINDS = ("placed", "present", "lost", "arrived")
ANNOUNCED, WRITE = 0x40, 0x80
MOST_HEAD = 1 << 20
LONGEST = (1 << 32) - 1

RING_WRITTEN, RING_TAKEN, RING_LOST = range(3)
RING_RECORDS = 16384
RING_HEAD = stages.END
RING_AT = RING_HEAD + PAGE_BYTES
FIGURES_BYTES = RING_AT + RING_RECORDS * RECORD.size
"""Size of a client's file if faults are recorded (a multiple of the page)."""
assert FIGURES_BYTES % PAGE_BYTES == 0

_AT_BITS, _PAGE_BITS = 56, 48


@dataclass(frozen=True, slots=True)
class Traced:
    """A block of a trace; sizes in bytes."""

    number: int
    name: str
    size: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of a file. ``started`` in seconds since the epoch, ``monotonic`` in ns."""

    started: float
    monotonic: int
    blocks: tuple[Traced, ...]

    def encode(self) -> bytes:
        """Its bytes, with the magic."""
        blocks = [[block.number, block.name, block.size, block.page_size] for block in self.blocks]
        document = {"started": self.started, "monotonic": self.monotonic, "blocks": blocks}
        text = json.dumps(document).encode()
        return MAGIC + struct.pack("<I", len(text)) + text


@dataclass(frozen=True, slots=True)
class Fault:
    """One record: ``at`` and ``latency`` in nanoseconds, ``at`` since the start."""

    at: int
    client: int
    block: int
    page: int
    kind: int
    latency: int
    write: bool
    announced: bool


def pack(at: int, client: int, block: int, page: int, kind: int, latency: int) -> bytes:
    """The bytes of a record; ``kind`` includes the flags."""
    first = at & (1 << _AT_BITS) - 1 | kind << _AT_BITS
    return RECORD.pack(first, page | block << _PAGE_BITS, client, min(latency, LONGEST))


def read_header(data: bytes | memoryview) -> tuple[Header, int]:
    """The header of a file that begins with ``data``, and where its records begin. Raises BadInput."""
    front = bytes(data[: len(MAGIC) + 4])
    if len(front) < len(MAGIC) + 4 or not front.startswith(MAGIC):
        raise BadInput("this is no trace (it does not begin with PCTRACE1)")
    (length,) = struct.unpack_from("<I", front, len(MAGIC))
    start = len(front) + length
    if length > MOST_HEAD or start > len(data):
        raise BadInput("this trace is cut off inside its header")
    try:
        document: dict[str, Any] = json.loads(bytes(data[len(front) : start]))
        blocks = tuple(
            Traced(int(number), printable(str(name)), max(0, int(size)), max(1, int(page)))
            for number, name, size, page in document["blocks"]
        )
        return Header(float(document["started"]), int(document["monotonic"]), blocks), start
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"the header of this trace is damaged ({type(error).__name__})") from error


def faults(data: bytes | memoryview, start: int) -> Iterator[Fault]:
    """The records from ``start`` on, in the order of the file."""
    whole = memoryview(data)[start:]
    whole = whole[: len(whole) // RECORD.size * RECORD.size]
    low, pages = (1 << _AT_BITS) - 1, (1 << _PAGE_BITS) - 1
    for first, second, client, latency in RECORD.iter_unpack(whole):
        kind = first >> _AT_BITS
        write, announced = bool(kind & WRITE), bool(kind & ANNOUNCED)
        yield Fault(first & low, client, second >> _PAGE_BITS, second & pages, kind & 0x3F, latency, write, announced)
