"""The bytes of vhost-user that post-copy and its rings need: numbers, structures, frames.

QEMU's ``docs/interop/vhost-user.rst`` is the specification. Native byte order, one Unix stream socket. A frame is a
header of three 32-bit integers (request, flags, size of the payload) and the payload. Descriptors travel with the first
byte of the header.

A back-end is not trusted: ``FrameReader`` limits what it sends, ``vhost_conversation`` checks it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from itertools import pairwise
from typing import Final

from .errors import PostcopyError

HEADER: Final = struct.Struct("=III")
U64: Final = struct.Struct("=Q")
VRING_STATE: Final = struct.Struct("=II")
VRING_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_COUNT: Final = struct.Struct("=II")
_REGION: Final = struct.Struct("=QQQQ")
_CONFIG: Final = struct.Struct("=III")

VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 4
NEED_REPLY: Final = 8

MOST_REGIONS: Final = 8
MOST_CONFIG: Final = 256
MOST_PAYLOAD: Final = 4096
"""Bytes of a reply that are accepted; the longest that we ask for has 268."""
MOST_DESCRIPTORS: Final = 8

FEATURE_INDIRECT: Final = 1 << 28
FEATURE_PROTOCOL: Final = 1 << 30
"""The back-end has protocol features. It must come back in SET_FEATURES, or the back-end enables its rings itself."""
FEATURE_VERSION_1: Final = 1 << 32
VRING_NO_DESCRIPTOR: Final = 1 << 8

USER_SPACE: Final = 0x00F0_0000_0000_0000
"""Where the user addresses that we declare begin. No process can have memory there, so an address that only comes back
as it was sent differs from a real one."""


class Request(IntEnum):
    """Messages of a front-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES that we know by name."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class VhostUserError(PostcopyError):
    """A back-end broke a rule of the conversation, or cannot do what is needed. ``rule`` is the short name."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of guest memory: ``guest`` addresses stand in descriptors, ``user`` addresses in SET_VRING_ADDR,
    ``offset`` is where it begins in its file. Bytes."""

    guest: int
    size: int
    user: int
    offset: int


def check_layout(regions: Sequence[MemoryRegion]) -> None:
    """Raises ValueError for guest memory that must not be sent: overlaps make some back-ends abort."""
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"guest memory has 1 to {MOST_REGIONS} regions, not {len(regions)}")
    for region in regions:
        if region.size <= 0 or any(part % 4096 for part in (region.guest, region.size, region.user, region.offset)):
            raise ValueError(f"the region at {region.guest:#x} is not made of whole pages")
    for name in ("guest", "user"):
        ends = sorted((getattr(region, name), getattr(region, name) + region.size) for region in regions)
        if any(before[1] > after[0] for before, after in pairwise(ends)):
            raise ValueError(f"two regions overlap in {name} addresses")
        if ends[-1][1] >= 1 << 64:
            raise ValueError(f"a region ends beyond the last {name} address")


def lay_out(wanted: Sequence[tuple[int, int, int | None]]) -> tuple[MemoryRegion, ...]:
    """Regions for (offset, size, guest address); without an address a region follows the one before. User addresses are
    far apart, where no process can have memory."""
    regions: list[MemoryRegion] = []
    free = 0
    for number, (offset, size, guest) in enumerate(wanted):
        start = free if guest is None else guest
        regions.append(MemoryRegion(start, size, USER_SPACE + (number << 48), offset))
        free = max(free, start + size)
    check_layout(regions)
    return tuple(regions)


@dataclass(frozen=True, slots=True)
class Frame:
    """One received message. The receiver owns ``fds``."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & REPLY)


def pack_frame(request: int, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """A front-end's message."""
    return HEADER.pack(request, VERSION | (NEED_REPLY if need_reply else 0), len(payload)) + payload


