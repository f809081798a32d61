"""The link to one page source program: the phases of the conversation, its loss and its return.

    advising --all blocks advised--> up --silence, or a refusal that says "I do not know you"--> paused --advised--> up

No socket is here: words go out through ``send``, encoded, and come in through ``heard``; pages that come as they were
asked for come in through ``expected`` (express.py in the protocol wing says why). A source that comes back at the
endpoint, or another one there, is the same source if size and identity of every block are the same; else it is
refused, and we wait on.

What is said while nobody is there may be delivered later (ZeroMQ keeps it), all at once. So nothing but Ping is said
then, and only its Pong brings an Advise: Advises that pile up would each end the stream of the one before. While the
link is up, a Listen for every stream goes with the Ping: it renews the window of pushed pages, and a source that was
started anew in between, which would answer the Ping, refuses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postcopy_protocol import counters, stages
from postcopy_protocol.codec import encode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    Advise,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RangeKind,
    RequestRanges,
    SourceRefused,
    Staged,
    UseStaging,
    check_pages,
    check_staged,
    features_at,
    pack_ranges,
)
from postcopy_protocol.templates import REQUEST_LIMIT, MessageTemplates

from ..observe.event_log import Tell
from .flow_control import Effect, FlowControl, GiveUp, RangeRequest, Send

log = logging.getLogger(__name__)

ADVISE_SECONDS = 1.0
PING_SECONDS = 1.0
FIRST_PING_SECONDS = 0.02
FIRST_PINGS = 50
"""At the start the connection may not stand yet, and clients of a supervisor before us may be waiting."""
REFUSALS = 16
"""Refusals that are told between two times of being up."""
PUSH_WINDOW = 16 << 20
STRANGERS_WORDS = ("out-of-phase", "bad-range", "bad-message")


@dataclass(frozen=True, slots=True)
class Stream:
    """One block at this source: our number of it, its name there, its geometry, and what its first source said."""

    block: int
    name: str
    page_size: int
    size: int
    identity: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """Pages that have come: (offset, length, kind, frame number) each, checked; ``reason`` for the lost ones."""

    block: int
    ranges: Sequence[tuple[int, int, int, int]]
    reason: str


class SourceLink:
    """One source. ``event`` is told of every change of state; ``gave_up`` of ranges that never came."""

    def __init__(
        self,
        endpoint: str,
        streams: Sequence[Stream],
        patience: float,
        send: Callable[[bytes], object],
        event: Tell,
        gave_up: Callable[[int, int, int], None],
    ) -> None:
        self.endpoint = endpoint
        self.state = "advising"
        self.inherited = False
        """A supervisor before us knew this source: silence from the start on is a loss."""
        self.flow = FlowControl()
        self.words = [0] * counters.WORDS
        self.stages = {stream.block: stages.scratch() for stream in streams}
        """By block: how long its pages took to arrive, and then to be placed (see ``postcopy_protocol.stages``)."""
        self.requests = self.pages = self.bytes = 0
        self._streams = {stream.block: stream for stream in streams}
        self._numbers: dict[int, int] = {}  # block: the source's number of its stream
        self._blocks: dict[int, int] = {}  # and back
        self.templates: dict[int, MessageTemplates] = {}
        self.answers: dict[bytes, RangeRequest] = {}  # by the answer that is expected
        self._patience = patience
        self.say = send
        self._event = event
        self._gave_up = gave_up
        self._advised_at = self._pinged_at = -1e9
        self.silent_since: float | None = None  # when the first Ping was sent that nothing followed
        self._nonce = self._nonce_old = 0  # a Pong up to the second is from before the loss, or the last Advise
        self._complete: set[int] = set()
        self._refused: set[str] = set()

    @property
    def shown(self) -> str:
        """``up``, ``paused`` (it was there), or ``lost`` (not heard of since the start)."""
        return {"up": "up", "paused": "paused"}.get(self.state, "lost")

    @property
    def hurries(self) -> bool:
        """Is it about to meet its source, and to be asked for a tick every FIRST_PING_SECONDS?"""
        return self.state == "advising" and self._nonce < FIRST_PINGS

    # --- wishes -------------------------------------------------------------------------------------------------------

    def wish(self, client: int, block: int, offset: int, length: int, now: float) -> None:
        """Ask for a range, now or when the source is back."""
        wish = self.flow.launch(client, block, offset, length, now)
        if wish is not None:
            self._ask(wish, True)
        else:
            self._do(self.flow.wish(client, block, offset, length, now))

    def promote(self, client: int, block: int, offset: int, length: int, now: float) -> None:
        """A client waits for what was asked for already."""
        self._do(self.flow.promote(client, block, offset, length, now))

    def complete(self, block: int) -> None:
        """Nothing more will be asked of this block."""
        self._complete.add(block)
        number = self._numbers.get(block)
        if number is not None and self.state == "up":
            self._send(Complete(number))

    @property
    def finished(self) -> bool:
        """Is every block of it complete?"""
        return len(self._complete) == len(self._streams)

    def use_staging(self, number: int) -> None:
        """The staging memory of this number is open."""
        self._send(UseStaging(number))

    def met(self, now: float) -> None:
        """There is a connection, where there was none: whoever is there is asked at once whether it knows us."""
        self._ping(now)

    def tick(self, now: float) -> None:
        silent = self.silent_since
        met = self.state == "up" or (self.inherited and self.state == "advising")
        if met and silent is not None and now - silent > self._patience:
            self._pause(f"nothing heard for {self._patience:g} s")
        if now - self._pinged_at >= (FIRST_PING_SECONDS if self.hurries else min(PING_SECONDS, self._patience / 2)):
            self._ping(now)
        self._do(self.flow.tick(now))
        if len(self.answers) > 2 * self.flow.in_flight + 16:  # of what was asked again, or answered in another form
            for answer, wish in list(self.answers.items()):
                if self.flow.outstanding.get(wish.request) is not wish:
                    del self.answers[answer]

    # --- what the source says -----------------------------------------------------------------------------------------

    def expected(self, head: bytes, length: int) -> RangeRequest | None:
        """Is this the head of an answer just as it was expected, with one frame of ``length`` bytes behind it? Then the
        wish; its bytes are to be placed, and ``landed`` is to be called. None: nothing is known of it; ``decode`` and
        ``heard`` are to judge it."""
        wish = self.answers.pop(head, None)
        # Asked again under another number, or the source was lost: the pages are good, but they are not this wish's.
        if wish is None or wish.length != length or self.flow.outstanding.get(wish.request) is not wish:
            return None
        return wish

    def landed(self, wish: RangeRequest, now: float) -> None:
        """What was ``expected`` has come at ``now``, and has been placed."""
        self.silent_since = None
        self.pages += wish.length // self._streams[wish.block].page_size
        self.bytes += wish.length
        self._took(wish.block, now - wish.sent)
        effects = self.flow.landed(wish, now)
        if effects:
            self._do(effects)

    def heard(self, message: Message, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        """Take a word of the source; gives pages that have come. Raises BadMessage on words that are not in order."""
        match message:
            case Pages():
                return self._pages(message, frame_lengths, now)
            case Advised():
                self._advised(message, now)
                self.silent_since = None
            case Pong():
                self.silent_since = None
                if self.state != "up" and message.nonce > self._nonce_old and self._may_advise(now):
                    self._advise(now)
            case SourceRefused():
                self._was_refused(message, now)
        return None

    def _pages(self, message: Pages, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        block = self._blocks.get(message.stream)
        if block is None:
            return None  # a late answer, from before a recover
        stream = self._streams[block]
        ranges = check_pages(message, frame_lengths, stream.page_size, stream.size)
        self.silent_since = None
        length = sum(length for _, length, _, _ in ranges)
        self.pages += length // stream.page_size
        self.bytes += sum(frame_lengths)
        effects, took = self.flow.answered(message.request, block, [(at, size) for at, size, _, _ in ranges], now)
        if took:
            self._took(block, took)
        self._do(effects)
        return Arrived(block, ranges, message.reason)

    def _took(self, block: int, seconds: float) -> None:
        word = counters.bucket(int(seconds * 1e9))
        self.words[word] += 1
        self.stages[block][word + stages.ARRIVED] += 1

    def staged(self, message: Staged, slot_bytes: int, now: float) -> Arrived | None:
        """Pages that lie in a slot; None for those of an old stream. Raises BadMessage on what is not in order."""
        block = self._blocks.get(message.stream)
        if block is None:
            return None
        stream, offset, length = self._streams[block], message.offset, message.length
        check_staged(message, slot_bytes, stream.page_size, stream.size)
        self.silent_since = None
        self.pages += length // stream.page_size
        self.bytes += length
        effects, took = self.flow.answered(message.request, block, ((offset, length),), now)
        if took:
            self._took(block, took)
        self._do(effects)
        return Arrived(block, ((offset, length, RangeKind.DATA, 0),), "")

    def _advised(self, message: Advised, now: float) -> None:
        stream = next((stream for stream in self._streams.values() if stream.name == message.name), None)
        if stream is None:
            raise BadMessage(f"the source offers a block {message.name} that was not asked for")
        if (message.size, message.identity) != (stream.size, stream.identity):
            return self._refuse_source(
                f"block {message.name} is another one now: {message.size} bytes of {message.identity}, "
                f"it was {stream.size} bytes of {stream.identity}"
            )
        if stream.block in self._numbers or message.stream in self._blocks:
            raise BadMessage(f"the source advises block {message.name} again, unasked")
        self._numbers[stream.block], self._blocks[message.stream] = message.stream, stream.block
        self.templates[stream.block] = MessageTemplates(message.stream)
        # What is complete was so before this source came, or came back: it is not to push it all again.
        done = stream.block in self._complete
        self._send(Complete(message.stream) if done else Listen(message.stream, PUSH_WINDOW))
        if self.state != "up" and len(self._numbers) == len(self._streams):
            again, self.state = self.state == "paused", "up"
            self._refused.clear()
            self._event("recover" if again else "source", f"source {self.endpoint} is {'back' if again else 'there'}")
            self._do(self.flow.found_source(now))

    def _was_refused(self, message: SourceRefused, now: float) -> None:
        why = f"source {self.endpoint} refuses ({message.code}) {message.name}: {message.reason}"
        if message.code in STRANGERS_WORDS:
            if self.state != "up":
                return None  # to what was said before the loss was noticed
            self._pause(f"it does not know us: {message.reason}")
            return self._advise(now) if self._may_advise(now) else None
        return self._refuse_source(why)

    def _refuse_source(self, why: str) -> None:
        if why not in self._refused and len(self._refused) < REFUSALS:  # it is asked every second; it is told once
            self._refused.add(why)
            self._event("source-refused", why, cause=why)

    # --- effects ------------------------------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        self.say(encode(message))

    def _ask(self, wish: RangeRequest, urgent: bool) -> None:
        self.requests += 1
        if wish.request < REQUEST_LIMIT:
            asked, answer = self.templates[wish.block].request(wish.request, wish.offset, wish.length, urgent)
            self.answers[answer] = wish
            self.say(asked)
            return
        ranges = pack_ranges([(wish.offset, wish.length)])
        return self._send(RequestRanges(wish.request, self._numbers[wish.block], urgent, ranges))

    def _ping(self, now: float) -> None:
        self._pinged_at = now
        if self.silent_since is None:
            self.silent_since = now
        self._nonce += 1
        self._send(Ping(self._nonce))
        if self.state == "up":
            for block, number in self._numbers.items():
                if block not in self._complete:
                    self._send(Listen(number, PUSH_WINDOW))

    def _may_advise(self, now: float) -> bool:
        return now - self._advised_at >= ADVISE_SECONDS

    def _advise(self, now: float) -> None:
        # A slow source answers in order: only the Pong of a Ping that follows means that this Advise found nobody. One
        # more would end the stream of this one, and what is asked of it in between would be refused.
        self._advised_at, self._nonce_old = now, self._nonce
        for stream in self._streams.values():
            if stream.block not in self._numbers:
                self._send(Advise(stream.name, stream.page_size, features_at(self.endpoint)))

    def _pause(self, why: str) -> None:
        self.state = "paused"
        self._nonce_old, self._pinged_at = self._nonce, -1e9
        self._numbers.clear()
        self._blocks.clear()
        self.templates.clear()
        self.answers.clear()
        self.flow.lost_source()
        self._event("pause", f"source {self.endpoint} is lost: {why}; what is missing waits", cause=why)

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(request, urgent=urgent):
                    wish = self.flow.outstanding.get(request)
                    if wish is not None:
                        self._ask(wish, urgent)
                case GiveUp(block, offset, length):
                    self._gave_up(block, offset, length)
