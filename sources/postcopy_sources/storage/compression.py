"""A chunk as it lies in a store: exactly one zstd frame, with the content's size in its head.

casync refuses more than one frame, desync everything that is not zstd. What a store gives is not trusted: output and
window are bounded before anything is unpacked, and the digest of the result must be the chunk's id."""

from __future__ import annotations

from typing import Any

from postcopy_protocol.caibx import Bytes, digest_of
from postcopy_protocol.errors import PostcopyError

try:
    from compression import zstd  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # before Python 3.14
    try:
        from backports import zstd  # type: ignore[no-redef, unused-ignore]
    except ImportError:
        zstd = None

DEFAULT_LEVEL = 3
LEVELS = (1, 19)
_LEAST_WINDOW = 23  # 8 MiB: what the levels up to 19 use for streams whose size is not known
_MOST_GROWTH = 1 << 10


class WrongChunk(PostcopyError):
    """What a store gave for a chunk is not that chunk. The text says what is wrong with it."""


def check_installed() -> None:
    """Raises PostcopyError when zstd is missing."""
    if zstd is None:
        raise PostcopyError("snapshots need zstd, which is not installed: pip install 'postcopy[store]'")


def largest_frame(length: int) -> int:
    """Bytes that the frame of a chunk of ``length`` bytes may have."""
    return length + (length >> 7) + _MOST_GROWTH


def packed(chunk: bytes, level: int = DEFAULT_LEVEL) -> bytes:
    """The frame of a chunk."""
    frame: bytes = zstd.compress(chunk, level)
    return frame


def unpacked(frame: bytes, chunk: bytes, length: int, digest: str) -> bytes:
    """The chunk of this id and length. Raises WrongChunk."""
    if not frame:
        raise WrongChunk("it is empty")
    window = max(_LEAST_WINDOW, (length - 1).bit_length())
    engine: Any = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
    try:
        data: bytes = engine.decompress(frame, length + 1)
    except zstd.ZstdError:
        raise WrongChunk("it is no zstd frame, or damaged") from None
    if len(data) > length:
        raise WrongChunk(f"it unpacks to more than its {length} bytes")
    if not engine.eof or len(data) < length:
        raise WrongChunk(f"it is cut short: {len(data)} bytes of {length}")
    if engine.unused_data:
        raise WrongChunk("something follows its frame")
    check(data, chunk, digest)
    return data


def check(data: Bytes, chunk: bytes, digest: str) -> None:
    """Raises WrongChunk unless ``data`` has this id."""
    if digest_of(data, digest) != chunk:
        raise WrongChunk("its digest is another one")
