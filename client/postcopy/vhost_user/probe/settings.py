"""The settings of a probe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """``disk`` has the contents that reads are compared with; ``rate`` is requests a second (0: as fast as they are
    answered); ``duration`` in seconds (0: until all requests are done)."""

    socket: str
    device: str = "blk"
    disk: str | None = None
    requests: int = 1000
    queues: int = 0
    depth: int = 16
    rate: float = 0.0
    duration: float = 0.0
    writes: bool = False
    kills: int = 0
    delays: int = 0
    delay: float = 0.1
    seed: int = 1
    timeout: float = 30.0
    pid: int | None = None
    order: str = "standard"
