"""The link to one page source program: phases of the conversation, loss and return of the source. No socket, no clock.

    state      event                                            next
    ADVISING   every block is advised                           UP
    UP         silence for ``patience``, or a refusal that      PAUSED
               says "unknown peer" (UNKNOWN_PEER_CODES)
    ADVISING   silence, where a predecessor knew the source     PAUSED
    PAUSED     every block is advised again                     UP

A source that comes back, or another program at its endpoint, is the same source if size and identity of every block are
the same. Otherwise it is refused and the link stays as it is.

ZeroMQ may deliver what is sent to an absent peer later, all at once. So an absent source is sent only Pings, and only
their Pong brings an Advise: several Advises would each end the stream of the one before. While the link is up, each
Ping comes with a Listen for every stream. It renews the window of pushed pages, and a source that was restarted in
between, which would answer the Ping, refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from postcopy_protocol import counters, return_path, stages
from postcopy_protocol.codec import encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.templates import REQUEST_LIMIT, MessageTemplates

from ..event_log import RecordEvent
from .flow_control import Effect, FlowControl, GiveUp, Limits, RangeRequest
from .ports import LinkOwner, SendToSource

ADVISE_SECONDS = 1.0
PING_SECONDS = 1.0
FIRST_PING_SECONDS = 0.02
FIRST_PINGS = 50  # frequent at the start: the connection may not exist yet, and clients of a predecessor may be waiting
REFUSALS = 16  # different refusals that are reported between two times of being up
PUSH_WINDOW = 8 << 20
UNKNOWN_PEER_CODES = ("out-of-phase", "bad-range", "bad-message")


class LinkState(StrEnum):
    ADVISING = "advising"
    UP = "up"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class AdvisedBlock:
    """One block at this source: our number, its name there, its geometry, and what its first source said of it."""

    block: int
    name: str
    page_size: int
    size: int
    identity: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """Checked pages that have come: (offset, length, kind, frame number) each; ``reason`` for the lost ones."""

    block: int
    ranges: Sequence[tuple[int, int, int, int]]
    reason: str


class SourceLink:
    """One source: its state, its flow control, and the requests by the answer that is expected."""

    def __init__(
        self,
        endpoint: str,
        blocks: Sequence[AdvisedBlock],
        patience: float,
        send: SendToSource,
        event: RecordEvent,
        owner: LinkOwner,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        """``patience``: seconds of silence after which the source is lost."""
        self.endpoint = endpoint
        self.state = LinkState.ADVISING
        self.inherited = False  # a predecessor knew this source: silence from the start on is a loss
        self.flow = FlowControl(limits)
        self.counters = [0] * counters.WORDS
        self.stages = {block.block: stages.scratch() for block in blocks}
        """By block: how long its pages took to arrive and to be placed (see ``postcopy_protocol.stages``)."""
        self.requests = self.pages = self.bytes = 0
        self.progress: return_path.Progress | None = None  # of a source that pages are still coming to
        self.send = send
        self.templates: dict[int, MessageTemplates] = {}  # by block, while it has a stream
        self.answers: dict[bytes, RangeRequest] = {}  # requests by the head of the answer that is expected
        self.silent_since: float | None = None  # when the first Ping was sent that nothing followed
        self._advised = {block.block: block for block in blocks}
        self._streams: dict[int, int] = {}  # block: number of its stream at the source
        self._blocks: dict[int, int] = {}  # and back
        self._patience, self._event, self._owner = patience, event, owner
        self._advised_at = self._pinged_at = -1e9
        self._nonce = self._nonce_old = 0  # a Pong up to the second is from before the loss, or the last Advise
        self._probe = 0  # of the Ping that measures the link
        self._complete: set[int] = set()
        self._refused: set[str] = set()

    @property
    def shown(self) -> str:
        """``up``, ``paused`` (it was there), or ``lost`` (not heard of since the start)."""
        return "lost" if self.state is LinkState.ADVISING else self.state.value

    @property
    def pings_often(self) -> bool:
        """Is it at its start, where ``tick`` is due every FIRST_PING_SECONDS?"""
        return self.state is LinkState.ADVISING and self._nonce < FIRST_PINGS

    @property
    def finished(self) -> bool:
        """Are all its blocks complete?"""
        return len(self._complete) == len(self._advised)

    def request(self, client: int, block: int, offset: int, length: int, now: float) -> None:
        """Request a range, now or when the source is back."""
        request = self.flow.send(client, block, offset, length, now)
        if request is not None:
            self._send_request(request)
        else:
            self._do(self.flow.request(client, block, offset, length, now))

    def promote(self, client: int, block: int, offset: int, length: int, now: float) -> bool:
        """A client waits for what is requested already. Was it requested once more, to come before that?"""
        effects = self.flow.promote(client, block, offset, length, now)
        self._do(effects)
        return bool(effects)

    def hold(self, held: bool, now: float) -> None:
        """Send no requests while ``held``; then all that have waited."""
        self._do(self.flow.hold(held, now))

    def complete(self, block: int) -> None:
        """Nothing more will be requested of this block."""
        self._complete.add(block)
        stream = self._streams.get(block)
        if stream is not None and self.state is LinkState.UP:
            self._send_message(return_path.Complete(stream))

    def use_staging(self, number: int) -> None:
        """The staging memory of this number is open."""
        self._send_message(return_path.UseStaging(number))

    def tick(self, now: float) -> None:
        """Notice silence, ping, and send again what was not answered."""
        silent = self.silent_since
        known = self.state is LinkState.UP or (self.inherited and self.state is LinkState.ADVISING)
        if known and silent is not None and now - silent > self._patience:
            self._pause(f"nothing heard for {self._patience:g} s")
        if now - self._pinged_at >= (FIRST_PING_SECONDS if self.pings_often else min(PING_SECONDS, self._patience / 2)):
            self.ping(now)
        self._do(self.flow.tick(now))
        if len(self.answers) > 2 * self.flow.in_flight + 16:  # of what was sent again, or answered in another form
            for answer, request in list(self.answers.items()):
                if self.flow.outstanding.get(request.number) is not request:
                    del self.answers[answer]

    def completed(self, request: RangeRequest, now: float) -> None:
        """All of a request came at ``now`` in the expected form, and has been placed."""
        self._count(request.block, request.length, request.length)
        self._took(request.block, now - request.sent)
        effects = self.flow.completed(request, now)
        if effects:
            self._do(effects)

    def on_message(self, message: Message, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        """Handle a message of the source; returns pages that have come. Raises BadMessage for one that breaks the
        protocol."""
        match message:
            case return_path.Pages():
                return self._on_pages(message, frame_lengths, now)
            case return_path.Advised():
                self._on_advised(message, now)
                self.silent_since = None
            case return_path.Pong():
                self.silent_since = None
                if message.nonce == self._probe:
                    self._probe = 0
                    self.flow.pong(now)
                if self.state is not LinkState.UP and message.nonce > self._nonce_old:
                    self._advise(now)
            case return_path.SourceRefused():
                self._on_refused(message, now)
            case return_path.Held(stream, request):
                self.silent_since = None
                if stream in self._blocks:
                    self.flow.source_waits(request, self._blocks[stream], now)
            case return_path.Progress():
                return_path.check_progress(message)
                self.silent_since, self.progress = None, message
                self.flow.filling = message.received < message.size
        return None

    def on_staged(self, message: return_path.Staged, slot_bytes: int, now: float) -> Arrived | None:
        """Pages that lie in a slot; None for those of an old stream. Raises BadMessage as ``on_message``."""
        block = self._blocks.get(message.stream)
        if block is None:
            return None
        return_path.check_staged(message, slot_bytes, self._advised[block].page_size, self._advised[block].size)
        self._count(block, message.length, message.length)
        self._on_answer(message.request, block, [(message.offset, message.length)], now)
        return Arrived(block, ((message.offset, message.length, return_path.RangeKind.DATA, 0),), "")

    def _on_pages(self, message: return_path.Pages, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        block = self._blocks.get(message.stream)
        if block is None:
            return None  # a late answer, from before a recover
        ranges = return_path.check_pages(
            message, frame_lengths, self._advised[block].page_size, self._advised[block].size
        )
        self._count(block, sum(length for _, length, _, _ in ranges), sum(frame_lengths))
        self._on_answer(message.request, block, [(offset, length) for offset, length, _, _ in ranges], now)
        return Arrived(block, ranges, message.reason)

    def _on_answer(self, number: int, block: int, ranges: Sequence[tuple[int, int]], now: float) -> None:
        effects, took = self.flow.answered(number, block, ranges, now)
        if took:
            self._took(block, took)
        self._do(effects)

    def _count(self, block: int, length: int, sent: int) -> None:
        """Pages have come; ``sent``: their bytes on the wire."""
        self.silent_since = None
        self.pages += length // self._advised[block].page_size
        self.bytes += sent

    def _took(self, block: int, seconds: float) -> None:
        at = counters.bucket(int(seconds * 1e9))
        self.counters[at] += 1
        self.stages[block][at + stages.ARRIVED] += 1

    def _on_advised(self, message: return_path.Advised, now: float) -> None:
        block = next((block for block in self._advised.values() if block.name == message.name), None)
        if block is None:
            raise BadMessage(f"the source offers a block {message.name} that was not requested")
        if (message.size, message.identity) != (block.size, block.identity):
            return self._report_refusal(
                f"block {message.name} is another one now: {message.size} bytes of {message.identity}, "
                f"it was {block.size} bytes of {block.identity}"
            )
        if block.block in self._streams or message.stream in self._blocks:
            raise BadMessage(f"the source advises block {message.name} again, unasked")
        self._streams[block.block], self._blocks[message.stream] = message.stream, block.block
        self.templates[block.block] = MessageTemplates(message.stream)
        # A block that was complete before this source came (back) must not be pushed again.
        done = block.block in self._complete
        self._send_message(
            return_path.Complete(message.stream) if done else return_path.Listen(message.stream, PUSH_WINDOW)
        )
        if self.state is not LinkState.UP and len(self._streams) == len(self._advised):
            self._resume(now)

    def _resume(self, now: float) -> None:
        """Every block is advised."""
        again, self.state = self.state is LinkState.PAUSED, LinkState.UP
        self._refused.clear()
        kind, text = ("recover", "back") if again else ("source", "there")
        self._event(kind, f"source {self.endpoint} is {text}", source=self.endpoint)
        if again:
            self._owner.source_back(self._advised)
        self._do(self.flow.found_source(now))

    def _on_refused(self, message: return_path.SourceRefused, now: float) -> None:
        if message.code not in UNKNOWN_PEER_CODES:
            why = f"source {self.endpoint} refuses ({message.code}) {message.name}: {message.reason}"
            self._report_refusal(why)
        elif self.state is LinkState.UP:  # else it answers what was sent before the loss was noticed
            self._pause(f"it does not know us: {message.reason}")
            self._advise(now)

    def _report_refusal(self, why: str) -> None:
        if why not in self._refused and len(self._refused) < REFUSALS:  # it is asked every second, reported once
            self._refused.add(why)
            self._event("source-refused", why, source=self.endpoint, cause=why)

    def _send_message(self, message: Message) -> None:
        self.send(encode(message))

    def _send_request(self, request: RangeRequest) -> None:
        self.requests += 1
        number, block, offset, length = request.number, request.block, request.offset, request.length
        urgent = request.urgent
        if number < REQUEST_LIMIT:
            message, answer = self.templates[block].request(number, offset, length, urgent)
            self.answers[answer] = request
            self.send(message)
        else:
            self._send_message(
                return_path.RequestRanges(
                    number, self._streams[block], urgent, return_path.pack_ranges([(offset, length)])
                )
            )

    def ping(self, now: float) -> None:
        """Ask whether the source is there and knows us; also at once when there is a new connection."""
        self._pinged_at = now
        if self.silent_since is None:
            self.silent_since = now
        self._nonce += 1
        self._send_message(return_path.Ping(self._nonce))
        if self.state is LinkState.UP:
            for block, stream in self._streams.items():
                if block not in self._complete:
                    self._send_message(return_path.Listen(stream, PUSH_WINDOW))

    def probe(self, now: float) -> None:
        """Measure what an urgent answer has before it, where that is due (link_pace.py)."""
        if self.flow.probe(now):
            self._nonce += 1
            self._probe = self._nonce
            self._send_message(return_path.Ping(self._nonce))

    def _advise(self, now: float) -> None:
        if now - self._advised_at < ADVISE_SECONDS:
            return
        # A slow source answers in order: only the Pong of a Ping that follows means that this Advise was not received.
        # One more would end the stream of this one, and requests in between would be refused.
        self._advised_at, self._nonce_old = now, self._nonce
        for block in self._advised.values():
            if block.block not in self._streams:
                self._send_message(
                    return_path.Advise(block.name, block.page_size, return_path.features_at(self.endpoint))
                )

    def _pause(self, why: str) -> None:
        self.state = LinkState.PAUSED
        self._nonce_old, self._pinged_at, self._probe = self._nonce, -1e9, 0
        for book in (self._streams, self._blocks, self.templates, self.answers):
            book.clear()
        self.flow.lost_source()
        text = f"source {self.endpoint} is lost: {why}; what is missing waits"
        self._event("pause", text, source=self.endpoint, cause=why)
        self._owner.source_lost(self._advised)

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case RangeRequest():
                    self._send_request(effect)
                case GiveUp(request):
                    self._owner.gave_up(request)
