"""What the loop remembers of one supervisor, and how it sends to it without ever waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from postcopy_protocol.return_path import MAX_OPEN_BYTES, Range
from postcopy_protocol.source_conversation import SourceConversation, Stream
from postcopy_wire.transport import FULL, SENT, UNREACHABLE

from .answers import Buffer, Read
from .source import PushStream
from .staging import Staging

SEND_QUEUE = 128
"""Messages to one supervisor that are kept for it when it does not read; more than one has open (flow.py there)."""


@dataclass(slots=True, eq=False)
class Task:
    """A request and how many of its answers are still to be sent. ``length``: bytes asked for."""

    peer: Peer
    stream: Stream
    request: int
    length: int
    left: int = 0
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Lane:
    """Common requests of one stream (express.py in the protocol wing): how its pages are read at once, and what stands
    before the number, between it and the range, and behind that, in an answer."""

    stream: Stream
    read: Read
    before: bytes
    between: bytes
    behind: bytes


@dataclass(slots=True, eq=False)
class Peer:
    """One supervisor. ``pieces``: background reads to come; ``outbox``: messages that it did not take yet, each with
    the task that one of them brings nearer to its end."""

    name: bytes
    conversation: SourceConversation
    heard: float = 0.0
    pieces: deque[tuple[Task, int, int]] = field(default_factory=deque)
    outbox: deque[tuple[Sequence[Buffer], Task | None]] = field(default_factory=deque)
    outbox_bytes: int = 0
    queued: bool = False
    """Is in the loop's round of those that have pieces to come."""
    pushers: dict[int, PushStream] = field(default_factory=dict)
    lanes: dict[bytes, Lane] = field(default_factory=dict)
    staging: Staging | None = None

    def unstage(self) -> None:
        """Its staging memory, if any, is filled no more."""
        if self.staging is not None:
            self.staging.close()
            self.staging = None


class Sender:
    """Sends to supervisors: ``send`` is the router's, given a name and the frames of a message. ``gone`` is called with
    the peer that is there no more."""

    def __init__(self, send: Callable[[bytes, Sequence[Buffer]], int], gone: Callable[[Peer], None]) -> None:
        self._send_parts = send
        self._gone = gone
        self.held: set[Peer] = set()

    def answer(self, peer: Peer, parts: Sequence[Buffer], task: Task | None) -> None:
        """Send pages. What the peer does not take waits in its outbox; unasked pages (no task) wait there only as long
        as they are few, because nothing else bounds them."""
        if not peer.outbox and (self._send_parts(peer.name, parts) == SENT or self._send(peer, parts)):
            settle(task)
        elif task is not None or peer.outbox_bytes < MAX_OPEN_BYTES:
            peer.outbox.append((parts, task))
            peer.outbox_bytes += _weight(parts)
            self.held.add(peer)

    def say(self, peer: Peer, data: bytes) -> None:
        """Send a word that may be lost: a refusal or a pong that has to wait is worth nothing."""
        if not peer.outbox:
            self._send(peer, (data,))

    def flush(self) -> list[Peer]:
        """Try again what was not taken. Peers whose outbox is empty now."""
        for peer in list(self.held):
            self._empty(peer)
        free = [peer for peer in self.held if not peer.outbox]
        self.held.difference_update(free)
        return free

    def _empty(self, peer: Peer) -> None:
        while peer.outbox and self._send(peer, peer.outbox[0][0]):
            if peer.outbox:  # not emptied because the peer is gone
                parts, task = peer.outbox.popleft()
                peer.outbox_bytes -= _weight(parts)
                settle(task)

    def _send(self, peer: Peer, parts: Sequence[Buffer]) -> bool:
        """False: not now. A peer that is gone takes everything."""
        became = self._send_parts(peer.name, parts)
        if became == UNREACHABLE:
            self._gone(peer)
        return became != FULL


def settle(task: Task | None) -> None:
    """One answer of a task is sent, or wanted no more."""
    if task is not None:
        task.left -= 1
        if not task.left:
            task.peer.conversation.answered(task.length)


def _weight(parts: Sequence[Buffer]) -> int:
    return sum(map(len, parts))


def abandon(peer: Peer) -> None:
    """Forget what was to be done for a peer that is gone."""
    peer.unstage()
    for stream in list(peer.conversation.streams.values()):
        peer.conversation.end(stream)
    for pusher in peer.pushers.values():
        pusher.end()
    peer.pushers.clear()
    peer.lanes.clear()
    peer.pieces.clear()
    peer.outbox.clear()
    peer.outbox_bytes = 0


def pieces_of(ranges: Sequence[Range], largest: int) -> Sequence[Range]:
    """The ranges, none longer than ``largest`` bytes."""
    if len(ranges) == 1 and ranges[0][1] <= largest:
        return ranges
    return [
        (place, min(largest, offset + length - place))
        for offset, length in ranges
        for place in range(offset, offset + length, largest)
    ]