def pack_table(regions: Sequence[MemoryRegion]) -> bytes:
    """The payload of SET_MEM_TABLE, without unused regions."""
    return _COUNT.pack(len(regions), 0) + b"".join(
        _REGION.pack(region.guest, region.size, region.user, region.offset) for region in regions
    )


def unpack_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    """The regions of a table. Raises VhostUserError if count and length contradict each other."""
    if len(payload) < _COUNT.size:
        raise VhostUserError("table-reply", f"a memory table of {len(payload)} bytes is too short")
    count, _ = _COUNT.unpack_from(payload)
    if count > MOST_REGIONS or len(payload) != _COUNT.size + count * _REGION.size:
        raise VhostUserError("table-reply", f"a memory table of {count} regions has not {len(payload)} bytes")
    return tuple(
        MemoryRegion(*_REGION.unpack_from(payload, at)) for at in range(_COUNT.size, len(payload), _REGION.size)
    )


def pack_config(offset: int, size: int, data: bytes = b"") -> bytes:
    """The payload of GET_CONFIG (room for the answer) and SET_CONFIG."""
    return _CONFIG.pack(offset, size, 0) + data.ljust(size, b"\0")


def unpack_config(payload: bytes, size: int) -> bytes:
    """The bytes in an answer to GET_CONFIG, at least ``size``. Raises VhostUserError."""
    if len(payload) < _CONFIG.size:
        raise VhostUserError("config", f"an answer to GET_CONFIG of {len(payload)} bytes: this device has none")
    if len(payload) < _CONFIG.size + size:
        raise VhostUserError("config", f"{size} bytes of configuration were asked for: the answer is shorter")
    return payload[_CONFIG.size :]


def feature_names(bits: int) -> str:
    """Names of protocol features for people, and numbers of unknown ones."""
    known = {int(feature): feature.name or "" for feature in ProtocolFeature}
    names = [known.get(1 << bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]
    return ", ".join(names) or "none"


class FrameReader:
    """Parses frames from a stream, sans-I/O. Descriptors belong to the frame whose header they came with.

    The caller of ``feed`` owns the descriptors until a frame returns them; ``dropped`` returns the rest."""

    def __init__(self) -> None:
        self._data = b""
        self._fds: list[int] = []

    @property
    def wanted(self) -> int:
        """Number of bytes to receive next. Never more than the current frame has, so that a descriptor of the next
        frame is not assigned to this one."""
        if len(self._data) < HEADER.size:
            return HEADER.size - len(self._data)
        return HEADER.size + self._size() - len(self._data)

    @property
    def inside(self) -> bool:
        """Whether a frame is partly received."""
        return bool(self._data)

    def feed(self, data: bytes, fds: Iterable[int] = ()) -> Frame | None:
        """The frame that is complete now, or None. Raises VhostUserError for invalid bytes."""
        if len(data) > self.wanted:
            raise ValueError("more than was wanted")
        self._fds.extend(fds)
        self._data += data
        if len(self._fds) > MOST_DESCRIPTORS:
            raise VhostUserError("framing", f"a message came with more than {MOST_DESCRIPTORS} descriptors")
        if len(self._data) < HEADER.size:
            return None
        request, flags, size = HEADER.unpack_from(self._data)
        if flags & VERSION_MASK != VERSION:
            raise VhostUserError("framing", f"message {request} has version {flags & VERSION_MASK}, not {VERSION}")
        if size > MOST_PAYLOAD:
            raise VhostUserError("framing", f"message {request} claims {size} bytes, more than {MOST_PAYLOAD}")
        if self.wanted:
            return None
        frame = Frame(request, flags, self._data[HEADER.size :], tuple(self._fds))
        self._data, self._fds = b"", []
        return frame

    def dropped(self) -> tuple[int, ...]:
        """Descriptors of a frame that will never be complete; the caller closes them."""
        fds, self._fds, self._data = tuple(self._fds), [], b""
        return fds

    def _size(self) -> int:
        size: int = HEADER.unpack_from(self._data)[2]
        return size
