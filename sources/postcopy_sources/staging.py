"""Staging memory: on one machine, pages of the background need not go through a socket.

A memfd for one supervisor, with a few slots. The source reads a piece straight into a free slot and reports it
(``Staged``); the supervisor places it from there and sets the slot free. Two of five copies of every byte are left.

Only the source fills slots, in the thread of the loop, and only free ones; only the supervisor frees them. After a new
Advise, messages about the old slots may still be in flight. So a new staging memory, with another number, replaces the
old one, and no late message can free a slot of it.
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

SLOTS = 8  # more than the supervisor asks for at a time (its flow_control.py)
STUCK_SECONDS = 2.0  # when no slot was set free for so long, the messages about them were lost with a connection
LEAST = 64 << 10  # bytes; a smaller piece goes over the socket
ZEROS = -1  # instead of a slot: all bytes are zeros
_FREE = bytes([SLOT_FREE])


class Staging:
    """``used``: the supervisor has said that it has opened it. Raises OSError when there is no memory for it."""

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
        """The message that offers it."""
        nonce = self._memory[:NONCE]
        return Offered(self.number, os.getpid(), self._descriptor, nonce, SLOTS, self._slot_bytes)

    def free_slot(self, length: int) -> int:
        """A slot for so many bytes; -1: none is free, the length does not fit, or the supervisor has not opened it."""
        if not self.used or not LEAST <= length <= self._slot_bytes:
            return -1
        # The first one, because the slot used last is in the processor's cache.
        return max(-1, self._memory.find(_FREE, NONCE, NONCE + SLOTS) - NONCE)

    def read(self, read_into: ReadInto, offset: int, length: int, size: int) -> int | None:
        """Read ``length`` bytes from ``offset``, of a block of ``size``, into a free slot. Returns the slot, ZEROS, or
        None when no slot is free or the read failed: the caller then reads in another way. Raises BlockingIOError."""
        slot = self.free_slot(length)
        if slot < 0:
            return None
        start, wanted = STAGING_HEADER + slot * self._slot_bytes, min(length, size - offset)
        with memoryview(self._memory) as whole:
            try:
                found = read_into(offset, whole[start : start + wanted])
            except BlockingIOError:
                raise
            except Exception:  # the source's own
                return None
        self._memory[start + wanted : start + length] = bytes(length - wanted)
        return slot if found and not self._is_zero(start, length) else ZEROS

    def put(self, slot: int, data: Buffer) -> None:
        """Copy bytes into a slot."""
        start = STAGING_HEADER + slot * self._slot_bytes
        self._memory[start : start + len(data)] = data

    def _is_zero(self, start: int, length: int) -> bool:
        # Most pieces differ in the first page. Comparing the rest makes a copy.
        first = min(length, PAGE_4K)
        if self._memory[start : start + first] != zeros(first):
            return False
        return self._memory[start : start + length] == zeros(length)

    def fill(self, slot: int) -> None:
        """Hand the slot to the supervisor."""
        self._memory[NONCE + slot] = SLOT_FULL
        self._full_since = None

    def stuck(self, now: float) -> bool:
        """Has no slot been free or filled for STUCK_SECONDS?"""
        if self._memory.find(_FREE, NONCE, NONCE + SLOTS) >= 0:
            self._full_since = None
            return False
        if self._full_since is None:
            self._full_since = now
        return now - self._full_since > STUCK_SECONDS

    def close(self) -> None:
        """The supervisor's mapping stays valid."""
        with suppress(BufferError):  # a source has kept a view
            self._memory.close()
        os.close(self._descriptor)
