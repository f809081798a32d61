"""What paging needs of the rest of the supervisor: assembly passes objects that have these methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..blocks import RamBlock
from .engine import Ask


class WorkerSender(Protocol):
    """Sends to workers."""

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


class Alarm(Protocol):
    """The supervisor's timer and second thread (the listener)."""

    def tick_at(self, due: float | None) -> None:
        """Tick no later than at this monotonic time, besides the regular ticks."""

    def call_soon(self, act: Callable[[], None]) -> None:
        """Do something in another thread, soon: a call that would hold up the main thread for milliseconds."""


class Clock(Protocol):
    """``time.monotonic`` or a test's clock."""

    def __call__(self) -> float: ...
