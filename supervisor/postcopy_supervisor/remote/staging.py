"""Staging memory, the supervisor's side: a source's memfd, opened and mapped (staging.py in the sources wing).

A source is not trusted. Its memfd is opened only if it has the expected name and size and cannot shrink. It is used
only if it begins with the nonce that the source sent, because a process number may belong to another namespace. Slots
may change at any instant; they are only ever the source of a UFFDIO_COPY."""

from __future__ import annotations

import mmap
import os

from postcopy_kernel.memory import Mapping, open_memfd_of
from postcopy_protocol import return_path
from postcopy_protocol.errors import BadMessage


class StagingMemory:
    """Raises BadMessage for an offer that breaks the protocol, OSError or ValueError when it cannot be opened."""

    def __init__(self, offer: return_path.Staging) -> None:
        length = return_path.check_staging(offer)
        self.number = offer.number
        self.slot_bytes = offer.slot_bytes
        self._slots = offer.slots
        descriptor = open_memfd_of(offer.pid, offer.descriptor, return_path.STAGING_NAME, length)
        try:
            # Read, not mapped: no page of it is touched before it is known to be the right one.
            if os.pread(descriptor, return_path.NONCE, 0) != offer.nonce:
                raise ValueError(f"the staging memory of process {offer.pid} is another one")
            self._header = mmap.mmap(descriptor, return_path.STAGING_HEADER)
            self._mapping = Mapping.of(descriptor, length, writable=False)
        finally:
            os.close(descriptor)

    def address_of(self, message: return_path.Staged) -> int:
        """Where the pages lie. Raises BadMessage for a slot that does not exist or is not full."""
        if message.slot >= self._slots:
            raise BadMessage(f"slot {message.slot} of {self._slots}")
        if self._header[return_path.NONCE + message.slot] != return_path.SLOT_FULL:
            raise BadMessage(f"slot {message.slot} is not full")
        return self._mapping.address + return_path.STAGING_HEADER + message.slot * self.slot_bytes

    def free(self, slot: int) -> None:
        """Give a slot back to the source."""
        self._header[return_path.NONCE + slot] = return_path.SLOT_FREE

    def close(self) -> None:
        self._header.close()
        self._mapping.close()
