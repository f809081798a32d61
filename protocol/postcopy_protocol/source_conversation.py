"""The source's half of the return path: what a supervisor may send, when, and the refusals. Sans-I/O.

::

    message          a stream must be     then it is
    --------------   ------------------   ----------
    Advise           -                    advised
    Listen           advised, listening   listening
    RequestRanges    listening            listening
    Complete         advised, listening   ended

``Advise`` is answered by Advised with the number of a new stream, and ends the streams of the same block. ``Listen``
sets the number of bytes that may be pushed. ``RequestRanges`` is answered by Pages, one answer for every page.

A refusal changes nothing. A supervisor is not trusted, and what it can make a source remember is bounded.
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
    """Why a source refuses: ``code`` is one of SOURCE_REFUSALS, ``reason`` is one line for people."""

    def __init__(self, code: str, reason: str, name: str = "") -> None:
        if code not in SOURCE_REFUSALS:
            raise ValueError(f"{code} is no refusal of a source")
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.name = name

    def message(self) -> SourceRefused:
        """The message that reports it."""
        return SourceRefused(self.code, self.name, self.reason)

    @classmethod
    def of(cls, error: BadMessage) -> SourceRefusal:
        """The refusal for bytes that ``decode`` did not accept."""
        return cls("bad-version" if isinstance(error, BadVersion) else "bad-message", str(error))


class Phase(Enum):
    """How far a stream has come."""

    ADVISED = "advised"
    LISTENING = "listening"
    ENDED = "ended"


RULES: dict[type[Message], tuple[tuple[Phase, ...], Phase]] = {
    Advise: ((), Phase.ADVISED),
    Listen: ((Phase.ADVISED, Phase.LISTENING), Phase.LISTENING),
    RequestRanges: ((Phase.LISTENING,), Phase.LISTENING),
    Complete: ((Phase.ADVISED, Phase.LISTENING), Phase.ENDED),
}
"""The table above: phases in which a stream accepts a message, and the phase after it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A block of a source: exact ``size``, smallest ``page_size`` that it can read, ``identity`` of its contents."""

    name: str
    size: int
    page_size: int
    identity: str


@dataclass(slots=True)
class Stream:
    """One supervisor's use of one block. ``window``: bytes that may still be pushed."""

    number: int
    offer: Offer
    page_size: int
    features: tuple[str, ...]
    phase: Phase = Phase.ADVISED
    window: int = 0


class SourceConversation:
    """What one supervisor has sent so far to one source. ``number`` returns a number never returned before;
    ``features`` are those of this source.

    ``open_requests`` and ``open_bytes`` count the requests that wait in the source; ``answered`` lowers them.
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
        """Returns the answer, and the streams of that block that it ends. Raises SourceRefusal."""
        offer = self._offers.get(message.name)
        if offer is None:
            raise SourceRefusal("no-such-block", f"this source has {self._names()}, not this block", message.name)
        if message.page_size not in PAGE_SIZES or message.page_size % offer.page_size:
            raise SourceRefusal(
                "bad-page-size",
                f"{message.name} is requested in pages of {message.page_size}; the source reads whole pages of "
                f"{offer.page_size}, and a page is {' or '.join(map(str, PAGE_SIZES))}",
                message.name,
            )
        ended = [stream for stream in self.streams.values() if stream.offer.name == message.name]
        if len(self.streams) - len(ended) >= MAX_STREAMS:
            raise SourceRefusal("limit", f"a supervisor may have {MAX_STREAMS} streams", message.name)
        for old in ended:
            self.end(old)
        features = tuple(feature for feature in self._features if feature in message.features)
        stream = Stream(self._number(), offer, message.page_size, features, RULES[Advise][1])
        self.streams[stream.number] = stream
        return Advised(offer.name, stream.number, offer.size, offer.identity, features), ended

    def listen(self, message: Listen) -> Stream:
        """Returns the stream, with its window renewed. Raises SourceRefusal."""
        stream = self._stream(message)
        stream.phase = RULES[Listen][1]
        stream.window = message.window if "push" in stream.features else 0
        return stream

    def request(self, message: RequestRanges) -> tuple[Stream, list[Range]]:
        """Returns the stream and the requested ranges. Raises SourceRefusal."""
        stream = self._stream(message)
        if not message.request:
            raise SourceRefusal("bad-message", "the number of a request must not be 0", stream.offer.name)
        try:
            ranges = unpack_ranges(message.ranges)
            length = check_ranges(ranges, stream.page_size, stream.offer.size)
        except BadMessage as error:
            raise SourceRefusal("bad-range", f"request {message.request}: {error}", stream.offer.name) from None
        if self.open_requests >= MAX_OPEN_REQUESTS or self.open_bytes + length > MAX_OPEN_BYTES:
            raise SourceRefusal(
                "limit",
                f"request {message.request}: {self.open_requests} requests of {self.open_bytes} bytes wait here; "
                f"at most {MAX_OPEN_REQUESTS} and {MAX_OPEN_BYTES} may",
                stream.offer.name,
            )
        self.open_requests += 1
        self.open_bytes += length
        return stream, ranges

    def answered(self, length: int) -> None:
        """A request of ``length`` bytes no longer waits."""
        self.open_requests -= 1
        self.open_bytes -= length

    def complete(self, message: Complete) -> Stream:
        """Returns the stream, which has ended. Raises SourceRefusal."""
        stream = self._stream(message)
        self.end(stream)
        return stream

    def end(self, stream: Stream) -> None:
        """Forget a stream."""
        stream.phase = RULES[Complete][1]
        stream.window = 0
        del self.streams[stream.number]

    def _stream(self, message: Listen | RequestRanges | Complete) -> Stream:
        stream = self.streams.get(message.stream)
        if stream is None or stream.phase not in RULES[type(message)][0]:
            raise self._out_of_phase(message, stream)
        return stream

    def _out_of_phase(self, message: Message, stream: Stream | None) -> SourceRefusal:
        name = type(message).__name__
        if stream is None:
            number = getattr(message, "stream", 0)
            return SourceRefusal("out-of-phase", f"{name}: there is no stream {number} here; advise first")
        return SourceRefusal(
            "out-of-phase",
            f"{name}: stream {stream.number} is {stream.phase.value}; send Listen first",
            stream.offer.name,
        )

    def _names(self) -> str:
        names = sorted(self._offers)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no blocks"
