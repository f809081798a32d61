"""A split virtqueue in guest memory: the driver's side.

A ``Ring`` works on any writable buffer: the bytes of a file before they are served (the back-end then finds the ring in
missing pages), or the memory of a block. No method waits. Numbers are little-endian, as in virtio 1.

The device may read the available index at any time, so it is written by one store. ``struct.pack_into`` is not one
store: it writes zeros first, and a device that sees the index go back to 0 reports a broken ring."""

from __future__ import annotations

import os
import select
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from postcopy_kernel.descriptors import create_eventfd, signal_eventfd

if TYPE_CHECKING:
    from .back_end import BackEnd

NEXT: Final = 1
DEVICE_WRITES: Final = 2
INDIRECT: Final = 4

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_INDEX: Final = struct.Struct("<H")
_USED: Final = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Piece:
    """One buffer of a request: ``length`` bytes at guest address ``guest``."""

    guest: int
    length: int
    device_writes: bool = False

    @property
    def flags(self) -> int:
        return DEVICE_WRITES if self.device_writes else 0


def chain(pieces: Sequence[Piece], first: int = 0) -> bytes:
    """Chained descriptors of one request, for the table entries from ``first`` on."""
    last = len(pieces) - 1
    return b"".join(
        _DESCRIPTOR.pack(
            piece.guest, piece.length, piece.flags | (NEXT if n < last else 0), first + n + 1 if n < last else 0
        )
        for n, piece in enumerate(pieces)
    )


@dataclass(slots=True)
class Ring:
    """A ring of ``size`` descriptors whose three parts begin at these offsets of ``memory``."""

    memory: memoryview
    size: int
    descriptors: int
    available: int
    used: int
    next_available: int = 0
    next_used: int = 0

    def submit(self, pieces: Sequence[Piece], first: int) -> None:
        """Write a request's descriptors to the table entries from ``first`` on, and make it available."""
        at = self.descriptors + first * _DESCRIPTOR.size
        data = chain(pieces, first)
        self.memory[at : at + len(data)] = data
        self._offer(first)

    def submit_indirect(self, table: Piece, first: int) -> None:
        """Make a request available whose descriptors are in the table at ``table``."""
        at = self.descriptors + first * _DESCRIPTOR.size
        self.memory[at : at + _DESCRIPTOR.size] = _DESCRIPTOR.pack(table.guest, table.length, INDIRECT, 0)
        self._offer(first)

    def _offer(self, first: int) -> None:
        self._store(self.available + 4 + 2 * (self.next_available % self.size), first)
        self.next_available = (self.next_available + 1) & 0xFFFF
        self._store(self.available + 2, self.next_available)

    def _store(self, at: int, value: int) -> None:
        """Write sixteen bits in one store."""
        self.memory[at : at + 2].cast("H")[0] = value if sys.byteorder == "little" else value >> 8 | (value & 0xFF) << 8

    def completed(self) -> list[tuple[int, int]]:
        """Requests that the device has completed since the last call: (first descriptor, bytes written)."""
        found = []
        index = _INDEX.unpack_from(self.memory, self.used + 2)[0]
        while self.next_used != index:
            found.append(_USED.unpack_from(self.memory, self.used + 4 + 8 * (self.next_used % self.size)))
            self.next_used = (self.next_used + 1) & 0xFFFF
        return found

    @property
    def in_flight(self) -> int:
        return (self.next_available - self.next_used) & 0xFFFF


class RingEvents:
    """The two eventfds of a ring: kick (to the device) and call (from it)."""

    def __init__(self) -> None:
        self.kick = create_eventfd()
        self.call = create_eventfd()

    def notify(self) -> None:
        """Notify the device that requests are available."""
        signal_eventfd(self.kick)

    def wait(self, seconds: float) -> bool:
        """Wait for a call. A call is a hint: check the used ring, also without a call."""
        poll = select.poll()
        poll.register(self.call, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        os.eventfd_read(self.call)
        return True

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)

    def __enter__(self) -> RingEvents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_ring(
    back_end: BackEnd, index: int, ring: Ring, events: RingEvents, block: str | None = None, base: int | None = None
) -> None:
    """Give the back-end a ring in the memory of ``block`` (default: the first block), and enable it.

    The back-end reads the ring on its message thread: it may fault, and answers when the pages have arrived."""
    address = back_end.user_address
    talk, ask = back_end.talk, back_end.ask
    name = next(iter(back_end.blocks)) if block is None else block
    ask(talk.set_vring_num(index, ring.size))
    ask(talk.set_vring_base(index, ring.next_used if base is None else base))
    parts = (ring.descriptors, ring.used, ring.available)
    ask(talk.set_vring_addr(index, *(address(name, part) for part in parts)))
    ask(talk.set_vring_call(index, events.call))
    ask(talk.set_vring_kick(index, events.kick))
    ask(talk.set_vring_enable(index, True))
