"""The loop of a page source: one thread, one router, urgent before background; no source's error stops it.

The thread waits in a turn of the router. Nothing is sent blocking: a supervisor that does not accept its answers gets
an outbox. Its requests count as open as long as their answers are there, so what it may have open also bounds what it
can make this program keep.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from postcopy_kernel import crashpoints
from postcopy_kernel.log_queue import about
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FROM_SUPERVISOR,
    Advise,
    Complete,
    Listen,
    Ping,
    Pong,
    Progress,
    RequestRanges,
    UseStaging,
)
from postcopy_protocol.source_conversation import Offer, Phase, SourceConversation, SourceRefusal, Stream
from postcopy_protocol.zmtp import Message as Frames
from postcopy_wire.transport import GoneHandler, MessageHandler, Router

from .answering import CALM_PIECE, Answerer
from .answers import Answer
from .call_queue import CallQueue
from .connection import Connection, Sender
from .pushing import Pushers, PushStream
from .readers import Readers
from .source import PageSource
from .staging import Staging

EXPECTED = frozenset(FROM_SUPERVISOR)
MAX_CONNECTIONS = 256  # supervisors that are remembered; beyond it a new one takes the place of one that is quiet
QUIET_SECONDS = 10.0  # a supervisor pings every second
SILENT_SECONDS = 600.0
"""A supervisor that has been silent for so long is forgotten: they ping every second. A connection that breaks while
nothing is sent is not reported, and a thread that pushes to it would wait forever for its window."""
MOST_REFUSED = 16  # messages of a supervisor; beyond it the router reads it as it reads newcomers
MAX_STAGINGS = 16  # supervisors that have a staging memory; the others get everything over their sockets
STAGING_SILENT_SECONDS = 10.0  # a supervisor that has been silent for so long needs no staging memory
LARGE = 31 << 20  # bytes; just below the largest that glibc (any, 64 bit) learns its threshold from
TICK = 0.25  # seconds between looks at reads that hang
RETRY = 0.005  # ... and at outboxes that are not empty.

log = logging.getLogger(__name__)

RouterOpener = Callable[[MessageHandler, GoneHandler], Router]
"""Opens the router whose messages the loop receives. Raises PostcopyError."""


class Feed(Protocol):
    """What brings the pages of sources that have ``when_ready``. It must not raise."""

    def start(self, router: Router) -> object:
        """Watch descriptors from now on."""

    def tick(self, now: float) -> object:
        """Look at what nothing reports; called every TICK."""

    def progress(self) -> Progress:
        """How far it is; supervisors are informed when it has changed."""


class Loop:
    """Serves ``sources`` to supervisors, until a signal raises an exception in its thread. ``features`` are those that
    supervisors may have; ``feed`` receives what the sources wait for, in the same thread."""

    def __init__(
        self,
        sources: Mapping[str, tuple[PageSource, Offer]],
        open_router: RouterOpener,
        calls: CallQueue,
        readers: Readers,
        features: Sequence[str],
        feed: Feed | None = None,
    ) -> None:
        self.connections: dict[bytes, Connection] = {}
        """Supervisors that have sent an Advise, by the router's name of them."""
        self._sources = {name: source for name, (source, _) in sources.items()}
        self._offers = {name: offer for name, (_, offer) in sources.items()}
        self._features = features
        self._router = open_router(self.on_message, self.on_gone)
        self._calls = calls
        self._readers = readers
        self.sender = Sender(self._router, self._forget)
        self.answerer = Answerer(self._sources, self.sender, calls, readers)
        self._pushers = Pushers()
        # Numbers that an earlier life of this source has not used: late answers must not fit (return_path.py).
        self._number = itertools.count(secrets.randbits(40) + 1).__next__
        self._feed = feed
        self._noted: dict[bytes, bytes] = {}  # by supervisor: the Progress that it has
        self._request = crashpoints.around("source.asked", self.answerer.request, "source.answered")

    def run(self) -> None:
        """Never returns."""
        self._router.watch(self._calls.wakeup, self._run_calls)
        if self._feed is not None:
            self._feed.start(self._router)
        # glibc returns every freed piece to the kernel and faults it in again for the next one, until a block as large
        # as this has been freed once: a third of a stream's time here. Nothing of it is touched.
        bytearray(LARGE)
        router, streaming, held = self._router, self.answerer.streaming, self.sender.held
        ticked = time.monotonic()
        while True:
            if streaming and not router.waiting():
                self.answerer.stream_next()
            else:
                router.turn(RETRY if held else TICK)
            now = time.monotonic()
            if now - ticked >= (RETRY if held else TICK):
                ticked = now
                self.tick(now)

    def tick(self, now: float) -> None:
        """Look at what nothing reports: reads that hang, supervisors that are silent, outboxes."""
        self._readers.check()
        self.answerer.note_held(now)
        for connection in [one for one in self.connections.values() if now - one.last_message_at > SILENT_SECONDS]:
            self._forget(connection)
        if self._feed is not None:
            self._feed.tick(now)
            self._note_progress()
        for connection in self.sender.flush():
            self.answerer.enqueue(connection)
        for connection in self.connections.values():
            if connection.staging is not None and now - connection.last_message_at > STAGING_SILENT_SECONDS:
                connection.unstage()

    def _note_progress(self) -> None:
        assert self._feed is not None
        message = encode(self._feed.progress())
        for name, connection in list(self.connections.items()):  # one that does not read is forgotten
            listening = [one for one in connection.conversation.streams.values() if one.phase is Phase.LISTENING]
            if self._noted.get(name) != message and any("progress" in one.features for one in listening):
                self._noted[name] = message
                self.sender.send_note(connection, message)

    def _run_calls(self) -> None:
        for call in self._calls.take():
            try:
                call()
            except Exception:
                log.exception("bug: an answer could not be sent")

    def on_message(self, name: bytes, message: Frames) -> None:
        """Handle a message of the router. Most are RequestRanges like one before: ``Answerer.answer_fast``."""
        connection = self.connections.get(name)
        if not isinstance(message, bytes):
            refusal = SourceRefusal.of(BadMessage(f"{len(message)} frames came, a supervisor sends one"))
            return self._refuse(connection or self._unknown(name), refusal)
        if connection is None or not self.answerer.answer_fast(connection, message):
            self.on_data(name, message)

    def on_gone(self, name: bytes) -> None:
        """The connection of a peer has ended."""
        connection = self.connections.get(name)
        if connection is not None:
            self._forget(connection)

    def on_data(self, name: bytes, data: bytes) -> None:
        """Decode a message and handle it, or refuse it."""
        connection = self.connections.get(name) or self._unknown(name)
        connection.last_message_at = time.monotonic()
        try:
            message: Message = decode(data, expect=EXPECTED)
            match message:
                case RequestRanges():
                    self._request(connection, message)
                    if message.urgent:
                        self.answerer.learn(connection, message, data)
                case Ping(nonce):
                    self.sender.send_note(connection, encode(Pong(nonce)))
                case Listen():
                    self._listen(connection, message)
                case Advise():
                    self._advise(connection, message)
                case Complete():
                    self._complete(connection, message)
                case UseStaging(number):
                    self._use_staging(connection, number)
        except BadMessage as error:
            self._refuse(connection, SourceRefusal.of(error))
        except SourceRefusal as refusal:
            self._refuse(connection, refusal)

    def _unknown(self, name: bytes) -> Connection:
        """A peer that has not sent an Advise."""
        return Connection(name, SourceConversation(self._offers, self._number, self._features))

    def _refuse(self, connection: Connection, refusal: SourceRefusal) -> None:
        log.debug("refused %s: %s", refusal.code, refusal, extra=about("refused", connection.name.hex()))
        self.sender.send_note(connection, encode(refusal.message()))
        connection.refused += 1
        if connection.refused == MOST_REFUSED:
            self._router.trust(connection.name, False)

    def _advise(self, connection: Connection, message: Advise) -> None:
        advised, ended = connection.conversation.advise(message)
        self._remember(connection)
        if connection.refused < MOST_REFUSED:
            self._router.trust(connection.name)
        for old in ended:
            connection.end_stream(old)
        self._noted.pop(connection.name, None)
        connection.unstage()  # messages about its slots may be in flight: another one is offered at the next Listen
        who = connection.name.hex()
        log.info(
            "%s is advised in pages of %d to %s", message.name, message.page_size, who, extra=about("advised", who)
        )
        self.sender.send_note(connection, encode(advised))

    def _listen(self, connection: Connection, message: Listen) -> None:
        stream = connection.conversation.listen(message)
        if self._feed is not None:
            self._note_progress()
        pusher = connection.pushers.get(stream.number)
        if pusher is None and stream.window:
            pusher = self._push_from(connection, stream)
        if pusher is not None:
            pusher.grant(stream.window)
        if connection.staging is not None and connection.staging.stuck(connection.last_message_at):
            connection.unstage()
        if connection.staging is None and "staging" in stream.features and not connection.outbox:
            self._offer_staging(connection, max(CALM_PIECE, stream.page_size))

    def _complete(self, connection: Connection, message: Complete) -> None:
        stream = connection.conversation.complete(message)
        connection.end_stream(stream)
        if not connection.conversation.streams:
            connection.unstage()
        who = connection.name.hex()
        log.info("%s is complete at %s", stream.offer.name, who, extra=about("complete", who))

    def _offer_staging(self, connection: Connection, slot_bytes: int) -> None:
        """It is used when the supervisor says that it has opened it. Without memory for it the socket is used."""
        if sum(one.staging is not None for one in self.connections.values()) >= MAX_STAGINGS:
            return
        try:
            connection.staging = Staging(self._number(), slot_bytes)
        except OSError as error:
            log.debug("no staging memory: %s", error.strerror)
        else:
            self.sender.send_note(connection, encode(connection.staging.offer()))

    def _use_staging(self, connection: Connection, number: int) -> None:
        if connection.staging is not None and connection.staging.number == number:
            connection.staging.used = True
            who = connection.name.hex()
            log.info("background for %s goes through shared memory", who, extra=about("staging", who))

    def _push_from(self, connection: Connection, stream: Stream) -> PushStream | None:
        listening = getattr(self._sources[stream.offer.name], "listening", None)
        if listening is None:
            return None

        def send(answer: Answer) -> None:
            self._calls.call_soon(partial(self.answerer.answer_unasked, connection, stream, answer))

        pusher = PushStream(stream.offer.size, stream.page_size, send)
        if not self._pushers.start(stream.offer.name, listening, pusher):
            return None
        connection.pushers[stream.number] = pusher
        return pusher

    def _remember(self, connection: Connection) -> None:
        """Raises SourceRefusal: those that are here stay, whichever others come."""
        if connection.name not in self.connections and len(self.connections) >= MAX_CONNECTIONS:
            quiet = min(self.connections.values(), key=lambda one: one.last_message_at)
            if connection.last_message_at - quiet.last_message_at < QUIET_SECONDS:
                raise SourceRefusal("limit", f"this source serves {MAX_CONNECTIONS} supervisors already")
            self._forget(quiet)
        self.connections[connection.name] = connection

    def _forget(self, connection: Connection) -> None:
        """When it speaks again it is refused as out of phase, and begins with Advise."""
        self._noted.pop(connection.name, None)
        if self.connections.pop(connection.name, None) is not None:
            who = connection.name.hex()
            log.info("the supervisor %s is gone", who, extra=about("gone", who))
        connection.abandon()
