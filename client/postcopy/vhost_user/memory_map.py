"""Where a back-end has mapped our blocks, read from the kernel.

libvhost-user up to at least 10.2 answers SET_MEM_TABLE with *our* addresses (it fills in a copy and sends the
original). So its mappings are found by the memory's inode in /proc/PID/maps. Every new mapping of a block is announced
in full, with the offset that the kernel shows, so no mapping has to be matched with a region; the regions must only be
covered. DPDK and fixed libraries report true addresses, which are compared with the same maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from postcopy_kernel.address_space import MappedRange
from postcopy_protocol.vhost_user import MemoryRegion, VhostUserError


@dataclass(frozen=True, slots=True)
class Placed:
    """``length`` bytes at ``address`` of the back-end are those of block ``block`` from ``offset``."""

    block: int
    address: int
    length: int
    offset: int


def find_mappings(
    before: Sequence[MappedRange],
    after: Sequence[MappedRange],
    files: Mapping[tuple[int, int], tuple[int, int]],
    regions: Sequence[tuple[int, MemoryRegion]],
) -> tuple[Placed, ...]:
    """The mappings that appeared between two looks. ``files``: (device, inode) of a block to its number and length;
    ``regions``: with the number of their block. Raises VhostUserError when a region is nowhere."""
    old = {(at.start, at.end, at.offset) for at in before if at.file in files}
    found: list[Placed] = []
    for at in after:
        if at.file not in files or (at.start, at.end, at.offset) in old:
            continue
        block, length = files[at.file]
        inside = min(at.end - at.start, length - at.offset)  # some back-ends round the length up to huge pages
        if inside > 0:
            found.append(Placed(block, at.start, inside, at.offset))
    for block, region in regions:
        if not any(holds(at, block, region) for at in found):
            raise VhostUserError(
                "addresses",
                f"the region at guest address {region.guest:#x} is not mapped in the back-end's process: if another "
                "process made its socket (socket activation, a daemon that forks), name its pid with --pid",
            )
    return tuple(found)


def holds(at: Placed, block: int, region: MemoryRegion) -> bool:
    """Whether this mapping contains all of the region."""
    return at.block == block and at.offset <= region.offset and region.offset + region.size <= at.offset + at.length


def check_claims(found: Sequence[Placed], regions: Sequence[tuple[int, MemoryRegion]], claimed: Sequence[int]) -> None:
    """Compare the addresses that the back-end reported with its maps. Raises VhostUserError where they differ."""
    for (block, region), address in zip(regions, claimed, strict=True):
        if not any(holds(at, block, region) and address - at.address == region.offset - at.offset for at in found):
            raise VhostUserError(
                "addresses",
                f"the back-end reports the region at guest address {region.guest:#x} at {address:#x}, which is wrong",
            )


def placed_as_claimed(regions: Sequence[tuple[int, MemoryRegion]], claimed: Sequence[int]) -> tuple[Placed, ...]:
    """The addresses that the back-end reported, where its maps cannot be read."""
    return tuple(
        Placed(block, address, region.size, region.offset)
        for (block, region), address in zip(regions, claimed, strict=True)
    )
