"""What status, metrics and queries may read: a frozen record of the parts, and the supervisor's own state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from postcopy_protocol import counters

from .blocks import RamBlock
from .clients.client import Clients
from .clients.client_zero import ClientZero
from .event_log import EventLog
from .paging.paging import RemotePaging
from .pool.worker_pool import WorkerPool
from .waits import Waits


class Recording(Protocol):
    """The recorder of ``--record``, as far as the status shows it."""

    def document(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class RunState:
    """``phase`` is starting, running or ending; ``started`` a monotonic time. Only the main loop writes the phase."""

    started: float
    phase: str = "starting"


@dataclass(frozen=True, slots=True)
class Parts:
    """Readers do not change any of it."""

    state: RunState
    blocks: Mapping[str, RamBlock]
    clients: Clients
    pool: WorkerPool
    zero: ClientZero
    paging: RemotePaging
    event_log: EventLog
    waits: Waits
    refused: Mapping[str, int]
    """Refusals at the attach socket, by code."""
    control_page: memoryview
    recorder: Recording | None
    transport: str

    @property
    def shown_state(self) -> str:
        """The state that ``status`` shows: paused while a source is away."""
        paused = any(link.state == "paused" for link in self.paging.links.values())
        return "paused" if paused and self.state.phase == "running" else self.state.phase

    @property
    def recoveries(self) -> int:
        """How often a supervisor has taken over from a dead one in this runtime directory."""
        return int(self.control_page[counters.RECOVERED])
