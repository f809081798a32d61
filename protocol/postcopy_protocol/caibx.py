"""casync's blob index (``.caibx``) and the names of its chunks: an image as a list of chunks, each named by its hash.

``casync`` and ``desync`` read and write the same files. All numbers are little endian:

    head    u64 x 6    48, type INDEX, feature flags, smallest, average and largest chunk in bytes
    table   u64 x 2    2^64-1 (size unknown while it is streamed), type TABLE
    item    u64, 32 B  end of the chunk in the image, and its id: the digest of its bytes
    tail    u64 x 5    0, 0, 48, size of the table, tail marker

A chunk lies in the store under ``xxxx/ID.cacnk``: one zstd frame. Compression is not here, because this is pure.

The reader is as strict as casync, but lets unknown feature flags below bit 33 through: they concern directories."""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import lt, sub

from .errors import BadInput

INDEX_ENDING = ".caibx"
CHUNK_ENDING = ".cacnk"
ID_BYTES = 32
SHA256, SHA512_256 = "sha256", "sha512-256"
DIGESTS = (SHA256, SHA512_256)
LARGEST_CHUNK = 128 << 20
"""Bytes of the largest chunk that casync accepts."""
LARGEST_INDEX = 128 << 20
"""Bytes of the largest index that is read: 0.8 TiB in chunks of 256 KiB."""

_HEAD = struct.Struct("<8Q")
_TAIL = struct.Struct("<5Q")
_ITEM_BYTES = 8 + ID_BYTES
_HEAD_SIZE, _TABLE_HEAD = 48, 16
_INDEX, _TABLE, _TAIL_MARKER = 0x96824D9C7B129FF9, 0xE75B9E112F17417D, 0x4B4F050E5549ECD1
_UNKNOWN_SIZE = (1 << 64) - 1
_SHA512_256_FLAG = 1 << 61
_FLAGS = 0xF << 60 | (1 << 33) - 1

Bytes = bytes | bytearray | memoryview


def digest_of(data: Bytes, digest: str) -> bytes:
    """The id of a chunk. Raises BadInput when this Python has no SHA-512/256."""
    if digest == SHA256:
        return hashlib.sha256(data).digest()
    try:
        return hashlib.new("sha512_256", data).digest()
    except ValueError:
        raise BadInput("this Python's OpenSSL has no SHA-512/256: use snapshots with --digest sha256") from None


def chunk_path(chunk: bytes) -> str:
    """Where a chunk lies in its store.

    >>> chunk_path(bytes(32))[:12]
    '0000/0000000'
    """
    name = chunk.hex()
    return f"{name[:4]}/{name}{CHUNK_ENDING}"


def chunk_of_path(path: str) -> bytes | None:
    """The id of the chunk that lies at ``path``; None: no chunk lies there."""
    folder, _, file = path.rpartition("/")
    name = file.removesuffix(CHUNK_ENDING)
    if len(name) != 2 * ID_BYTES or name == file or folder != name[:4] or name.strip("0123456789abcdef"):
        return None
    return bytes.fromhex(name)


@dataclass(frozen=True, slots=True)
class Index:
    """An image as chunks: ``ends`` (offset behind each chunk, rising) and ``ids``, 32 bytes each in the same order."""

    ends: Sequence[int]
    ids: bytes
    largest: int
    """Bytes that no chunk exceeds. Of an index of fixed chunks: their size."""
    digest: str = SHA256

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.ends[-1] if self.ends else 0

    def __len__(self) -> int:
        return len(self.ends)

    def id(self, number: int) -> bytes:
        return self.ids[number * ID_BYTES : (number + 1) * ID_BYTES]

    def span(self, number: int) -> tuple[int, int]:
        """Start and end of a chunk in the image."""
        return (self.ends[number - 1] if number else 0), self.ends[number]

    def at(self, offset: int) -> int:
        """The number of the chunk that holds the byte at ``offset``."""
        return bisect_right(self.ends, offset)

    def within(self, offset: int, length: int) -> range:
        """The numbers of the chunks that hold a range of at least one byte."""
        return range(self.at(offset), self.at(offset + length - 1) + 1)

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Id and length of every chunk, in order."""
        start = 0
        for number, end in enumerate(self.ends):
            yield self.id(number), end - start
            start = end

    def unique(self) -> dict[bytes, int]:
        """Length of every different chunk, by id."""
        return dict(self.items())


def index_of(chunks: Iterable[tuple[bytes, int]], largest: int, digest: str = SHA256) -> Index:
    """An index of chunks in order: id and length of each."""
    ends, ids, end = [], bytearray(), 0
    for chunk, length in chunks:
        end += length
        ends.append(end)
        ids += chunk
    return Index(ends, bytes(ids), largest, digest)


def format_index(index: Index) -> bytes:
    """The bytes of the file."""
    flags = _SHA512_256_FLAG if index.digest == SHA512_256 else 0
    sizes = (index.largest,) * 3
    parts = [_HEAD.pack(_HEAD_SIZE, _INDEX, flags, *sizes, _UNKNOWN_SIZE, _TABLE)]
    for number, end in enumerate(index.ends):
        parts += [end.to_bytes(8, "little"), index.id(number)]
    table = _TABLE_HEAD + _ITEM_BYTES * len(index) + _TAIL.size
    parts.append(_TAIL.pack(0, 0, _HEAD_SIZE, table, _TAIL_MARKER))
    return b"".join(parts)


def parse_index(data: bytes) -> Index:
    """Parse a file. Raises BadInput, in one line, for one that is damaged or no index of a blob."""
    if len(data) < _HEAD.size:
        raise BadInput(
            f"it has {len(data)} bytes, and an index has at least {_HEAD.size + _TAIL.size}: it is cut short"
        )
    head, kind, flags, smallest, average, largest, table, table_kind = _HEAD.unpack_from(data)
    if (head, kind, table, table_kind) != (_HEAD_SIZE, _INDEX, _UNKNOWN_SIZE, _TABLE):
        raise BadInput("it is no casync index: its head is another one")
    if flags & ~_FLAGS:
        raise BadInput(f"it has feature flags that are not known ({flags & ~_FLAGS:#x})")
    if not 1 <= smallest <= average <= largest <= LARGEST_CHUNK:
        raise BadInput(f"its chunk sizes {smallest}, {average}, {largest} are not possible")
    count, rest = divmod(len(data) - _HEAD.size - _TAIL.size, _ITEM_BYTES)
    whole = _TABLE_HEAD + _ITEM_BYTES * count + _TAIL.size
    if count < 0 or rest or _TAIL.unpack_from(data, len(data) - _TAIL.size) != (0, 0, _HEAD_SIZE, whole, _TAIL_MARKER):
        raise BadInput("its tail is not that of an index: it is cut short, or something was added")
    items = memoryview(data)[_HEAD.size : _HEAD.size + _ITEM_BYTES * count]
    words = array("Q", bytes(items))
    if sys.byteorder == "big":
        words.byteswap()
    ends = words[0::5]
    if ends and (not ends[0] or not all(map(lt, ends, ends[1:]))):
        raise BadInput("its chunks do not follow one another: it was changed")
    if ends and max(ends[0], *map(sub, ends[1:], ends), 0) > largest:
        raise BadInput(f"it has a chunk of more than {largest} bytes, the largest that its head allows")
    ids = b"".join([items[at + 8 : at + _ITEM_BYTES] for at in range(0, len(items), _ITEM_BYTES)])
    return Index(ends, ids, largest, SHA512_256 if flags & _SHA512_256_FLAG else SHA256)
