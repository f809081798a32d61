"""From requests to answers: urgent before background, in pieces, without blocking the loop.

What a source can read at once (``read_now``) is read and sent in the loop's thread. The rest goes to Readers, whose
answers come back through the call queue. Background is read a piece at a time, and only while no message waits.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from postcopy_kernel import crashpoints
from postcopy_protocol.codec import encode
from postcopy_protocol.return_path import (
    MAX_OPEN_BYTES,
    MAX_OPEN_REQUESTS,
    RESIDENT,
    Held,
    Pages,
    Range,
    RangeKind,
    RequestRanges,
    Staged,
    unpack_range,
)
from postcopy_protocol.source_conversation import Phase, Stream
from postcopy_protocol.templates import RANGE_BYTES, answer_parts, number_of, stream_part

from .answers import (
    KIND,
    Answer,
    Buffer,
    Read,
    answer_of,
    answer_of_page,
    expanded,
    lost_answer,
    merged,
    read_answer,
    reason_of,
    zeros,
)
from .call_queue import CallQueue
from .connection import Connection, FastAnswer, OpenRequest, Sender, pieces_of
from .readers import Readers
from .source import PageSource, ReadsBackground, ReadsInto, ReadsNow, WaitsForPages, WhenReady
from .staging import ZEROS, Staging

PIECE = 256 << 10
"""Bytes of pages in one message while a client waits, unless one page is larger: an urgent page waits for at most one
piece."""
CALM_PIECE = 1 << 20  # ... and of background while none does.
HELD_SECONDS = 4.0  # so often a supervisor is informed that its request waits
CALM_SECONDS = 0.05  # so long after an urgent request no client is taken to wait
_BYTES = (bytearray, bytes)
_NO_NUMBER = bytes(4)
NOT_RESIDENT = "it is not here yet"

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class ReadJob:
    """One read in another thread; see ``readers.Job``."""

    answerer: Answerer
    request: OpenRequest
    offset: int
    length: int
    begun: float = 0.0
    over: bool = False

    def read(self) -> Answer:
        if self.request.stream.phase is Phase.ENDED:
            return lost_answer(self.offset, self.length, "")
        try:
            return self.answerer.read_waiting(self.request, self.offset, self.length)
        except BaseException as error:  # SystemExit and its like are the source's own, and no reason to end a thread
            return lost_answer(self.offset, self.length, reason_of(error))

    def done(self, answer: Answer) -> None:
        self.answerer.calls.call_soon(partial(self.answerer.answer, self.request, answer))

    def give_up(self, reason: str) -> Answer:
        return lost_answer(self.offset, self.length, reason)


class Answerer:
    """Answers the requests of all supervisors."""

    def __init__(self, sources: Mapping[str, PageSource], sender: Sender, calls: CallQueue, readers: Readers) -> None:
        self.calls = calls
        self.streaming: deque[Connection] = deque()  # connections with background reads to come, in turn
        self._sources = sources
        self._read_now = {name: one.read_now for name, one in sources.items() if isinstance(one, ReadsNow)}
        self._read_background = {
            name: one.read_background if isinstance(one, ReadsBackground) else one.read for name, one in sources.items()
        }
        self._read_into = {name: one.read_into for name, one in sources.items() if isinstance(one, ReadsInto)}
        self._when_ready = {name: one.when_ready for name, one in sources.items() if isinstance(one, WaitsForPages)}
        self._held: dict[OpenRequest, float] = {}  # requests that wait for a ``when_ready``, and since when, or noted
        self._sender = sender
        self._readers = readers
        self._urgent_at = -1e9

    def answer_fast(self, connection: Connection, data: bytes) -> bool:
        """Answer a common request without decoding it: one that differs from an accepted one only in number and range,
        for one whole page. ``fast.read`` is ``ReadsNow.read_now``, of a file ``FileSource.read_now``; Pages are sent by
        ``Sender.send_pages``. False: it is another, or its page cannot be read at once, and nothing is done."""
        fast = connection.fast_answers.get(stream_part(data))
        number = number_of(data)
        if fast is None or number in (b"", _NO_NUMBER) or connection.outbox:
            return False
        offset, length = unpack_range(data, len(data) - RANGE_BYTES)
        stream, conversation = fast.stream, connection.conversation
        if (
            length != stream.page_size
            or offset & (length - 1)
            or offset + length > stream.offer.size
            or stream.phase is not Phase.LISTENING
            or conversation.open_requests >= MAX_OPEN_REQUESTS
            or conversation.open_bytes + length > MAX_OPEN_BYTES
        ):
            return False
        connection.last_message_at = self._urgent_at = time.monotonic()
        try:
            page = fast.read(offset, length)
        except BlockingIOError:
            return False
        except Exception as error:
            parts = _parts(stream, int.from_bytes(number, "big"), lost_answer(offset, length, reason_of(error)))
        else:
            if type(page) in _BYTES and len(page) == length and page != zeros(length):  # type: ignore[arg-type]
                parts = [fast.before + number + fast.between + data[-RANGE_BYTES:] + fast.behind, page]  # type: ignore[list-item]
            else:
                parts = _parts(stream, int.from_bytes(number, "big"), answer_of_page(page, offset, length))
        # It never counts as open. If it is not accepted at once, it is the only such message in the outbox, because the
        # next requests are decoded.
        self._sender.send_pages(connection, parts, None)
        return True

    def learn(self, connection: Connection, message: RequestRanges, data: bytes) -> None:
        """``data`` was accepted: requests like it can be answered by ``answer_fast``."""
        stream = connection.conversation.streams.get(message.stream)
        if stream is None or len(message.ranges) != RANGE_BYTES or not number_of(data):
            return
        if crashpoints.armed("source.asked", "source.answered"):  # they are on the way of decoded requests
            return
        read = self._read_now.get(stream.offer.name)
        if read is not None:
            connection.fast_answers[stream_part(data)] = FastAnswer(stream, read, *answer_parts(stream.number))

    def request(self, connection: Connection, message: RequestRanges) -> None:
        """Answer a request now or later. Raises SourceRefusal."""
        stream, ranges = connection.conversation.request(message)
        length = sum([length for _, length in ranges])
        request = OpenRequest(connection, stream, message.request, length, urgent=message.urgent)
        read_now = self._read_now.get(stream.offer.name)
        if message.urgent:
            self._urgent_at = connection.last_message_at
            if read_now is not None:
                return self._answer_now(request, ranges, read_now)
        for offset, length in pieces_of(ranges, self._largest(stream)):
            request.left += 1
            if read_now is None:
                self._read_later(request, offset, length)
            else:
                connection.pieces.append((request, offset, length))
                self.enqueue(connection)

    def _largest(self, stream: Stream) -> int:
        """Bytes of one piece, now."""
        calm = time.monotonic() - self._urgent_at > CALM_SECONDS
        return max(CALM_PIECE if calm else PIECE, stream.page_size)

    def _answer_now(self, request: OpenRequest, ranges: Sequence[Range], read_now: Read) -> None:
        """Read an urgent request at once, and answer it in as few messages as pieces allow."""
        ready: list[Answer] = []
        weight, request.left = 0, 1  # held open until everything is read
        for offset, length in pieces_of(ranges, max(PIECE, request.stream.page_size)):
            if ready and weight + length > PIECE:
                request.left += 1
                self.answer(request, merged(ready))
                ready, weight = [], 0
            try:
                ready.append(_read(request.stream, read_now, offset, length))
                weight += length
            except BlockingIOError:
                request.left += 1
                self._read_later(request, offset, length)
        if ready:
            self.answer(request, merged(ready))
        else:
            request.sent_one()

    def enqueue(self, connection: Connection) -> None:
        """Put a connection into the round, if it has pieces to come."""
        if connection.pieces and not connection.queued:
            connection.queued = True
            self.streaming.append(connection)

    def stream_next(self) -> None:
        """Send one piece to the connection whose turn it is. A supervisor that does not accept its answers is left out
        until it does."""
        connection = self.streaming.popleft()
        connection.queued = False
        if connection.outbox or not connection.pieces:
            return
        request, offset, length = connection.pieces.popleft()
        largest = self._largest(request.stream)
        if length > largest:  # a client has begun to wait since it was asked for
            request.left += 1
            connection.pieces.appendleft((request, offset + largest, length - largest))
            length = largest
        self.enqueue(connection)
        read_now = self._read_now.get(request.stream.offer.name)
        if read_now is None or request.stream.phase is Phase.ENDED:
            return request.sent_one()
        try:
            if self._read_staged(request, offset, length):
                return None
            answer = _read(request.stream, read_now, offset, length)
        except BlockingIOError:
            return self._read_later(request, offset, length)
        return self.answer(request, answer)

    def _read_later(self, request: OpenRequest, offset: int, length: int) -> None:
        if RESIDENT in request.stream.features and self._read_now.get(request.stream.offer.name) is not None:
            return self.answer(request, lost_answer(offset, length, NOT_RESIDENT))
        when_ready = self._when_ready.get(request.stream.offer.name)
        if when_ready is not None:
            return self._hold(request, offset, length, when_ready)
        self._readers.put(ReadJob(self, request, offset, length), urgent=request.urgent)

    def _hold(self, request: OpenRequest, offset: int, length: int, when_ready: WhenReady) -> None:
        """Answer when the source has the pages: each page that a client waits for alone."""
        pieces = pieces_of(((offset, length),), request.stream.page_size if request.urgent else length)
        request.left += len(pieces) - 1
        self._held.setdefault(request, time.monotonic())
        for place, part in pieces:
            when_ready(place, part, request.urgent, partial(self._answer_held, request, place, part))

    def _answer_held(self, request: OpenRequest, offset: int, length: int) -> None:
        read_now = self._read_now.get(request.stream.offer.name)
        assert read_now is not None
        if request.stream.phase is Phase.ENDED:
            request.sent_one()
        elif request.urgent or not self._read_staged(request, offset, length):
            self.answer(request, _read(request.stream, read_now, offset, length))
        if not request.left:
            self._held.pop(request, None)

    def note_held(self, now: float) -> None:
        """Inform supervisors of requests that wait for long, so that they are not given up."""
        for request, noted in list(self._held.items()):
            if not request.left or request.stream.phase is Phase.ENDED:
                del self._held[request]
            elif now - noted >= HELD_SECONDS:
                self._held[request] = now
                if "held" in request.stream.features:
                    self._sender.send_note(request.connection, encode(Held(request.stream.number, request.number)))

    def read_waiting(self, request: OpenRequest, offset: int, length: int) -> Answer:
        """Read in another thread, where it may wait."""
        name = request.stream.offer.name
        read = self._sources[name].read if request.urgent else self._read_background[name]
        return _read(request.stream, read, offset, length)

    def answer(self, request: OpenRequest, answer: Answer) -> None:
        """Send pages that were asked for."""
        if request.stream.phase is Phase.ENDED:  # they are no longer wanted
            return request.sent_one()
        if not self._put_staged(request, answer):
            parts = _parts(request.stream, request.number, answer)
            self._sender.send_pages(request.connection, parts, request)

    def answer_unasked(self, connection: Connection, stream: Stream, answer: Answer) -> None:
        """Send pages that a source pushed."""
        if stream.phase is Phase.LISTENING:
            self._sender.send_pages(connection, _parts(stream, 0, answer), None)

    def _read_staged(self, request: OpenRequest, offset: int, length: int) -> bool:
        """Read a piece straight into a free slot. False: nothing is done. Raises BlockingIOError."""
        staging, stream = request.connection.staging, request.stream
        read_into = self._read_into.get(stream.offer.name)
        if staging is None or read_into is None or "staging" not in stream.features:
            return False
        slot = staging.read(read_into, offset, length, stream.offer.size)
        if slot == ZEROS:
            self.answer(request, answer_of(None, offset, length, length))
        elif slot is not None:
            self._send_staged(request, staging, slot, offset, length)
        return slot is not None

    def _put_staged(self, request: OpenRequest, answer: Answer) -> bool:
        """Copy what was read in another way into a free slot. False: nothing is done."""
        staging = request.connection.staging
        if (
            staging is None
            or request.urgent
            or answer.kinds != KIND[RangeKind.DATA]
            or "staging" not in request.stream.features
        ):
            return False
        offset, length = unpack_range(answer.ranges, 0)
        slot = staging.free_slot(length)
        if slot >= 0:
            staging.put(slot, answer.frames[0])
            self._send_staged(request, staging, slot, offset, length)
        return slot >= 0

    def _send_staged(self, request: OpenRequest, staging: Staging, slot: int, offset: int, length: int) -> None:
        staging.fill(slot)
        staged = Staged(request.stream.number, request.number, offset, length, staging.number, slot)
        self._sender.send_pages(request.connection, (encode(staged),), request)


def _read(stream: Stream, read: Read, offset: int, length: int) -> Answer:
    return read_answer(read, offset, length, stream.offer.size, stream.page_size)


def _parts(stream: Stream, number: int, answer: Answer) -> list[Buffer]:
    if "zero" not in stream.features:
        answer = expanded(answer)
    head = encode(Pages(stream.number, number, answer.ranges, answer.kinds, answer.reason))
    return [head, *answer.frames]
