"""Staging memory: on one machine pages of the background need not go through a socket.

A memfd for one supervisor, with a few slots. The source reads a piece straight into a free slot and says where it is
(``Staged``); the supervisor places it from there and sets the slot free. Of five copies of every byte two are left.

Only the source fills slots, in the thread of the loop, and only free ones; only the supervisor frees them. After a new
Advise nobody can tell which messages about the old slots are still on their way, so a new staging memory, of another
number, takes the place of the old one: nothing that comes late can free a slot of it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from postcopy_kernel.memory import create_memfd
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.return_path import NONCE, SLOT_FREE, SLOT_FULL, STAGING_HEADER, STAGING_NAME
from postcopy_protocol.return_path import Staging as Offered

from .answers import zeros

if TYPE_CHECKING:
    from .answers import Buffer, ReadInto

SLOTS = 8
"""Pieces that the supervisor has not placed yet: more than it asks for at a time (flow.py there)."""
STUCK_SECONDS = 2.0
"""For so long no slot was set free: what said where their pages are was lost with a connection."""
LEAST = 64 << 10
"""Bytes; a smaller piece goes over the socket."""
ZEROS = -1
"""In the place of a slot: there is nothing but zeros."""
_FREE = bytes([SLOT_FREE])


class Staging:
    """``used``: the supervisor has said that it is open there. Raises OSError where there is no memory for it."""

    def __init__(self, number: int, slot_bytes: int) -> None:
        self.number = number
        self.used = False
        self._full_since: float | None = None
        self._slot_bytes = slot_bytes
        length = STAGING_HEADER + SLOTS * slot_bytes
        self._descriptor = create_memfd(STAGING_NAME, length)
        try:
            self._memory = mmap.mmap(self._descriptor, length)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._memory[:NONCE] = secrets.token_bytes(NONCE)

    def offer(self) -> Offered:
        """What the supervisor is told."""
        nonce = self._memory[:NONCE]
        return Offered(self.number, os.getpid(), self._descriptor, nonce, SLOTS, self._slot_bytes)

    def free_slot(self, length: int) -> int:
        """A slot for so many bytes; -1: none is free, they are too many, too few, or nobody has opened it."""
        if not self.used or not LEAST <= length <= self._slot_bytes:
            return -1
        # The first one: what was used last is in the processor's cache.
        return max(-1, self._memory.find(_FREE, NONCE, NONCE + SLOTS) - NONCE)

    def read(self, read_into: ReadInto, offset: int, length: int, size: int) -> int | None:
        """Read ``length`` bytes from ``offset``, of a block of ``size``, into a free slot: which one; ZEROS; None when
        there is no slot or it did not succeed: the common way finds out why. Raises BlockingIOError."""
        slot = self.free_slot(length)
        if slot < 0:
            return None
        start, wanted = STAGING_HEADER + slot * self._slot_bytes, min(length, size - offset)
        with memoryview(self._memory) as whole:
            try:
                found = read_into(offset, whole[start : start + wanted])
            except BlockingIOError:
                raise
            except Exception:  # not ours
                return None
        self._memory[start + wanted : start + length] = bytes(length - wanted)
        return slot if found and not self._is_zero(start, length) else ZEROS

    def put(self, slot: int, data: Buffer) -> None:
        """Copy bytes into a slot."""
        start = STAGING_HEADER + slot * self._slot_bytes
        self._memory[start : start + len(data)] = data

    def _is_zero(self, start: int, length: int) -> bool:
        # Most pieces differ in the first page; only of the others is a copy made to compare.
        first = min(length, PAGE_4K)
        if self._memory[start : start + first] != zeros(first):
            return False
        return self._memory[start : start + length] == zeros(length)

    def fill(self, slot: int) -> None:
        """What was stored there is the supervisor's now."""
        self._memory[NONCE + slot] = SLOT_FULL
        self._full_since = None

    def stuck(self, now: float) -> bool:
        """Has no slot been free, and none been filled, for STUCK_SECONDS?"""
        if self._memory.find(_FREE, NONCE, NONCE + SLOTS) >= 0:
            self._full_since = None
            return False
        if self._full_since is None:
            self._full_since = now
        return now - self._full_since > STUCK_SECONDS

    def close(self) -> None:
        """The supervisor's mapping lives on."""
        with suppress(BufferError):  # a source has kept a view
            self._memory.close()
        os.close(self._descriptor)
