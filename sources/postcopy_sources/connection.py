"""What the loop remembers of one supervisor, and how it sends to it without ever waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from postcopy_protocol.return_path import MAX_OPEN_BYTES, Range
from postcopy_protocol.source_conversation import SourceConversation, Stream
from postcopy_wire.transport import FULL, SENT, UNREACHABLE

from .answers import Buffer, Read
from .pushing import PushStream
from .staging import Staging

SEND_QUEUE = 128
"""Messages that are kept for one supervisor when it does not read; more than one has open (its flow_control.py)."""

ALL_HELD_BYTES = 24 << 20
"""Bytes of messages that are kept for all supervisors; beyond it the one with most is forgotten, and begins again."""


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request, and how many of its answers are still to be sent. ``length``: bytes asked for."""

    connection: Connection
    stream: Stream
    number: int
    length: int
    left: int = 0
    urgent: bool = False

    def sent_one(self) -> None:
        """One answer is sent, or no longer wanted."""
        self.left -= 1
        if not self.left:
            self.connection.conversation.answered(self.length)


@dataclass(frozen=True, slots=True)
class FastAnswer:
    """How a common request of one stream is answered (templates.py in the protocol wing): how its page is read at once
    (``ReadsNow.read_now``), and the parts of the answer before the request's number, between that and the range, and
    behind the range."""

    stream: Stream
    read: Read
    before: bytes
    between: bytes
    behind: bytes


@dataclass(slots=True, eq=False)
class Connection:
    """One supervisor. ``pieces``: background reads to come; ``outbox``: messages that it has not accepted yet, each
    with the request that it answers, if any."""

    name: bytes
    conversation: SourceConversation
    last_message_at: float = 0.0
    pieces: deque[tuple[OpenRequest, int, int]] = field(default_factory=deque)
    outbox: deque[tuple[Sequence[Buffer], OpenRequest | None]] = field(default_factory=deque)
    outbox_bytes: int = 0
    queued: bool = False  # is it in the loop's round of those that have pieces to come?
    pushers: dict[int, PushStream] = field(default_factory=dict)
    fast_answers: dict[bytes, FastAnswer] = field(default_factory=dict)  # filled by ``Answerer.learn``
    staging: Staging | None = None
    refused: int = 0  # messages

    def unstage(self) -> None:
        """Give up its staging memory, if it has any."""
        if self.staging is not None:
            self.staging.close()
            self.staging = None

    def end_stream(self, stream: Stream) -> None:
        """Forget what was made for a stream that has ended."""
        for part in [part for part, fast in self.fast_answers.items() if fast.stream is stream]:
            del self.fast_answers[part]
        pusher = self.pushers.pop(stream.number, None)
        if pusher is not None:
            pusher.end()

    def abandon(self) -> None:
        """Forget everything that was to be done for a supervisor that is gone."""
        self.unstage()
        for stream in list(self.conversation.streams.values()):
            self.conversation.end(stream)
        for pusher in self.pushers.values():
            pusher.end()
        for to_empty in (self.pushers, self.fast_answers, self.pieces, self.outbox):
            to_empty.clear()
        self.outbox_bytes = 0


class PartsSender(Protocol):
    """A router."""

    def send_parts(self, name: bytes, parts: Sequence[Buffer]) -> int:
        """Returns SENT, FULL or UNREACHABLE."""


Forget = Callable[[Connection], object]  # receives a connection whose supervisor is gone


class Sender:
    """Sends to supervisors through a router, and keeps what they do not accept yet."""

    def __init__(self, router: PartsSender, forget: Forget) -> None:
        self._send_parts = router.send_parts
        self._forget = forget
        self.held: set[Connection] = set()  # connections with an outbox that is not empty

    def send_pages(self, connection: Connection, parts: Sequence[Buffer], request: OpenRequest | None) -> None:
        """Send a Pages message, by ``Router.send_parts``, usually ``NativeRouter.send_parts``. What the supervisor does
        not accept waits in its outbox. Unasked pages (no request) wait there only as long as they are few, because
        nothing else bounds them."""
        sent = not connection.outbox
        if sent:
            sent = self._send_parts(connection.name, parts) == SENT or self._send(connection, parts)
        if sent:
            if request is not None:
                request.sent_one()
        elif request is not None or connection.outbox_bytes < MAX_OPEN_BYTES:
            connection.outbox.append((parts, request))
            connection.outbox_bytes += _weight(parts)
            self.held.add(connection)
            if sum([one.outbox_bytes for one in self.held]) > ALL_HELD_BYTES:
                self._forget(max(self.held, key=lambda one: one.outbox_bytes))

    def send_note(self, connection: Connection, data: bytes) -> None:
        """Send a message that may be lost: a refusal or a pong that has to wait is useless."""
        if not connection.outbox:
            self._send(connection, (data,))

    def flush(self) -> list[Connection]:
        """Send what was kept. Returns the connections whose outbox is empty now."""
        for connection in list(self.held):
            self._flush(connection)
        free = [connection for connection in self.held if not connection.outbox]
        self.held.difference_update(free)
        return free

    def _flush(self, connection: Connection) -> None:
        while connection.outbox and self._send(connection, connection.outbox[0][0]):
            if connection.outbox:  # not emptied because the supervisor is gone
                parts, request = connection.outbox.popleft()
                connection.outbox_bytes -= _weight(parts)
                if request is not None:
                    request.sent_one()

    def _send(self, connection: Connection, parts: Sequence[Buffer]) -> bool:
        """False: not accepted now. A supervisor that is gone accepts everything."""
        result = self._send_parts(connection.name, parts)
        if result == UNREACHABLE:
            self._forget(connection)
        return result != FULL


def _weight(parts: Sequence[Buffer]) -> int:
    return sum(map(len, parts))


def pieces_of(ranges: Sequence[Range], largest: int) -> Sequence[Range]:
    """The ranges, cut so that none is longer than ``largest`` bytes."""
    if len(ranges) == 1 and ranges[0][1] <= largest:
        return ranges
    return [
        (place, min(largest, offset + length - place))
        for offset, length in ranges
        for place in range(offset, offset + length, largest)
    ]
