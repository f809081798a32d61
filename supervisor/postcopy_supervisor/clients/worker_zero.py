"""Worker zero: the worker that places ranges of local blocks for the supervisor itself. It has no client."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from postcopy_kernel import memory
from postcopy_protocol import counters
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Fetch

from ..blocks import RamBlock
from ..paging.engine import Ask
from ..pool.custodian_client import CustodianClient
from ..pool.worker_pool import WorkerPool

NUMBER = 0
KEY = "client/0"  # the custodian's key of its figures


class WorkerZero:
    """Started when the first range is asked for. ``ready``: its present incarnation serves."""

    def __init__(self, blocks: Mapping[int, RamBlock], pool: WorkerPool, custodian: CustodianClient) -> None:
        self.ready = False
        self._blocks, self._pool = blocks, pool
        figures = memory.create_memfd("postcopy-zero", counters.PAGE_BYTES)
        self.counters = memoryview(mmap.mmap(figures, counters.PAGE_BYTES)).cast("Q")
        custodian.keep(KEY, b"", (figures,))

    def fetch(self, ask: Ask) -> None:
        """Ask for pages of a local block. What is asked before it is ready is asked again when it is."""
        if NUMBER not in self._pool.slots:
            self._pool.start(NUMBER)
        if self.ready:
            size = self._blocks[ask.block].page_size
            self._pool.send(NUMBER, encode(Fetch(ask.block, ask.first * size, (ask.end - ask.first) * size)))
