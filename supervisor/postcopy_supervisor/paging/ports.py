"""What paging needs of the rest of the supervisor: assembly passes objects that have these methods."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from ..blocks import RamBlock
from .engine import Ask
from .flow_control import RangeRequest


class WorkerSender(Protocol):
    """Sends to workers: ``WorkerPool``."""

    def send(self, worker: int, data: bytes) -> None:
        """Send an encoded message to a worker, without blocking."""


class OwnWaiter(Protocol):
    """The supervisor's own waiters: system calls of it that wait for pages of its own mapping."""

    def release(self, block: RamBlock, page: int, lost: bool) -> None:
        """Let them run. ``lost``: the system call ends with EFAULT."""


class LocalPages(Protocol):
    """Places pages of local blocks (worker zero does)."""

    def fetch(self, ask: Ask) -> None:
        """Place these pages soon; the engine learns of it by ``Engine.answered``."""


class BlockClients(Protocol):
    """Knows the clients of a block."""

    def with_block(self, block: int) -> list[int]:
        """Numbers of the clients that have regions of it."""


class LinkOwner(Protocol):
    """Holds the pages of a link's blocks (``RemotePaging``)."""

    def gave_up(self, request: RangeRequest) -> None:
        """The source never answered it."""

    def source_lost(self, blocks: Collection[int]) -> None:
        """The source was there, now or for a predecessor, and is lost."""

    def source_back(self, blocks: Collection[int]) -> None:
        """The lost source is back."""


Clock = Callable[[], float]  # ``time.monotonic`` or a test's clock
SendToSource = Callable[[bytes], object]
"""Sends an encoded message to a source, without blocking: ``Router.send`` with the name of the link."""


class Alarm(Protocol):
    """The supervisor's timer and second thread (the listener)."""

    def tick_at(self, due: float | None) -> None:
        """Tick no later than at this monotonic time, besides the regular ticks."""

    def call_soon(self, act: Callable[[], None]) -> None:
        """Do something in another thread, soon: a call that would hold up the main thread for milliseconds."""
