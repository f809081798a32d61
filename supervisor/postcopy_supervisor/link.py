"""The link to one page source program: the phases of the conversation, its loss and its return.

    advising --all blocks advised--> up --silence, or a refusal that says "I do not know you"--> paused --advised--> up

No socket is here: words go out through ``send`` and come in through ``heard``. A source that comes back at the
endpoint, or another one there, is the same source if size and identity of every block are the same; else it is
refused, and we wait on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postcopy_protocol import statistics
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Message
from postcopy_protocol.return_path import (
    FEATURES,
    Advise,
    Advised,
    Complete,
    Listen,
    Pages,
    Ping,
    Pong,
    RequestRanges,
    SourceRefused,
    check_pages,
    pack_ranges,
)

from .flow import Effect, Flow, GiveUp, Send

log = logging.getLogger(__name__)

ADVISE_SECONDS = 1.0
PING_SECONDS = 1.0
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


class Link:
    """One source. ``event`` is told of every change of state; ``gave_up`` of ranges that never came."""

    def __init__(
        self,
        endpoint: str,
        streams: Sequence[Stream],
        patience: float,
        send: Callable[[Message], None],
        event: Callable[[str, str], None],
        gave_up: Callable[[int, int, int], None],
    ) -> None:
        self.endpoint = endpoint
        self.state = "advising"
        self.flow = Flow()
        self.words = [0] * statistics.WORDS
        self.requests = self.pages = self.bytes = 0
        self._streams = {stream.block: stream for stream in streams}
        self._numbers: dict[int, int] = {}  # block: the source's number of its stream
        self._blocks: dict[int, int] = {}  # and back
        self._patience = patience
        self._send = send
        self._event = event
        self._gave_up = gave_up
        self._heard_at = self._advised_at = self._pinged_at = -1e9
        self._refused = ""

    @property
    def shown(self) -> str:
        """``up``, ``paused`` (it was there), or ``lost`` (not heard of since the start)."""
        return {"up": "up", "paused": "paused"}.get(self.state, "lost")

    # --- wishes -------------------------------------------------------------------------------------------------------

    def wish(self, client: int, block: int, offset: int, length: int, now: float) -> None:
        """Ask for a range, now or when the source is back."""
        self._do(self.flow.wish(client, block, offset, length, now))

    def complete(self, block: int) -> None:
        """Nothing more will be asked of this block."""
        number = self._numbers.get(block)
        if number is not None and self.state == "up":
            self._send(Complete(number))

    def tick(self, now: float) -> None:
        if self.state == "up":
            if now - self._heard_at > self._patience:
                self._pause(f"nothing heard for {self._patience:g} s")
            elif now - self._pinged_at >= PING_SECONDS:
                self._pinged_at = now
                self._send(Ping(1))
        if self.state != "up" and now - self._advised_at >= ADVISE_SECONDS:
            self._advise(now)
        self._do(self.flow.tick(now))

    # --- what the source says -----------------------------------------------------------------------------------------

    def heard(self, message: Message, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        """Take a word of the source; gives pages that have come. Raises BadMessage on words that are not in order."""
        match message:
            case Pages():
                return self._pages(message, frame_lengths, now)
            case Advised():
                self._heard_at = now
                self._advised(message, now)
            case Pong():
                self._heard_at = now
            case SourceRefused():
                self._was_refused(message, now)
        return None

    def _pages(self, message: Pages, frame_lengths: Sequence[int], now: float) -> Arrived | None:
        block = self._blocks.get(message.stream)
        if block is None:
            return None  # a late answer, from before a recover
        stream = self._streams[block]
        ranges = check_pages(message, frame_lengths, stream.page_size, stream.size)
        self._heard_at = now
        length = sum(length for _, length, _, _ in ranges)
        self.pages += length // stream.page_size
        self.bytes += sum(frame_lengths)
        effects, took = self.flow.answered(message.request, length, now)
        if took:
            self.words[statistics.bucket(int(took * 1e9))] += 1
        self._do(effects)
        return Arrived(block, ranges, message.reason)

    def _advised(self, message: Advised, now: float) -> None:
        stream = next((stream for stream in self._streams.values() if stream.name == message.name), None)
        if stream is None:
            raise BadMessage(f"the source offers a block {message.name} that was not asked for")
        if (message.size, message.identity) != (stream.size, stream.identity):
            return self._refuse_source(
                f"block {message.name} is another one now: {message.size} bytes of {message.identity}, "
                f"it was {stream.size} bytes of {stream.identity}"
            )
        old = self._numbers.pop(stream.block, None)
        if old is not None:
            self._blocks.pop(old, None)
        self._numbers[stream.block], self._blocks[message.stream] = message.stream, stream.block
        self._send(Listen(message.stream, PUSH_WINDOW))
        if self.state != "up" and len(self._numbers) == len(self._streams):
            again, self.state, self._refused = self.state == "paused", "up", ""
            self._event("recover" if again else "source", f"source {self.endpoint} is {'back' if again else 'there'}")
            self._do(self.flow.found_source(now))

    def _was_refused(self, message: SourceRefused, now: float) -> None:
        why = f"source {self.endpoint} refuses ({message.code}) {message.name}: {message.reason}"
        if self.state == "up" and message.code in STRANGERS_WORDS:
            self._pause(f"it does not know us: {message.reason}")
            return self._advise(now)
        return self._refuse_source(why)

    def _refuse_source(self, why: str) -> None:
        if why != self._refused:  # it is asked every second; it is told once
            self._refused = why
            self._event("source-refused", why)

    # --- effects ------------------------------------------------------------------------------------------------------

    def _advise(self, now: float) -> None:
        self._advised_at = now
        for stream in self._streams.values():
            if stream.block not in self._numbers:
                self._send(Advise(stream.name, stream.page_size, FEATURES))

    def _pause(self, why: str) -> None:
        self.state = "paused"
        self._numbers.clear()
        self._blocks.clear()
        self.flow.lost_source()
        self._event("pause", f"source {self.endpoint} is lost: {why}; what is missing waits")

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(request, block, offset, length, urgent):
                    self.requests += 1
                    self._send(RequestRanges(request, self._numbers[block], urgent, pack_ranges([(offset, length)])))
                case GiveUp(block, offset, length):
                    self._gave_up(block, offset, length)
