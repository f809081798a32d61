"""The source's side of the return path: what a supervisor may say, when, and what each refusal is called. Sans-I/O.

One ``SourceConversation`` a supervisor. A refusal changes nothing: after it the conversation is where it was.

::

    a stream is   hears            and then
    -----------   --------------   --------------------------------------------------------
    (none)        Advise           advised: answered by Advised, which numbers the stream
    advised       Listen           listening; ``window`` bytes may be pushed unasked
    listening     Listen           listening; ``window`` bytes more may be pushed (not added up)
    listening     RequestRanges    listening; answered by Pages, one verdict for every page asked
    advised,      Complete         forgotten: nothing is answered for it any more
    listening
    advised,      Advise (name)    forgotten, and a new stream of the same block is advised
    listening

A supervisor is not believed, and what it may make a source remember is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from .errors import BadMessage, BadVersion, PostcopyError
from .geometry import PAGE_SIZES
from .messages import Message
from .return_path import (
    FEATURES,
    MAX_OPEN_BYTES,
    MAX_OPEN_REQUESTS,
    MAX_STREAMS,
    SOURCE_REFUSALS,
    Advise,
    Advised,
    Complete,
    Listen,
    Range,
    RequestRanges,
    SourceRefused,
    check_ranges,
    unpack_ranges,
)


class SourceRefusal(PostcopyError):
    """Why a source refuses: ``code`` is one of SOURCE_REFUSALS, the text is one line for people."""

    def __init__(self, code: str, reason: str, name: str = "") -> None:
        if code not in SOURCE_REFUSALS:
            raise ValueError(f"{code} is no refusal of a source")
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.name = name

    def message(self) -> SourceRefused:
        return SourceRefused(self.code, self.name, self.reason)

    @classmethod
    def of(cls, error: BadMessage) -> SourceRefusal:
        """The refusal that answers what ``decode`` could not take."""
        return cls("bad-version" if isinstance(error, BadVersion) else "bad-message", str(error))


class Phase(Enum):
    """How far a stream has come."""

    ADVISED = "advised"
    LISTENING = "listening"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Offer:
    """A block that a source has: exact ``size``, smallest ``page_size`` that it reads, ``identity`` of its content."""

    name: str
    size: int
    page_size: int
    identity: str


@dataclass(slots=True)
class Stream:
    """One supervisor's use of one block. ``window``: bytes that may still be pushed unasked."""

    number: int
    offer: Offer
    page_size: int
    features: tuple[str, ...]
    phase: Phase = Phase.ADVISED
    window: int = 0


class SourceConversation:
    """What one supervisor has said so far to one source. ``number`` gives each stream a number never given before;
    ``features`` are what this source can do.

    ``open_requests`` and ``open_bytes`` are what waits in the source; ``answered`` lowers them.
    """

    def __init__(
        self, offers: Mapping[str, Offer], number: Callable[[], int], features: Sequence[str] = FEATURES
    ) -> None:
        self._offers = offers
        self._features = features
        self._number = number
        self.streams: dict[int, Stream] = {}
        self.open_requests = 0
        self.open_bytes = 0

    def advise(self, message: Advise) -> tuple[Advised, list[Stream]]:
        """The answer, and the streams of that block that end with it. Raises SourceRefusal."""
        offer = self._offers.get(message.name)
        if offer is None:
            raise SourceRefusal("no-such-block", f"this source has {self._names()}, not this block", message.name)
        if message.page_size not in PAGE_SIZES or message.page_size % offer.page_size:
            raise SourceRefusal(
                "bad-page-size",
                f"{message.name} is wanted in pages of {message.page_size}; the source reads whole pages of "
                f"{offer.page_size}, and a page is {' or '.join(map(str, PAGE_SIZES))}",
                message.name,
            )
        ended = [stream for stream in self.streams.values() if stream.offer.name == message.name]
        if len(self.streams) - len(ended) >= MAX_STREAMS:
            raise SourceRefusal("limit", f"a supervisor may have {MAX_STREAMS} streams", message.name)
        for old in ended:
            self.end(old)
        features = tuple(feature for feature in self._features if feature in message.features)
        stream = Stream(self._number(), offer, message.page_size, features)
        self.streams[stream.number] = stream
        return Advised(offer.name, stream.number, offer.size, offer.identity, features), ended

    def listen(self, message: Listen) -> Stream:
        """The stream that listens now, its window renewed. Raises SourceRefusal."""
        stream = self._stream(message)
        stream.phase = Phase.LISTENING
        stream.window = message.window if "push" in stream.features else 0
        return stream

    def request(self, message: RequestRanges) -> tuple[Stream, list[Range]]:
        """The stream and the ranges that are asked of it. Raises SourceRefusal."""
        stream = self.streams.get(message.stream) or self._stream(message)
        if stream.phase is not Phase.LISTENING:
            raise self._out_of_phase(message, stream)
        if not message.request:
            raise SourceRefusal("bad-message", "a request has a number, and not 0", stream.offer.name)
        try:
            ranges = unpack_ranges(message.ranges)
            length = check_ranges(ranges, stream.page_size, stream.offer.size)
        except BadMessage as error:
            raise SourceRefusal("bad-range", f"request {message.request}: {error}", stream.offer.name) from None
        if self.open_requests >= MAX_OPEN_REQUESTS or self.open_bytes + length > MAX_OPEN_BYTES:
            raise SourceRefusal(
                "limit",
                f"request {message.request}: {self.open_requests} requests of {self.open_bytes} bytes wait here; "
                f"{MAX_OPEN_REQUESTS} and {MAX_OPEN_BYTES} may",
                stream.offer.name,
            )
        self.open_requests += 1
        self.open_bytes += length
        return stream, ranges

    def answered(self, length: int) -> None:
        """A request of so many bytes waits no more."""
        self.open_requests -= 1
        self.open_bytes -= length

    def complete(self, message: Complete) -> Stream:
        """The stream that has ended. Raises SourceRefusal."""
        stream = self._stream(message)
        self.end(stream)
        return stream

    def end(self, stream: Stream) -> None:
        """Forget a stream."""
        stream.phase = Phase.ENDED
        stream.window = 0
        del self.streams[stream.number]

    def _stream(self, message: Listen | RequestRanges | Complete) -> Stream:
        stream = self.streams.get(message.stream)
        if stream is None:
            raise self._out_of_phase(message, None)
        return stream

    def _out_of_phase(self, message: Message, stream: Stream | None) -> SourceRefusal:
        word = type(message).__name__
        if stream is None:
            number = getattr(message, "stream", 0)
            return SourceRefusal("out-of-phase", f"{word}: there is no stream {number} here; advise first")
        return SourceRefusal(
            "out-of-phase",
            f"{word}: stream {stream.number} is {stream.phase.value}; say Listen first",
            stream.offer.name,
        )

    def _names(self) -> str:
        names = sorted(self._offers)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no blocks"
