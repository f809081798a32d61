"""virtio-blk: header and status of a request, and the start of the configuration space."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from .virtqueue import Piece

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 4
GET_ID: Final = 8
SECTOR: Final = 512
ID_BYTES: Final = 20
HEADER_BYTES: Final = 16
READ_ONLY: Final = 1 << 5
"""Feature bit of a device that cannot be written."""
PENDING: Final = 0xFF
"""Initial value of the status byte: no device writes it."""
STATUS: Final = {0: "ok", 1: "input/output error", 2: "unsupported"}
CONFIG_BYTES: Final = 8

_HEADER: Final = struct.Struct("<IIQ")


def header(kind: int, sector: int = 0) -> bytes:
    return _HEADER.pack(kind, 0, sector)


def request(kind: int, header_at: int, data: Sequence[tuple[int, int]], status_at: int) -> list[Piece]:
    """The buffers of a request: guest addresses of header and status, (address, length) of its data."""
    body = [Piece(address, length, device_writes=kind != WRITE) for address, length in data]
    return [Piece(header_at, HEADER_BYTES), *body, Piece(status_at, 1, device_writes=True)]


def capacity(config: bytes) -> int:
    """Sectors of the device, by its configuration space."""
    sectors: int = struct.unpack_from("<Q", config)[0]
    return sectors
