"""Events that the main loop dispatches: those of the listener thread, and those of the worker pool."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from postcopy_kernel.userfaultfd import Event
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message

from .admission import Peer


@dataclass(frozen=True, slots=True)
class CoreFaults:
    """Messages read from the core userfaultfd."""

    events: list[Event]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """SIGTERM, SIGINT, or ``postcopy stop``."""


@dataclass(frozen=True, slots=True)
class CustodianMessage:
    """A message of the custodian with its descriptors; None: its channel has ended."""

    message: Message | None
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A watched pidfd became readable. It is not watched any more."""

    pidfd: int


@dataclass(frozen=True, slots=True)
class ClientConnected:
    """A new connection on the attach socket of a peer that may attach, accepted ``at`` this monotonic time."""

    connection: socket.socket
    peer: Peer
    at: float


@dataclass(frozen=True, slots=True)
class PeersRefused:
    """Connections of a user (-1: of several) were refused, ``count`` since the last of these events."""

    uid: int
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """A client's message with its descriptors; BadMessage if it cannot be decoded; None: the connection has ended."""

    connection: socket.socket
    uid: int
    message: Message | BadMessage | None
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; ``at``: the monotonic time when the listener queued it."""

    at: float


ListenerEvent = (
    CoreFaults | StopRequested | CustodianMessage | ProcessEnded | ClientConnected | PeersRefused | ClientMessage | Tick
)


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker serves, or (quarantined, ``--quarantine wait``) none will: pending attaches are answered."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerCrashed:
    """A worker has ended that was not asked to."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker that was asked to leave has ended, and has no successor."""

    worker: int


WorkerEvent = WorkerReady | WorkerCrashed | WorkerGone
