"""The loop of a page source: one router, one thread, urgent before background, and nobody else's fault stops it.

The thread waits in a turn of the router. What a source can read at once (``read_now``) is read and sent right there;
the rest goes to Readers, whose answers come back through a Mailbox that rings in the same turn. Background reads
that need not wait are done here too, a piece at a time, and only while no message is waiting.

Nothing is sent blocking. A supervisor that does not take its answers gets an outbox, and its requests count as open as
long as their answers lie there: what it may have open is bounded, so is what it can make this program keep.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from postcopy_kernel import crashpoints
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    MAX_OPEN_BYTES,
    MAX_OPEN_REQUESTS,
    Advise,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    Range,
    RangeKind,
    RequestRanges,
    Staged,
    UseStaging,
    unpack_range,
)
from postcopy_protocol.source_conversation import Offer, Phase, SourceConversation, SourceRefusal, Stream
from postcopy_protocol.templates import RANGE_BYTES, answer_parts, number_of, stream_part
from postcopy_protocol.zmtp import Message as Words
from postcopy_wire.router import Router

from .answers import (
    KIND,
    Answer,
    Buffer,
    Read,
    ReadInto,
    answer_of,
    expanded,
    judged,
    lost_answer,
    merged,
    read_answer,
    reason_of,
    zeros,
)
from .connection import Lane, Peer, Sender, Task, abandon, pieces_of, settle
from .mailbox import Mailbox
from .readers import Job, Readers
from .source import PageSource, PushStream, StreamEnded
from .staging import ZEROS, Staging

EXPECTED = frozenset(FROM_SUPERVISOR)
MAX_PEERS = 256
"""Supervisors that are remembered; beyond it the one that has been silent longest is forgotten."""
SILENT_SECONDS = 600.0
"""A supervisor that has said nothing for so long is forgotten: they ping every second. When a connection breaks while
nothing is sent nobody tells us, and a thread that pushes to it would wait for ever for more to be allowed."""
MAX_PUSHING = 64
"""Threads in ``listening`` of sources."""
PIECE = 256 << 10
"""Bytes of pages in one message while anybody waits, unless one page is larger: an urgent page waits for no more than
one piece."""
CALM_PIECE = 1 << 20
"""... and of background while nobody does."""
CALM_SECONDS = 0.05
"""After an urgent request."""
MAX_STAGINGS = 16
"""Supervisors that have a staging memory; the others get everything over their sockets."""
STAGING_SILENT_SECONDS = 10.0
"""A supervisor that has said nothing for so long needs none: it pings every second."""
LARGE = 31 << 20
"""Bytes; just below the largest that glibc (any, 64 bit) learns its threshold from."""

BYTES = (bytearray, bytes)
NO_NUMBER = bytes(4)

TICK = 0.25  # seconds between looks at reads that hang
RETRY = 0.005  # ... and at an outbox

log = logging.getLogger(__name__)


class Loop:
    """Serves ``sources`` to who speaks in ``router``, whose ``heard`` and ``gone`` become the loop's, until a signal
    raises something in its thread. ``features`` are those that supervisors may have."""

    def __init__(
        self,
        sources: Mapping[str, tuple[PageSource, Offer]],
        router: Router,
        mailbox: Mailbox,
        readers: Readers,
        features: Sequence[str],
    ) -> None:
        self._sources = {name: source for name, (source, _) in sources.items()}
        self._read_now: dict[str, Read | None] = {
            name: getattr(source, "read_now", None) for name, source in self._sources.items()
        }
        self._read_into: dict[str, ReadInto | None] = {
            name: getattr(source, "read_into", None) for name, source in self._sources.items()
        }
        self._offers = {name: offer for name, (_, offer) in sources.items()}
        self._features = features
        self._router = router
        self._mailbox = mailbox
        self._readers = readers
        self._sender = Sender(router.send_parts, self._forget)
        self._peers: dict[bytes, Peer] = {}
        self._streaming: deque[Peer] = deque()
        self._pushing: set[threading.Thread] = set()
        # Numbers that another life of this source has not given out: late answers must not fit (return_path.py).
        self._number = itertools.count(secrets.randbits(40) + 1).__next__
        self._next_tick = self._pause = 0.0
        self._urgent_at = -1e9
        request = crashpoints.around("source.asked", self._request, "source.answered")
        self._heard: dict[type[Message], Callable[[Peer, Message], None]] = {
            RequestRanges: request,  # type: ignore[dict-item]  # each is called with its own class only
            Ping: self._ping,  # type: ignore[dict-item]
            Listen: self._listen,  # type: ignore[dict-item]
            Advise: self._advise,  # type: ignore[dict-item]
            Complete: self._complete,  # type: ignore[dict-item]
            UseStaging: self._use_staging,  # type: ignore[dict-item]
        }

    def run(self) -> None:
        """Never returns."""
        self._router.heard, self._router.gone = self.heard, self.gone
        self._router.watch(self._mailbox.bell, self._errands)
        self._keep_pace(0.0)
        # glibc gives every freed piece back to the kernel, to fault it in again for the next one, until a block as
        # large as this has been freed once: a third of a stream's time here. Nothing of it is touched.
        bytearray(LARGE)
        router, streaming = self._router, self._streaming
        while True:
            if streaming and not router.waiting():
                self._stream(streaming.popleft())
            else:
                router.turn(self._pause)
            now = time.monotonic()
            if now >= self._next_tick:
                self._tick(now)

    def _tick(self, now: float) -> None:
        self._readers.check()
        for peer in [peer for peer in self._peers.values() if now - peer.heard > SILENT_SECONDS]:
            self._forget(peer)
        for peer in self._sender.flush():
            self._enqueue(peer)
        for peer in self._peers.values():
            if peer.staging is not None and now - peer.heard > STAGING_SILENT_SECONDS:
                peer.unstage()
        self._keep_pace(now)

    def _keep_pace(self, now: float) -> None:
        """Look again sooner while something lies in an outbox."""
        self._pause = RETRY if self._sender.held else TICK
        self._next_tick = now + self._pause

    # --- heard ------------------------------------------------------------------------------------------------------

    def heard(self, name: bytes, message: Words) -> None:
        """A word of the router."""
        if not isinstance(message, bytes):
            refusal = SourceRefusal.of(BadMessage(f"{len(message)} frames came, a supervisor sends one"))
            return self._refuse(self._peers.get(name) or self._stranger(name), refusal)
        peer = self._peers.get(name)
        if peer is None or not self._urgent(peer, message):
            self._hear(name, message)

    def gone(self, name: bytes) -> None:
        """Its connection has ended."""
        peer = self._peers.get(name)
        if peer is not None:
            self._forget(peer)

    def _hear(self, name: bytes, data: bytes) -> None:
        peer = self._peers.get(name) or self._stranger(name)
        peer.heard = time.monotonic()
        try:
            message: Message = decode(data, expect=EXPECTED)
            self._heard[type(message)](peer, message)
            if type(message) is RequestRanges and message.urgent:
                self._learn(peer, message, data)
        except BadMessage as error:
            self._refuse(peer, SourceRefusal.of(error))
        except SourceRefusal as refusal:
            self._refuse(peer, refusal)

    def _stranger(self, name: bytes) -> Peer:
        return Peer(name, SourceConversation(self._offers, self._number, self._features))

    def _errands(self) -> None:
        for errand in self._mailbox.empty():
            try:
                errand()
            except Exception:
                log.exception("bug: an answer could not be sent")

    def _refuse(self, peer: Peer, refusal: SourceRefusal) -> None:
        log.debug("refused %s: %s", refusal.code, refusal)
        self._sender.say(peer, encode(refusal.message()))

    def _ping(self, peer: Peer, message: Ping) -> None:
        self._sender.say(peer, encode(Pong(message.nonce)))

    def _advise(self, peer: Peer, message: Advise) -> None:
        advised, ended = peer.conversation.advise(message)
        for old in ended:
            self._ended(peer, old)
        peer.unstage()  # nobody can tell any more who holds which slot: another one at the next Listen
        self._remember(peer)
        log.info("%s is advised in pages of %d to %s", message.name, message.page_size, peer.name.hex())
        self._sender.say(peer, encode(advised))

    def _listen(self, peer: Peer, message: Listen) -> None:
        stream = peer.conversation.listen(message)
        pusher = peer.pushers.get(stream.number)
        if pusher is None and stream.window:
            pusher = self._push_from(peer, stream)
        if pusher is not None:
            pusher.grant(stream.window)
        if peer.staging is not None and peer.staging.stuck(peer.heard):
            peer.unstage()
        if peer.staging is None and "staging" in stream.features and not peer.outbox:
            self._offer_staging(peer, max(CALM_PIECE, stream.page_size))

    def _complete(self, peer: Peer, message: Complete) -> None:
        stream = peer.conversation.complete(message)
        self._ended(peer, stream)
        if not peer.conversation.streams:
            peer.unstage()
        log.info("%s is complete at %s", stream.offer.name, peer.name.hex())

    def _ended(self, peer: Peer, stream: Stream) -> None:
        for part in [part for part, lane in peer.lanes.items() if lane.stream is stream]:
            del peer.lanes[part]
        pusher = peer.pushers.pop(stream.number, None)
        if pusher is not None:
            pusher.end()

    # --- asked ------------------------------------------------------------------------------------------------------

    def _urgent(self, peer: Peer, data: bytes) -> bool:
        """The common request: as one that was taken before, but for its number and its range, and of one whole page.
        False: it is not; nothing is done about it."""
        lane = peer.lanes.get(stream_part(data))
        number = number_of(data)
        if lane is None or number in (b"", NO_NUMBER) or peer.outbox:
            return False
        offset, length = unpack_range(data, len(data) - RANGE_BYTES)
        stream, talk = lane.stream, peer.conversation
        if (
            length != stream.page_size
            or offset & (length - 1)
            or offset + length > stream.offer.size
            or stream.phase is not Phase.LISTENING
            or talk.open_requests >= MAX_OPEN_REQUESTS
            or talk.open_bytes + length > MAX_OPEN_BYTES
        ):
            return False
        peer.heard = self._urgent_at = time.monotonic()
        try:
            page = lane.read(offset, length)
        except BlockingIOError:
            return False
        except Exception as error:
            parts = self._parts(stream, int.from_bytes(number, "big"), lost_answer(offset, length, reason_of(error)))
        else:
            if type(page) in BYTES and len(page) == length and page != zeros(length):  # type: ignore[arg-type]
                parts = [lane.before + number + lane.between + data[-RANGE_BYTES:] + lane.behind, page]  # type: ignore[list-item]
            else:
                parts = self._parts(stream, int.from_bytes(number, "big"), judged(page, offset, length))
        # It counts as open for no moment, as it would if it were taken at once. If not, then it is the only one such:
        # the outbox holds it, and the next ones go the long way.
        self._send(peer, parts, None)
        return True

    def _request(self, peer: Peer, message: RequestRanges) -> None:
        stream, ranges = peer.conversation.request(message)
        task = Task(peer, stream, message.request, sum([length for _, length in ranges]), urgent=message.urgent)
        read_now = self._read_now[stream.offer.name]
        if message.urgent:
            self._urgent_at = peer.heard
            if read_now is not None:
                return self._answer_now(task, ranges, read_now)
        for offset, length in pieces_of(ranges, self._largest(stream)):
            task.left += 1
            if read_now is None:
                self._read_later(task, offset, length, urgent=message.urgent)
            else:
                peer.pieces.append((task, offset, length))
                self._enqueue(peer)

    def _largest(self, stream: Stream) -> int:
        """Bytes of one piece, now."""
        calm = time.monotonic() - self._urgent_at > CALM_SECONDS
        return max(CALM_PIECE if calm else PIECE, stream.page_size)

    def _learn(self, peer: Peer, message: RequestRanges, data: bytes) -> None:
        """``data`` was taken: requests of the same stream can be ``_urgent``."""
        stream = peer.conversation.streams.get(message.stream)
        if stream is None or len(message.ranges) != RANGE_BYTES or not number_of(data):
            return
        if crashpoints.armed("source.asked", "source.answered"):  # they stand on the long way
            return
        read = self._read_now[stream.offer.name]
        if read is not None:
            peer.lanes[stream_part(data)] = Lane(stream, read, *answer_parts(stream.number))

    def _answer_now(self, task: Task, ranges: Sequence[Range], read_now: Read) -> None:
        """Urgent, and read at once: in as few messages as pieces allow."""
        ready: list[Answer] = []
        weight, task.left = 0, 1  # held open until everything is on its way
        for offset, length in pieces_of(ranges, max(PIECE, task.stream.page_size)):
            if ready and weight + length > PIECE:
                task.left += 1
                self._answer(task, merged(ready))
                ready, weight = [], 0
            try:
                ready.append(self._read(task.stream, read_now, offset, length))
                weight += length
            except BlockingIOError:
                task.left += 1
                self._read_later(task, offset, length, urgent=True)
        if ready:
            self._answer(task, merged(ready))
        else:
            settle(task)

    def _read(self, stream: Stream, read: Read, offset: int, length: int) -> Answer:
        return read_answer(read, offset, length, stream.offer.size, stream.page_size)

    def _answer_one(self, task: Task, offset: int, length: int, read_now: Read) -> None:
        task.left = 1
        try:
            answer = read_answer(read_now, offset, length, task.stream.offer.size, task.stream.page_size)
        except BlockingIOError:
            return self._read_later(task, offset, length, urgent=True)
        self._answer(task, answer)

    def _enqueue(self, peer: Peer) -> None:
        if peer.pieces and not peer.queued:
            peer.queued = True
            self._streaming.append(peer)

    def _stream(self, peer: Peer) -> None:
        """One piece of background, of whoever is next. Who does not take its answers is left out until it does."""
        peer.queued = False
        if peer.outbox or not peer.pieces:
            return
        task, offset, length = peer.pieces.popleft()
        largest = self._largest(task.stream)
        if length > largest:  # somebody has begun to wait since it was asked for
            task.left += 1
            peer.pieces.appendleft((task, offset + largest, length - largest))
            length = largest
        self._enqueue(peer)
        read_now = self._read_now[task.stream.offer.name]
        if read_now is None or task.stream.phase is Phase.ENDED:
            return settle(task)
        try:
            if self._read_staged(task, offset, length):
                return None
            answer = self._read(task.stream, read_now, offset, length)
        except BlockingIOError:
            return self._read_later(task, offset, length, urgent=False)
        return self._answer(task, answer)

    def _read_later(self, task: Task, offset: int, length: int, *, urgent: bool) -> None:
        stream = task.stream
        read = self._sources[stream.offer.name].read

        def read_unless_ended() -> Answer:
            if stream.phase is Phase.ENDED:
                return lost_answer(offset, length, "")
            try:
                return self._read(stream, read, offset, length)
            except BaseException as error:  # SystemExit and its like: not ours, and no reason for a thread to end
                return lost_answer(offset, length, reason_of(error))

        def done(answer: Answer) -> None:
            self._mailbox.post(partial(self._answer, task, answer))

        self._readers.put(Job(read_unless_ended, done, partial(lost_answer, offset, length)), urgent=urgent)

    def _answer(self, task: Task, answer: Answer) -> None:
        if task.stream.phase is Phase.ENDED:  # nobody wants it any more
            return settle(task)
        if not self._put_staged(task, answer):
            self._send(task.peer, self._parts(task.stream, task.request, answer), task)

    def _send(self, peer: Peer, parts: Sequence[Buffer], task: Task | None) -> None:
        self._sender.answer(peer, parts, task)
        if self._sender.held and self._pause != RETRY:
            self._keep_pace(time.monotonic())

    def _parts(self, stream: Stream, request: int, answer: Answer) -> list[Buffer]:
        if "zero" not in stream.features:
            answer = expanded(answer)
        head = encode(Pages(stream.number, request, answer.ranges, answer.kinds, answer.reason))
        return [head, *answer.frames]

    # --- staged -----------------------------------------------------------------------------------------------------

    def _offer_staging(self, peer: Peer, slot_bytes: int) -> None:
        """It is used when the supervisor says that it is open there; where it cannot be made the socket will do."""
        if sum(one.staging is not None for one in self._peers.values()) >= MAX_STAGINGS:
            return
        try:
            peer.staging = Staging(self._number(), slot_bytes)
        except OSError as error:
            log.debug("no staging memory: %s", error.strerror)
        else:
            self._sender.say(peer, encode(peer.staging.offer()))

    def _use_staging(self, peer: Peer, message: UseStaging) -> None:
        if peer.staging is not None and peer.staging.number == message.number:
            peer.staging.used = True
            log.info("background for %s goes through shared memory", peer.name.hex())

    def _read_staged(self, task: Task, offset: int, length: int) -> bool:
        """Read a piece straight into a free slot. False: nothing is done. Raises BlockingIOError."""
        staging, stream = task.peer.staging, task.stream
        read_into = self._read_into[stream.offer.name]
        if staging is None or read_into is None or "staging" not in stream.features:
            return False
        slot = staging.read(read_into, offset, length, stream.offer.size)
        if slot == ZEROS:
            self._answer(task, answer_of(None, offset, length, length))
        elif slot is not None:
            self._send_staged(task, staging, slot, offset, length)
        return slot is not None

    def _put_staged(self, task: Task, answer: Answer) -> bool:
        """Copy what was read in another way into a free slot. False: nothing is done."""
        staging = task.peer.staging
        if (
            staging is None
            or task.urgent
            or answer.kinds != KIND[RangeKind.DATA]
            or "staging" not in task.stream.features
        ):
            return False
        offset, length = unpack_range(answer.ranges, 0)
        slot = staging.free_slot(length)
        if slot >= 0:
            staging.put(slot, answer.frames[0])
            self._send_staged(task, staging, slot, offset, length)
        return slot >= 0

    def _send_staged(self, task: Task, staging: Staging, slot: int, offset: int, length: int) -> None:
        staging.fill(slot)
        staged = Staged(task.stream.number, task.request, offset, length, staging.number, slot)
        self._send(task.peer, (encode(staged),), task)

    # --- pushed -----------------------------------------------------------------------------------------------------

    def _push_from(self, peer: Peer, stream: Stream) -> PushStream | None:
        listening = getattr(self._sources[stream.offer.name], "listening", None)
        if listening is None:
            return None
        self._pushing = {thread for thread in self._pushing if thread.is_alive()}
        if len(self._pushing) >= MAX_PUSHING:
            log.warning("%d threads push already: %s is not pushed", MAX_PUSHING, stream.offer.name)
            return None

        def send(answer: Answer) -> None:
            self._mailbox.post(partial(self._pushed, peer, stream, answer))

        pusher = PushStream(stream.offer.size, stream.page_size, send)
        thread = threading.Thread(target=_push, args=(listening, pusher), name="pusher", daemon=True)
        peer.pushers[stream.number] = pusher
        self._pushing.add(thread)
        thread.start()
        return pusher

    def _pushed(self, peer: Peer, stream: Stream, answer: Answer) -> None:
        if stream.phase is Phase.LISTENING:
            self._send(peer, self._parts(stream, 0, answer), None)

    # --- who is there -----------------------------------------------------------------------------------------------

    def _remember(self, peer: Peer) -> None:
        if peer.name not in self._peers and len(self._peers) >= MAX_PEERS:
            self._forget(min(self._peers.values(), key=lambda one: one.heard))
        self._peers[peer.name] = peer

    def _forget(self, peer: Peer) -> None:
        """It is told so when it speaks again: out of phase."""
        if self._peers.pop(peer.name, None) is not None:
            log.info("the supervisor %s is gone", peer.name.hex())
        abandon(peer)


def _push(listening: Callable[[PushStream], None], pusher: PushStream) -> None:
    try:
        listening(pusher)
    except StreamEnded:
        pass
    except BaseException:  # not ours: pages that are not pushed will be asked for
        log.exception("listening of a source failed")
