"""What Firecracker says to its page-fault handler: a JSON array of guest memory regions, a userfaultfd beside it.

Firecracker connects to the handler's Unix stream socket, sends once, and never reads. The body has no length and no end
mark, so it is complete when it is valid JSON. Source: Firecracker's ``src/vmm/src/persist.rs``, releases 1.1 to 1.16.

    {"base_host_virt_addr": address in its own memory, "size": bytes, "offset": in the memory file,
     "page_size": bytes (from 1.12 on), "page_size_kib": bytes as well, in spite of its name (1.7 on)}

Pure: no socket, no system call. What comes from a virtual machine is hostile until it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BadMessage
from .geometry import ADDRESS_LIMIT, PAGE_4K, PAGE_SIZES

LARGEST_BODY = 1 << 20
MOST_PIECES = 256
"""Reads that a body may need: each is parsed from its beginning."""
MOST_REGIONS = 64


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """``size`` bytes at ``address`` in the memory of the virtual machine's process are those of the memory file from
    ``offset``."""

    address: int
    size: int
    offset: int
    page_size: int


class RegionsReader:
    """Reads the body, in pieces of any size."""

    def __init__(self) -> None:
        self._data = b""
        self._pieces = 0

    def feed(self, data: bytes) -> tuple[GuestRegion, ...] | None:
        """The regions once the body is complete; None before. Raises BadMessage."""
        self._data += data
        self._pieces += 1
        if len(self._data) > LARGEST_BODY or self._pieces > MOST_PIECES:
            raise BadMessage(f"the list of regions does not end within {LARGEST_BODY} bytes and {MOST_PIECES} pieces")
        if self._data[:1] not in (b"[", b""):
            raise BadMessage("the list of regions does not begin with [")
        if not self._data.rstrip().endswith(b"]"):
            return None
        try:
            body = json.loads(self._data)
        except RecursionError:
            raise BadMessage("the list of regions is nested too deep") from None
        except ValueError:
            return None
        return tuple(_region(fields) for fields in _regions(body))

    def missing(self) -> str:
        """Why the body is not complete, after its connection has ended."""
        return f"the list of regions ends after {len(self._data)} bytes" if self._data else "it sent nothing"


def _regions(body: Any) -> list[Any]:
    if not isinstance(body, list) or not 1 <= len(body) <= MOST_REGIONS:
        raise BadMessage(f"there are 1 to {MOST_REGIONS} regions, in a list")
    return body


def _region(fields: Any) -> GuestRegion:
    if not isinstance(fields, dict):
        raise BadMessage("a region is an object")
    page_size = _number(fields, "page_size" if "page_size" in fields else "page_size_kib", PAGE_4K)
    if page_size not in PAGE_SIZES:
        raise BadMessage(f"a page size of {page_size} bytes is neither 4096 nor 2097152")
    address, size, offset = (_number(fields, name) for name in ("base_host_virt_addr", "size", "offset"))
    return GuestRegion(address, size, offset, page_size)


def _number(fields: dict[Any, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if type(value) is not int or not 0 <= value < ADDRESS_LIMIT:
        raise BadMessage(f"a region's {name} is no number of 64 bits")
    return value


def check_regions(regions: Sequence[GuestRegion], size: int, page_size: int) -> None:
    """Do the regions show a block of ``size`` bytes exactly, each byte once? Raises BadMessage."""
    for region in regions:
        if region.page_size != page_size:
            raise BadMessage(f"its pages have {region.page_size} bytes, those of the block {page_size}")
        if region.size == 0 or (region.address | region.size | region.offset) % page_size:
            raise BadMessage(f"the region at {region.address:#x} is no whole number of pages")
        if region.address == 0 or region.address + region.size > ADDRESS_LIMIT:
            raise BadMessage(f"the region at {region.address:#x} is no range of addresses")
    expected = 0
    for region in sorted(regions, key=lambda region: region.offset):
        if region.offset != expected:
            kind = "are missing" if region.offset > expected else "come twice"
            raise BadMessage(f"bytes of the memory file from {min(region.offset, expected)} {kind}")
        expected += region.size
    if expected != size:
        raise BadMessage(f"its memory has {expected} bytes, the block {size}: this is another snapshot's memory file")
    end = 0
    for region in sorted(regions, key=lambda region: region.address):
        if region.address < end:
            raise BadMessage(f"the region at {region.address:#x} overlaps another")
        end = region.address + region.size
