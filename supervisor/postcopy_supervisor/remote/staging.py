"""The supervisor's side of a staging memory (staging.py in the sources wing): a source's memfd, opened and mapped.

A source is not believed: what it names is opened only when it is a memfd of that kind and size which cannot shrink,
and used only when it begins with the nonce that we were told, because a process number may be one of another
namespace. What lies in the slots may change at any instant; it is only ever the source of a UFFDIO_COPY.
"""

from __future__ import annotations

import mmap
import os

from postcopy_kernel.memory import Mapping, open_memfd_of
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.return_path import (
    NONCE,
    SLOT_FREE,
    SLOT_FULL,
    STAGING_HEADER,
    STAGING_NAME,
    Staged,
    Staging,
    check_staging,
)


class StagingMemory:
    """Raises BadMessage for an offer that is none, OSError or ValueError when it cannot be had."""

    def __init__(self, offer: Staging) -> None:
        length = check_staging(offer)
        self.number = offer.number
        self.slot_bytes = offer.slot_bytes
        self._slots = offer.slots
        descriptor = open_memfd_of(offer.pid, offer.descriptor, STAGING_NAME, length)
        try:
            # Read, not mapped: nothing of it is touched before it is known to be what was meant.
            if os.pread(descriptor, NONCE, 0) != offer.nonce:
                raise ValueError(f"the staging memory of process {offer.pid} is another one")
            self._header = mmap.mmap(descriptor, STAGING_HEADER)
            self._mapping = Mapping.of(descriptor, length, writable=False)
        finally:
            os.close(descriptor)

    def address_of(self, message: Staged) -> int:
        """Where the pages lie. Raises BadMessage for a slot that there is not, or that is not full."""
        if message.slot >= self._slots:
            raise BadMessage(f"slot {message.slot} of {self._slots}")
        if self._header[NONCE + message.slot] != SLOT_FULL:
            raise BadMessage(f"slot {message.slot} is not full")
        return self._mapping.address + STAGING_HEADER + message.slot * self.slot_bytes

    def free(self, slot: int) -> None:
        """It is the source's again."""
        self._header[NONCE + slot] = SLOT_FREE

    def close(self) -> None:
        self._header.close()
        self._mapping.close()
