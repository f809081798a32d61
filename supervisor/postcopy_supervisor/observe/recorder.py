"""``serve --record FILE``: appends the faults that workers write into their rings to a file.

A thread of its own empties the rings twenty times a second. They are shared memory, so workers never wait for it. What
a full ring loses is counted, here and in the status. The format is in ``postcopy_protocol.trace``."""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from postcopy_protocol import trace
from postcopy_protocol.errors import BadInput
from postcopy_protocol.trace import (
    FIGURES_BYTES,
    RECORD,
    RING_AT,
    RING_HEAD,
    RING_LOST,
    RING_RECORDS,
    RING_TAKEN,
    RING_WRITTEN,
)

from ..blocks import RamBlock

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.05
END_SECONDS = 2.0  # a file that accepts nothing, such as a full pipe, holds up the end no longer


@dataclass(slots=True)
class Ring:
    """One client's ring. ``head``: its counters; ``lost``: records lost by the last round."""

    head: memoryview
    records: memoryview
    lost: int = 0


class Recorder(threading.Thread):
    """``present``: numbers of the clients. The ring of one that has left is emptied once more and dropped. Raises
    BadInput for a file that cannot be written."""

    def __init__(
        self, path: str, blocks: Iterable[RamBlock], present: Collection[int], *, overwrite: bool = False
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self.path = path
        self.records = self.lost = 0
        self.failed = ""
        self._present = present
        self._rings: dict[int, Ring] = {}
        self._end = threading.Event()
        self._monotonic = time.monotonic_ns()
        blocks = tuple(blocks)
        traced = tuple(trace.Traced(block.number, block.name, block.size, block.page_size) for block in blocks)
        try:
            # It shows which client read what, so only the supervisor's user may read it.
            self._file = _overwritten(path, blocks) if overwrite and os.path.exists(path) else _created(path)
            os.write(self._file, trace.Header(time.time(), self._monotonic, traced).encode())
        except FileExistsError:
            raise BadInput(
                f"--record {path}: the file exists already; remove it, name another one, or say --record-overwrite"
            ) from None
        except OSError as error:
            raise BadInput(f"--record {path}: {error.strerror}") from error

    def add(self, client: int, figures: int) -> None:
        """Read this client's ring from now on (main thread). Figures without a ring are ignored."""
        if os.fstat(figures).st_size >= FIGURES_BYTES:
            page = memoryview(mmap.mmap(figures, FIGURES_BYTES))
            self._rings[client] = Ring(page[RING_HEAD:RING_AT].cast("Q"), page[RING_AT:])

    def run(self) -> None:
        while not self._end.wait(ROUND_SECONDS):
            self._round()

    def close(self) -> None:
        """Empty all rings a last time and close the file."""
        self._end.set()
        if self.is_alive():
            self.join(END_SECONDS)
        if self.is_alive():
            return log.error(
                "recording to %s ends: the file accepts nothing; %d faults are in it", self.path, self.records
            )
        self._round()
        os.close(self._file)
        log.info("recorded: %d faults in %s, %d lost", self.records, self.path, self.lost)

    def document(self) -> dict[str, Any]:
        """For the status."""
        return {"file": self.path, "records": self.records, "lost": self.lost, "failed": self.failed}

    def _round(self) -> None:
        for client, ring in list(self._rings.items()):
            gone = client not in self._present  # checked first: then all that it wrote is in the ring
            self._empty(ring)
            if gone:
                del self._rings[client]

    def _empty(self, ring: Ring) -> None:
        head = ring.head
        written, taken = head[RING_WRITTEN], head[RING_TAKEN]
        self.lost += head[RING_LOST] - ring.lost
        ring.lost = head[RING_LOST]
        if not taken < written <= taken + RING_RECORDS:  # nothing new, or not written by our worker
            return
        first, count = taken % RING_RECORDS, written - taken
        for low, many in ((first, min(count, RING_RECORDS - first)), (0, max(0, first + count - RING_RECORDS))):
            if many:
                self._write(self._shifted(bytes(ring.records[low * RECORD.size : (low + many) * RECORD.size])), many)
        head[RING_TAKEN] = written

    def _shifted(self, data: bytes) -> bytes:
        """Workers write the clock's time; the file has the time since its start."""
        out = bytearray(data)
        for at in range(0, len(out), RECORD.size):
            word = int.from_bytes(out[at : at + 7], "little") - self._monotonic
            out[at : at + 7] = max(0, word).to_bytes(7, "little")
        return bytes(out)

    def _write(self, data: bytes, count: int) -> None:
        if self.failed:
            self.lost += count
            return
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            self.records += count
        except OSError as error:  # a full disk must not stop any fault
            self.failed, self.lost = str(error.strerror), self.lost + count
            log.error("recording to %s ends: %s", self.path, error.strerror)


def _created(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _overwritten(path: str, blocks: Iterable[RamBlock]) -> int:
    """An older trace, emptied. Raises BadInput for a file that is none, or that is served."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # for writing only when it is not leased by us
    try:
        if os.pread(file, len(trace.MAGIC), 0) not in (trace.MAGIC, b""):
            raise BadInput(f"--record {path}: the file is no trace, so it is not overwritten")
        served = [block.opened.descriptor for block in blocks if block.opened.descriptor >= 0]
        if any(os.path.sameopenfile(file, descriptor) for descriptor in served):
            raise BadInput(f"--record {path}: the file is served")
        return os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    finally:
        os.close(file)
